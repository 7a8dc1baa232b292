"""GGUF exports, read back by gguf's own reader and held against what compressed-tensors makes of the artifact."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from conftest import Ended, file_digests, quick_plan
from exporting import MIX, recipe_of, with_merge
from killing import Killed, killed_after
from safetensors import safe_open
from upstream import decompressed, weights

from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.writer import ShardWriter
from l4pack.containers.gguf_text import context_length
from l4pack.errors import L4packError, UsageError
from l4pack.export.gguf import Gguf
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.model.config import known_config
from l4pack.quantize.run import run_plan

EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
OTHERS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "feed_forward.gate_proj": "ffn_gate", "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down", "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp", "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.router": "ffn_gate_inp", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
MAVERICK = {"num_local_experts": 128, "intermediate_size": 64}


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """An artifact of MIX, its plan for GGUF, and the folder that came of it; each made once."""
    made = {}

    def make(kind, **options):
        if kind not in made:
            place = tmp_path_factory.mktemp("gguf")
            artifact = run_plan(quick_plan(checkpoint(kind, **options), MIX), place / kind).out
            plan = plan_export(open_source(str(artifact)), Gguf())
            made[kind] = artifact, plan, run_export(plan, place / "out")
        return made[kind]

    return make


def values_of(folder, files="[!m]*.gguf"):
    """Every tensor of an export by gguf alone, float32 in its shape; those of the text model unless other files are named."""
    found = {}
    for path in sorted(folder.glob(files)):
        for tensor in gguf.GGUFReader(path).tensors:
            shape = tuple(reversed(tensor.shape.tolist()))
            found[tensor.name] = (
                gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape),
                tensor.tensor_type.name,
            )
    return found


def wanted_of(artifact):
    """The text model's weights by the names GGUF has for them, by compressed-tensors alone."""
    dense = decompressed(artifact, exact=True)
    plain = {
        name.removesuffix(".weight"): one.float() for name, one in weights(artifact).items() if name.endswith(".weight")
    }
    found, stacks = {}, {}
    for module, weight in {**plain, **dense}.items():
        if "vision" in module or "multi_modal" in module:
            continue
        where, _, below = module.partition("layers.")
        layer, _, rest = below.partition(".")
        if not below:
            found[f"{OUTER[where.rpartition('.')[2]]}.weight"] = weight.numpy()
        elif rest.startswith("feed_forward.experts."):
            expert, _, projection = rest.removeprefix("feed_forward.experts.").partition(".")
            stacks.setdefault(f"blk.{layer}.{EXPERTS[projection]}.weight", {})[int(expert)] = weight.numpy()
        else:
            found[f"blk.{layer}.{OTHERS[rest]}.weight"] = weight.numpy()
    return found | {name: np.stack([stack[expert] for expert in sorted(stack)]) for name, stack in stacks.items()}


@pytest.mark.parametrize(("kind", "options"), [("scout", {}), ("maverick", MAVERICK), ("text", {})])
def test_a_file_holds_the_artifacts_numbers(exported, kind, options):
    artifact, plan, result = exported(kind, **options)
    found, wanted = values_of(result.out), wanted_of(artifact)
    factors = found.pop("rope_freqs.weight", None)
    assert (factors is not None) == (kind != "maverick")
    assert found.keys() == wanted.keys()
    for name, (values, _) in found.items():
        np.testing.assert_array_equal(values, wanted[name].reshape(values.shape), err_msg=name)
    assert result.proof.matrices == plan.matrices
    assert result.proof.rounded == 0


