"""Checkpoints as tools leave them: each works as runtimes would have it, or says in one line what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from models import TEMPLATE, write_weights
from safetensors.torch import load_file, save_file

from l4pack.checkpoint.open import open_source

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
STALE = {"quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": {"num_bits": 8}}


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a tiny Scout in one file, to be changed."""
    return shutil.copytree(checkpoint("scout"), tmp_path / "source")


def edit(folder, change, file="config.json"):
    """Change a JSON file."""
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def rewrite(folder, change):
    """Change the tensors."""
    state = load_file(folder / "model.safetensors")
    write_weights(folder, change(state) or state)


def quantized(l4pack, folder, *options):
    """Quantize, verify against the source; returns the artifact and its plan, whose sizes must be the files'."""
    out = folder.with_name("out")
    ended = l4pack("quantize", folder, "-r", "int4-rtn", "-o", out, "--json", *options)
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()} == plan["files"]
    verified = l4pack("verify", out, "--against", folder)
    assert verified.code == 0, verified.out
    return out, plan


def refused(l4pack, folder, *says):
    """inspect, plan and quantize refuse it in one line with a hint, and exit code 4."""
    for command in (["inspect"], ["plan"], ["quantize", "--out", folder.with_name("out")]):
        ended = l4pack(command[0], folder, *command[1:])
        assert (ended.code, ended.out) == (4, ""), ended
        error, hint = ended.err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        for text in says:
            assert text in ended.err


@pytest.mark.parametrize(
    "change",
    [lambda c: c.update(quantization_config=STALE), lambda c: c.update(compression_config=STALE),
     lambda c: c["text_config"].update(quantization_config=STALE)],
    ids=["quantization_config", "compression_config", "text_config"],
)  # fmt: skip
def test_a_stale_statement_about_quantization_gives_way_to_the_tensors(folder, checkpoint, l4pack, change):
    edit(folder, change)
    out, plan = quantized(l4pack, folder)
    assert any("none of its tensors is" in warning for warning in plan["warnings"])
    assert "none of its tensors is" in l4pack("inspect", folder).out
    pure = open_source(str(checkpoint("scout"))).config.raw
    written = json.loads((out / "config.json").read_text())
    assert written.pop("quantization_config")["config_groups"]
    assert written == pure


@pytest.mark.parametrize("stated", [True, False])
def test_tensors_that_are_quantized_are(folder, l4pack, stated):
    name = "language_model.model.layers.2.feed_forward.shared_expert.down_proj.weight"
    rewrite(folder, lambda state: state.update({name: state[name].to(torch.float8_e4m3fn)}))
    if stated:
        edit(folder, lambda c: c.update(quantization_config=STALE))
    ended = l4pack("plan", folder)
    assert ended.code == 4
    assert ("gives it no scheme" if stated else "original") in ended.err


def tie(folder):
    edit(folder, lambda c: c["text_config"].update(tie_word_embeddings=True))


