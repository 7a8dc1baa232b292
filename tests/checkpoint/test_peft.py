"""Adapters made by peft and merged by peft: what is read is its own `merge_and_unload`, bit for bit.

peft computes with a float32 model, so that it rounds once as well; its merged model is rounded to BF16 afterwards.
"""

from __future__ import annotations

import json

import pytest
import torch
from models import write_weights
from safetensors.torch import load_file
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.reader import Reader
from l4pack.demo import model_path

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
SIZES = {"intermediate_size": 256}  # no square matrix among the experts' but for the demo's
KINDS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "everything": {"target_modules": "all-linear", "use_rslora": True},
    "mlps": {"target_modules": r".*language_model.*\.(gate_proj|up_proj|down_proj|router)", "lora_alpha": 3},
    "fused": {"target_modules": [], "target_parameters": EXPERTS},
    "down": {"target_modules": ["shared_expert.up_proj"], "target_parameters": EXPERTS[1:]},
    "vision": {"target_modules": r".*(vision_model.*(q_proj|fc1|fc2|linear)|linear_1)"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "experts.gate_up_proj": 3},
        "alpha_pattern": {r"language_model.*\.v_proj": 5, "experts.down_proj": 7},
    },
    "head": {"target_modules": ["lm_head", "embed_tokens"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "router"]},
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "bias": "all"},
}  # fmt: skip


def model_of(folder):
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = {"Llama4ForCausalLM": Llama4ForCausalLM}.get(kind, Llama4ForConditionalGeneration)
    return model.from_pretrained(folder, dtype=torch.float32)


def trained(base, out, seed=0, **options):
    """An adapter with random numbers where training would have put some."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options})
    model = peft.get_peft_model(model_of(base), config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(out)
    return out


def merged_by_peft(base, *adapters):
    """Its tensors in BF16."""
    model = model_of(base)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}


def check(source, *adapters, want):
    """Every tensor is what peft makes it, read whole and in odd pieces; some were changed."""
    checkpoint, plain = open_source(str(source), lora=list(map(str, adapters))), open_source(str(source))
    assert any(entry.derived is not None for entry in checkpoint.entries.values())
    with Reader(checkpoint.entries, checkpoint.store.path) as reader:
        for name, entry in checkpoint.entries.items():
            whole = reader.tensor(name)
            assert whole.tobytes() == want[name].view(torch.int16).numpy().tobytes(), name
            first = reader.span(name, 6, min(entry.nbytes, 3001) - 6)
            assert first.tobytes() == whole.tobytes()[6 : 6 + len(first)], name
            if len(entry.shape) == 3:
                part = reader.columns(name, 1, [slice(3, 40)], slice(2, 9))
                assert (part == whole[1, 2:9, 3:40]).all(), name
    assert plain.entries.keys() == checkpoint.entries.keys()


@pytest.fixture(scope="module", params=KINDS)
def demo_adapter(request, tmp_path_factory):
    return trained(model_path(), tmp_path_factory.mktemp("demo") / request.param, **KINDS[request.param])


def test_the_demo_merged_is_what_peft_makes_of_it(demo_adapter):
    check("demo", demo_adapter, want=merged_by_peft(model_path(), demo_adapter))


@pytest.mark.parametrize("kind", ["everything", "patterns"])
def test_a_maverick_with_dense_layers(kind, checkpoint, tmp_path):
    base = checkpoint("maverick", **SIZES)
    adapter = trained(base, tmp_path / "adapter", **KINDS[kind])
    check(base, adapter, want=merged_by_peft(base, adapter))


def test_a_text_model(checkpoint, tmp_path):
    base = checkpoint("text", **SIZES)
    adapter = trained(base, tmp_path / "adapter", **KINDS["patterns"])
    check(base, adapter, want=merged_by_peft(base, adapter))


def test_experts_that_lie_one_by_one_take_an_adapter_of_fused_ones(checkpoint, tmp_path):
    from models import unfuse

    base = checkpoint("scout", **SIZES)
    adapter = trained(base, tmp_path / "adapter", **KINDS["fused"])
    want = unfuse(merged_by_peft(base, adapter))
    check(checkpoint("scout", layout="unfused", **SIZES), adapter, want=want)


def test_two_adapters_are_summed_in_float32(checkpoint, tmp_path):
    base = checkpoint("scout", **SIZES)
    one = trained(base, tmp_path / "one", seed=1, **KINDS["patterns"])
    two = trained(base, tmp_path / "two", seed=2, **KINDS["attention"])
    check(base, one, two, want=merged_by_peft(base, one, two))


def test_an_artifact_is_that_of_the_merged_checkpoint(checkpoint, tmp_path, l4pack):
    base = checkpoint("maverick", **SIZES)
    adapter = trained(base, tmp_path / "adapter", **KINDS["patterns"])
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in base.iterdir():
        if not file.name.endswith((".safetensors", ".index.json")):
            (merged / file.name).write_bytes(file.read_bytes())
    write_weights(merged, merged_by_peft(base, adapter))
    for source, out, lora in ((base, "with", ["--lora", adapter]), (merged, "without", [])):
        ended = l4pack("quantize", source, "-r", "int4-rtn", "--out", tmp_path / out, *lora, "--json")
        assert ended.code == 0, ended.err
        files = json.loads(ended.out)["files"]
        assert {file.name: file.stat().st_size for file in (tmp_path / out).iterdir()} == files
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