def test_embeddings_are_rounded_where_that_is_asked_for(exported, l4pack, tmp_path):
    artifact, plain, _ = exported("scout")
    out = tmp_path / "out"
    asked = ("export", artifact, "--to", "gguf", "--out", out, "--round-embeddings", "--json")
    said = json.loads(l4pack(*asked).out)
    assert [(one["to"], one["why"]) for one in said["rounded"]] == [("Q8_0", "asked for")] * 2
    assert (said["proof"]["rounded"], said["proof"]["matrices"]) == (2, plain.matrices - 2)
    assert sum(path.stat().st_size for path in out.iterdir()) == said["artifact_bytes"] < plain.artifact_bytes
    found, wanted = values_of(out), wanted_of(artifact)
    for name in ("token_embd.weight", "output.weight"):
        values, kind = found.pop(name)
        blocks = wanted.pop(name).reshape(-1, 32)
        step = np.abs(blocks).max(-1, keepdims=True) / 127
        assert kind == "Q8_0"
        assert (np.abs(values.reshape(-1, 32) - blocks) <= 0.8 * step).all()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name][0].reshape(values.shape), values, err_msg=name)
    ended = l4pack("verify", out, "--against", artifact)
    assert (ended.code, "2 rounded as asked" in " ".join(ended.out.split())) == (0, True), ended.err