def test_a_tied_head_that_is_stored_is_left_out(folder, l4pack):
    rewrite(folder, lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    tie(folder)
    out, plan = quantized(l4pack, folder)
    assert any("tied to the embedding" in warning for warning in plan["warnings"])
    assert HEAD not in open_source(str(out)).entries
    record = json.loads(l4pack("inspect", folder, "--json").out)
    assert "lm_head" not in {row["role"] for row in record["roles"]}
    budget = ("budget", folder, "--device", "h100", "--context", 64, "--json")
    with_head = json.loads(l4pack(*budget).out)["weight_bytes"]
    rewrite(folder, lambda state: {name: tensor for name, tensor in state.items() if name != HEAD})
    assert json.loads(l4pack(*budget).out)["weight_bytes"] == with_head
    assert l4pack("evaluate", out, "--against", folder, "--samples", 1, "--sequence-length", 32).code == 0


def test_a_tied_head_that_is_another_is_refused(folder, l4pack):
    tie(folder)
    ended = l4pack("quantize", folder, "-r", "int4-rtn", "-o", folder.with_name("out"))
    assert ended.code == 4
    assert "is tied to the embedding by config.json, and holds other numbers" in ended.err
    assert not folder.with_name("out").exists()


def test_a_head_that_is_neither_tied_nor_stored(folder, l4pack):
    rewrite(folder, lambda state: {name: tensor for name, tensor in state.items() if name != HEAD})
    refused(l4pack, folder, f"{HEAD} is missing", "tie_word_embeddings")


def test_an_adapter_beside_a_model_is_left_behind(folder, l4pack):
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    for name in ("consolidated.safetensors", "optimizer.safetensors", "ema-1.safetensors"):
        shutil.copy(folder / "adapter_model.safetensors", folder / name)
    (folder / "adapter_config.json").write_text("{}")
    _, plan = quantized(l4pack, folder)
    assert {"adapter_model.safetensors", "adapter_config.json", "consolidated.safetensors"} <= set(plan["left_behind"])
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert open_source(str(folder)).shards == ("weights.safetensors",)


def test_an_adapter_alone(folder, l4pack):
    adapter = {"base_model_name_or_path": "meta-llama/Llama-4-Scout-17B-16E-Instruct"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    refused(l4pack, folder, "is a LoRA adapter", "--lora")
    (folder / "config.json").unlink()
    refused(l4pack, folder, "adapter of meta-llama/Llama-4-Scout-17B-16E-Instruct", "--lora")
    for odd in ("[]", "{", json.dumps({"base_model_name_or_path": "x\x1b[31m"})):
        (folder / "adapter_config.json").write_text(odd)
        refused(l4pack, folder, "is a LoRA adapter, not a model")


@pytest.mark.parametrize(
    "rename",
    [lambda name: f"base_model.model.{name}", lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight")],
    ids=["prefix", "base_layer"],
)
def test_unmerged_weights(folder, l4pack, rename):
    lora = "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    rewrite(folder, lambda s: {**{rename(name): t for name, t in s.items()}, rename(lora): torch.ones(2, 2)})
    refused(l4pack, folder, "of a LoRA that was not merged", "lora_A.default.weight", "merge_and_unload")


def test_a_vision_tower_that_was_dropped(folder, l4pack):
    rewrite(folder, lambda s: {name: t for name, t in s.items() if name.startswith("language_model.")})
    refused(l4pack, folder, "describes a vision tower, and the weights have none", "llama4_text")
    rewrite(folder, lambda s: {name.removeprefix("language_model."): t for name, t in s.items()})
    refused(l4pack, folder, "describes a vision tower, and the weights have none", "Llama4ForCausalLM")

    def text_alone(config):
        text = config.pop("text_config")
        config.clear()
        config.update(text, model_type="llama4_text", architectures=["Llama4ForCausalLM"])

    edit(folder, text_alone)
    quantized(l4pack, folder)


def test_a_vision_tower_under_a_text_configuration(folder, checkpoint, l4pack):
    shutil.copy(checkpoint("text") / "config.json", folder)
    refused(l4pack, folder, "are of a vision tower, and config.json is that of a text model")


def test_two_models_in_one_folder(checkpoint, tmp_path, l4pack):
    folder = shutil.copytree(checkpoint("scout", shards=3), tmp_path / "source")
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "stray.safetensors")
    assert open_source(str(folder)).left_behind == ("stray.safetensors",)
    shutil.copy(checkpoint("scout") / "model.safetensors", folder)
    refused(l4pack, folder, "beside an index of other shards", "out of the folder")


WEIGHTLESS = {
    "MODEL.SAFETENSORS": "rename MODEL.SAFETENSORS",
    "pytorch_model-00001-of-00002.bin": "save it with save_pretrained",
    "model.gguf": "save it with save_pretrained",
}


@pytest.mark.parametrize(("name", "hint"), WEIGHTLESS.items())
def test_weights_in_another_form(folder, l4pack, name, hint):
    (folder / "model.safetensors").rename(folder / name)
    refused(l4pack, folder, "holds no safetensors files", hint)


def test_shards_in_a_subfolder(checkpoint, tmp_path, l4pack):
    folder = shutil.copytree(checkpoint("scout", shards=3), tmp_path / "source")
    edit(folder, lambda i: i.update(weight_map={k: f"weights/{v}" for k, v in i["weight_map"].items()}), INDEX)
    refused(l4pack, folder, "which is not a shard of this folder", "move them there")


def test_marks_sizes_and_metadata_that_mean_nothing(checkpoint, tmp_path, l4pack):
    folder = shutil.copytree(checkpoint("scout", shards=3), tmp_path / "source")
    edit(folder, lambda i: i["metadata"].update(total_size=7, note="x"), INDEX)
    for file in ("config.json", INDEX):
        (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt", "extra": "x" * 1000})
    quantized(l4pack, folder)


CONVERSATION = {"messages": [{"role": "user", "content": "Where is the fox?"}]}
PLACES = {
    "chat_template.json": json.dumps({"chat_template": TEMPLATE}),
    "chat_template.jinja": TEMPLATE,
    "tokenizer_config.json": [{"name": "default", "template": TEMPLATE}, {"name": "tool", "template": "no"}],
}


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_rendered_from_wherever_it_lies(folder, place):
    from l4pack.text.tokenizer import load_tokenizer

    expected = load_tokenizer(open_source(str(folder))).apply_chat_template(CONVERSATION["messages"], tokenize=False)
    edit(folder, lambda c: c.pop("chat_template"), "tokenizer_config.json")
    assert not load_tokenizer(open_source(str(folder))).chat_template
    content = PLACES[place]
    if isinstance(content, str):
        (folder / place).write_text(content)
    else:
        edit(folder, lambda c: c.update(chat_template=content), place)
    tokenizer = load_tokenizer(open_source(str(folder)))
    assert tokenizer.apply_chat_template(CONVERSATION["messages"], tokenize=False) == expected


@pytest.mark.parametrize("content", ["[]", "{", '{"chat_template": 5}', "{}"])
def test_a_template_file_without_one(folder, l4pack, content):
    edit(folder, lambda c: c.pop("chat_template"), "tokenizer_config.json")
    (folder / "chat_template.json").write_text(content)
    ended = l4pack("coverage", folder, "--calibration-samples", 1)
    assert ended.code == 4
    assert "chat_template.json holds no chat template" in ended.err


KEPT = [EMBEDDING, HEAD, "language_model.model.norm.weight", "language_model.model.layers.0.self_attn.q_proj.weight"]


def dtypes(out):
    return {entry.dtype for name, entry in open_source(str(out)).entries.items() if not name.endswith("_scale")}


@pytest.mark.parametrize("stated", ["float32", "bfloat16", None])
def test_float32_that_is_kept_is_rounded_to_what_runtimes_compute_in(checkpoint, tmp_path, l4pack, stated):
    folder = shutil.copytree(checkpoint("scout", dtype="float32"), tmp_path / "source")

    def state(config):
        for section in (config, config["text_config"], config["vision_config"]):
            section.pop("dtype", None)
        config.update({} if stated is None else {"dtype": stated, "torch_dtype": f"torch.{stated}"})

    edit(folder, state)
    out, plan = quantized(l4pack, folder)
    assert dtypes(out) == {"BF16", "I32", "I64"}
    assert any("are rounded to BF16" in warning and "--keep-float32" in warning for warning in plan["warnings"])
    config = json.loads((out / "config.json").read_text())
    assert (config.get("dtype"), config.get("torch_dtype")) == (
        (None, None) if stated is None else ("bfloat16", "torch.bfloat16" if stated == "bfloat16" else "bfloat16")
    )
    made, theirs = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in KEPT:
        assert torch.equal(made[name], theirs[name].to(torch.bfloat16))
    assert "float32 numbers rounded to 16 bits" in l4pack("verify", out, "--against", folder).out
    assert l4pack("evaluate", out, "--against", folder, "--samples", 1, "--sequence-length", 32).code == 0


def test_float32_weighs_what_bfloat16_does(checkpoint, l4pack):
    weigh = [json.loads(l4pack("plan", checkpoint("scout", dtype=dtype), "-r", "meta-int4", "--json").out)["weight_bytes"]
             for dtype in ("float32", "bfloat16")]  # fmt: skip
    assert weigh[0] == weigh[1]


@pytest.mark.parametrize("recipe", ["int4-rtn", "meta-fp8"])  # meta-fp8 keeps experts that are taken out of fused ones
def test_float32_stays_when_it_is_asked_for(checkpoint, tmp_path, l4pack, recipe):
    folder, out = checkpoint("scout", dtype="float32"), tmp_path / "out"
    command = ("quantize", folder, "-r", recipe, "-o", out)
    assert l4pack(*command, "--keep-float32").code == 0
    assert "F32" in dtypes(out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert l4pack("verify", out, "--against", folder).code == 0
    assert l4pack(*command).code == 2  # another artifact
    rounded = tmp_path / "rounded"
    assert l4pack("quantize", folder, "-r", recipe, "-o", rounded).code == 0
    assert "F32" not in dtypes(rounded)
    assert l4pack("verify", rounded, "--against", folder).code == 0


def test_rounding_that_is_not_the_sources_is_found(checkpoint, tmp_path, l4pack):
    folder, out = checkpoint("scout", dtype="float32"), tmp_path / "out"
    assert l4pack("quantize", folder, "-r", "int4-rtn", "-o", out).code == 0
    made = load_file(out / "model.safetensors")
    bits = made[HEAD].view(torch.int16)
    bits[3, 5] += 1
    save_file(made, out / "model.safetensors", {"format": "pt"})
    ended = l4pack("verify", out, "--against", folder, "--json")
    assert ended.code == 1
    assert HEAD in {finding["where"] for finding in json.loads(ended.out)["findings"] if finding["rule"] == "kept"}


def test_float16_models_get_float16_and_refuse_what_it_can_not_hold(checkpoint, tmp_path, l4pack):
    folder, out = shutil.copytree(checkpoint("scout", dtype="float32"), tmp_path / "source"), tmp_path / "out"
    edit(folder, lambda c: c.update(dtype="float16"))
    assert l4pack("quantize", folder, "-r", "int4-rtn", "-o", out).code == 0
    assert "F16" in dtypes(out)
    assert l4pack("verify", out, "--against", folder).code == 0
    rewrite(folder, lambda state: state.update({KEPT[2]: state[KEPT[2]].fill_(70000.0)}))
    ended = l4pack("quantize", folder, "-r", "int4-rtn", "-o", tmp_path / "other")
    assert ended.code == 4
    assert f"{KEPT[2]} holds a weight too large for F16" in ended.err


def test_float16_stays_float16(checkpoint, l4pack):
    plan = json.loads(l4pack("plan", checkpoint("scout", dtype="float16"), "-r", "int4-rtn", "--json").out)
    assert not [warning for warning in plan["warnings"] if "float32" in warning]


def test_rounding_to_16_bits_is_torchs():
    from l4pack.quant.floats import narrowed

    values = torch.randn(700, 3001, generator=torch.Generator().manual_seed(0)) * 1e3
    values[0, :4] = torch.tensor([1e-40, -0.0, 65519.0, 3.0e38])
    for name, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        expected = values.to(kind)
        made = torch.from_numpy(narrowed(values.numpy(), name))
        assert torch.equal(made.view(torch.int16), expected.view(torch.int16))
        turned = torch.from_numpy(narrowed(values.numpy().T, name))
        assert torch.equal(turned.view(torch.int16), expected.T.contiguous().view(torch.int16))