def test_types_follow_the_schemes(exported):
    kinds = {name: kind for name, (_, kind) in values_of(exported("maverick", **MAVERICK)[2].out).items()}
    assert kinds["blk.1.ffn_gate_exps.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_up_shexp.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"


@pytest.mark.parametrize("kind", ["scout", "text"])
def test_what_was_planned_is_what_lies_there(exported, kind):
    _, plan, result = exported(kind)
    assert {path.name: path.stat().st_size for path in result.out.iterdir()} == plan.files
    assert json.loads((result.out / "l4pack-export.json").read_text())["exact"] is True


def fields(folder):
    reader = gguf.GGUFReader(min(folder.glob("[!m]*.gguf")))
    return {name: field.contents() for name, field in reader.fields.items()}


def test_keys_are_those_that_llama_cpp_reads(exported):
    artifact, _, result = exported("scout")
    found = fields(result.out)
    text = json.loads((artifact / "config.json").read_text())["text_config"]
    for key, name in (("block_count", "num_hidden_layers"), ("embedding_length", "hidden_size"),
                      ("feed_forward_length", "intermediate_size_mlp"), ("expert_feed_forward_length", "intermediate_size"),
                      ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok"),
                      ("attention.head_count", "num_attention_heads"), ("attention.head_count_kv", "num_key_value_heads"),
                      ("attention.key_length", "head_dim"), ("rope.dimension_count", "head_dim"),
                      ("interleave_moe_layer_step", "interleave_moe_layer_step"), ("vocab_size", "vocab_size")):  # fmt: skip
        assert found[f"llama4.{key}"] == text[name], key
    assert found["llama4.rope.freq_base"] == 500000.0
    assert "llama4.attention.sliding_window" not in found
    assert found["llama4.context_length"] == 15  # the model's temperature has its first step there, llama.cpp's later
    assert found["general.license.name"] == "llama4"
    assert found["general.base_model.0.name"] == "tiny-scout"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert sorted(path.name for path in result.out.glob("*.gguf")) == [
        "mmproj-tiny-scout-BF16.gguf",
        "tiny-scout-Q4_0.gguf",
    ]


def test_the_tokenizer_is_in_the_file(exported, tmp_path):
    artifact = with_merge(exported("scout")[0], tmp_path / "artifact")
    result = run_export(plan_export(open_source(str(artifact)), Gguf()), tmp_path / "out")
    found, tokenizer = fields(result.out), json.loads((artifact / "tokenizer.json").read_text())
    tokens = found["tokenizer.ggml.tokens"]
    assert len(tokens) == 384
    assert all(tokens[row] == token for token, row in tokenizer["model"]["vocab"].items())
    assert tokens[256] == "<|begin_of_text|>"
    assert found["tokenizer.ggml.token_type"][:300:100] == [1, 1, 1]
    assert found["tokenizer.ggml.token_type"][256] == gguf.TokenType.CONTROL
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (256, 257)
    assert found["tokenizer.ggml.merges"] == ["t h"]
    assert "<|header_start|>" in found["tokenizer.chat_template"]


def test_rotary_factors_are_transformers(exported):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    artifact, _, result = exported("scout")
    config = AutoConfig.from_pretrained(artifact).text_config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    factors = values_of(result.out)["rope_freqs.weight"][0]
    np.testing.assert_allclose(plain.numpy() / factors, scaled.numpy(), rtol=1e-6)


TOWER = {
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear.weight": "v.patch_embd.weight",
    "vision_model.layernorm_pre.weight": "v.pre_ln.weight",
    "vision_model.layernorm_post.bias": "v.post_ln.bias",
    "vision_model.model.layers.1.self_attn.k_proj.bias": "v.blk.1.attn_k.bias",
    "vision_model.model.layers.1.self_attn.o_proj.weight": "v.blk.1.attn_out.weight",
    "vision_model.model.layers.0.input_layernorm.weight": "v.blk.0.ln1.weight",
    "vision_model.model.layers.0.post_attention_layernorm.weight": "v.blk.0.ln2.weight",
    "vision_model.model.layers.0.mlp.fc1.weight": "v.blk.0.ffn_up.weight",
    "vision_model.model.layers.0.mlp.fc2.bias": "v.blk.0.ffn_down.bias",
    "vision_model.vision_adapter.mlp.fc1.weight": "mm.model.mlp.1.weight",
    "vision_model.vision_adapter.mlp.fc2.weight": "mm.model.mlp.2.weight",
    "multi_modal_projector.linear_1.weight": "mm.model.fc.weight",
}


def test_the_vision_tower_lies_in_a_file_of_its_own(exported):
    artifact, plan, result = exported("scout")
    held, found = weights(artifact), values_of(result.out, "mmproj*.gguf")
    assert len(found) == sum("vision_model" in name or "multi_modal" in name for name in held)
    for name, theirs in TOWER.items():
        np.testing.assert_array_equal(found[theirs][0], held[name].float().numpy(), err_msg=name)
    assert found["v.blk.0.ffn_up.weight"][1] == "BF16"
    assert found["v.patch_embd.weight"][1] == found["v.blk.0.ln2.weight"][1] == "F32"
    reader = gguf.GGUFReader(next(result.out.glob("mmproj*.gguf")))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert (keys["general.architecture"], keys["clip.projector_type"]) == ("clip", "llama4")
    assert keys["clip.vision.projection_dim"] == 128
    assert keys["clip.vision.projector.scale_factor"] == 2
    assert keys["clip.vision.image_mean"] == [0.5, 0.5, 0.5]
    assert any("13282" in text for text in plan.warnings)


def test_an_unquantized_checkpoint_goes_out_too(checkpoint, tmp_path):
    source = checkpoint("scout")
    result = run_export(plan_export(open_source(str(source)), Gguf()), tmp_path / "out")
    fused = weights(source)["language_model.model.layers.1.feed_forward.experts.gate_up_proj"].float()
    found = values_of(result.out)
    np.testing.assert_array_equal(found["blk.1.ffn_up_exps.weight"][0], fused[..., 128:].transpose(1, 2).numpy())
    assert found["blk.1.ffn_down_exps.weight"][1] == "BF16"


def test_microscaling_floats_are_carried(checkpoint, tmp_path):
    artifact = run_plan(quick_plan(checkpoint("scout"), recipe_of(routed_expert="mxfp4")), tmp_path / "artifact").out
    result = run_export(plan_export(open_source(str(artifact)), Gguf()), tmp_path / "out")
    values, kind = values_of(result.out)["blk.3.ffn_down_exps.weight"]
    assert kind == "MXFP4"
    np.testing.assert_array_equal(values, wanted_of(artifact)["blk.3.ffn_down_exps.weight"])
    assert result.proof.rounded == 0


LOST = {
    "nvfp4": ({"routed_expert": "nvfp4"}, "llama.cpp's Llama 4 ignores the global scales of NVFP4"),
    "fp8": ({"routed_expert": "fp8"}, "ggml has no type for FP8"),
    "float32 scales": ({"routed_expert": "int4-float32"}, "Q4_0 does not have all its scales"),
    "int8 with zero points": ({"shared_expert": "int8-asym"}, "no type for integers of 8 bits with a zero point"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_rounded_is_refused_before_anything_is_written(checkpoint, tmp_path, name, l4pack):
    schemes, message = LOST[name]
    artifact = run_plan(quick_plan(checkpoint("scout"), recipe_of(**schemes)), tmp_path / "artifact").out
    ended = l4pack("export", artifact, "--to", "gguf", "--out", tmp_path / "out")
    assert ended.code == 2
    assert message in ended.err
    assert "int4-g32" in ended.err
    assert "--lossy" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact"]
    rounded = json.loads(l4pack("export", artifact, "--to", "gguf", "--out", tmp_path / "out", "--lossy", "--json").out)
    assert rounded["exact"] is False
    assert message in rounded["rounded"][0]["why"]
    assert rounded["proof"]["rounded"] == sum(one["matrices"] for one in rounded["rounded"])
    assert 0 < rounded["proof"]["largest_error"] < 0.05


def test_zero_points_are_carried_where_f16_has_the_minimum(checkpoint, tmp_path):
    artifact = run_plan(
        quick_plan(checkpoint("scout"), recipe_of(shared_expert="int4-asym")), tmp_path / "artifact"
    ).out
    with pytest.raises(UsageError, match="Q4_1 does not have all its scales"):
        plan_export(open_source(str(artifact)), Gguf())
    powers = rewritten(artifact, tmp_path / "powers", lambda scale: torch.exp2(torch.round(torch.log2(scale.float()))))
    result = run_export(plan_export(open_source(str(powers)), Gguf()), tmp_path / "out")
    found, wanted = values_of(result.out), wanted_of(powers)
    values, kind = found["blk.0.ffn_down_shexp.weight"]
    assert kind == "Q4_1"
    np.testing.assert_array_equal(values, wanted["blk.0.ffn_down_shexp.weight"])


def rewritten(artifact, folder, change):
    """A copy whose scales are changed; without its manifest, which would not be true any more."""
    from safetensors.torch import save_file

    shutil.copytree(artifact, folder)
    (folder / "l4pack-manifest.json").unlink()
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors = {
        name: change(one).to(one.dtype) if name.endswith("weight_scale") else one for name, one in tensors.items()
    }
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_a_tiny_scale_is_no_f16_number(exported, tmp_path):
    artifact, _, _ = exported("scout")
    small = rewritten(artifact, tmp_path / "small", lambda scale: scale * 2.0**-12)
    with pytest.raises(UsageError, match="does not have all its scales"):
        plan_export(open_source(str(small)), Gguf())


WRONG = {
    "use_qk_norm": False,
    "no_rope_layers": [1, 0, 1, 0],
    "attention_bias": True,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize("key", WRONG)
def test_a_model_that_llama_cpp_would_answer_wrongly_with_is_refused(exported, tmp_path, key):
    artifact, _, _ = exported("scout")
    folder = shutil.copytree(artifact, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = WRONG[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=key):
        plan_export(open_source(str(folder)), Gguf())


def test_the_released_models_keep_their_context():
    assert context_length(known_config("llama-4-scout")) == 10_485_760
    assert context_length(known_config("llama-4-maverick")) == 1_048_576


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(exported, tmp_path):
    folder = with_merge(exported("scout")[0], tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="splits text by a rule"):
        plan_export(open_source(str(folder)), Gguf())
    (folder / "tokenizer.json").unlink()
    plan = plan_export(open_source(str(folder)), Gguf())
    assert any("takes token ids" in text for text in plan.warnings)


def test_a_killed_export_goes_on_and_ends_in_the_same_bytes(exported, tmp_path, monkeypatch):
    artifact, plan, result = exported("scout")
    monkeypatch.setattr("l4pack.work.threads.SYNC_SECONDS", 0.001)
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            run_export(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = run_export(plan, tmp_path / "out")
    assert file_digests(again.out) == file_digests(result.out)
    assert not (tmp_path / "out.partial").exists()
    assert run_export(plan, tmp_path / "out").proof is None
    other = plan_export(open_source(str(artifact)), Gguf(), split=10**5)
    with pytest.raises(UsageError, match="is not this export"):
        run_export(other, tmp_path / "out")


def spoil(folder, plan):
    """Change two bytes of a tensor."""
    place = plan.layout.places["blk.2.ffn_up_exps.weight"]
    with (folder / place.file).open("r+b") as stream:
        stream.seek(place.start + 40)
        stream.write(b"\x55\x55")


def test_a_byte_that_changed_is_found_by_the_proof(exported, tmp_path, monkeypatch):
    _, plan, _ = exported("scout")
    write = ShardWriter.write

    def spoiling(self, name, offset, data):
        write(self, name, offset, data)
        if (name, offset) == ("blk.2.ffn_up_exps.weight", 0):
            spoil(tmp_path / "out.partial" / "files", plan)

    monkeypatch.setattr(ShardWriter, "write", spoiling)
    with pytest.raises(L4packError, match=r"layers\.2\.feed_forward\.experts.*is not in the export as it is"):
        run_export(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_export_left_is_proved_again(exported, tmp_path, monkeypatch):
    _, plan, _ = exported("scout")
    record = Journal.record

    def dying(self, finished=None, **others):
        record(self, finished, **others)
        if any(key.startswith("blk.2.ffn_up_exps.weight 0") for key in finished or ()):
            raise Killed

    monkeypatch.setattr("l4pack.work.threads.SYNC_SECONDS", 0.001)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", dying)
        with pytest.raises(Killed):
            run_export(plan, tmp_path / "out")
    spoil(tmp_path / "out.partial" / "files", plan)
    with pytest.raises(L4packError, match=r"layers\.2\.feed_forward\.experts.*is not in the export as it is") as error:
        run_export(plan, tmp_path / "out")
    assert "--restart" in error.value.hint
    assert run_export(plan, tmp_path / "out", restart=True).proof is not None


def test_parts_are_named_and_filled_as_llama_cpp_does(exported, tmp_path):
    artifact, _, whole = exported("scout")
    plan = plan_export(open_source(str(artifact)), Gguf(), split=200_000)
    out = run_export(plan, tmp_path / "out").out
    parts = sorted(path.name for path in out.glob("tiny*.gguf"))
    count = len(parts)
    assert count > 2
    assert parts == [f"tiny-scout-Q4_0-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    heads = [{name: one.contents() for name, one in gguf.GGUFReader(out / part).fields.items()} for part in parts]
    assert [head["split.no"] for head in heads] == list(range(count))
    assert {head["split.count"] for head in heads} == {count}
    assert {head["split.tensors.count"] for head in heads} == {len(values_of(whole.out, "tiny*.gguf"))}
    assert [("llama4.block_count" in head) for head in heads] == [True] + [False] * (count - 1)
    for name, (values, _) in values_of(whole.out).items():
        np.testing.assert_array_equal(values_of(out)[name][0], values) if name.startswith("blk.3") else None
    assert {path.name: path.stat().st_size for path in out.iterdir()} == plan.files


def test_the_command(exported, tmp_path, l4pack):
    artifact, plan, _ = exported("scout")
    dry: Ended = l4pack("export", artifact, "--to", "gguf", "--out", tmp_path / "out", "--dry-run", "--json")
    record = json.loads(dry.out)
    assert record["artifact_bytes"] == plan.artifact_bytes
    assert record["exact"] is True
    assert not (tmp_path / "out").exists()
    ended = l4pack("export", artifact, "--to", "gguf", "--out", tmp_path / "out")
    assert ended.code == 0
    assert "each is the artifact's" in ended.out
    assert l4pack("export", artifact, "--to", "onnx", "--out", tmp_path / "other").code == 2
