"""Adapters that are not to be merged, each refused in one line with exit code 4; and what their merging is, without peft."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from adapters import LAYER, numbers, pair, write

from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.reader import Reader

QUERY = f"{LAYER}self_attn.q_proj"
EXPERTS = f"{LAYER}feed_forward.experts"
SHARED = "language_model.model.layers.0.feed_forward.shared_expert.gate_proj"


@pytest.fixture
def base(checkpoint):
    return checkpoint("scout", intermediate_size=256)


def queries(**options):
    return pair(QUERY, 128, 128, **options)


def refused(l4pack, base, adapter, *says, code=4):
    for command in ("inspect", "plan"):
        ended = l4pack(command, base, "--lora", adapter)
        assert (ended.code, ended.out) == (code, ""), ended
        error, hint = ended.err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        for text in says:
            assert text in ended.err, ended.err


def read(checkpoint, name):
    with Reader(checkpoint.entries, checkpoint.store.path) as reader:
        return torch.from_numpy(reader.tensor(name).view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "activated"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"a_new_thing": {"on": 1}}, "a_new_thing"),
        ({"r": 0}, "r:"),
        ({"r": 10**9}, "r:"),
        ({"r": 8}, "rank of 8"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"rank_pattern": {"(a+)+$": 2}}, "pattern"),
        ({"rank_pattern": {"(": 2}}, "pattern"),
        ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern"),
        ({"base_model_name_or_path": "meta-llama/Llama-4-Maverick-17B-128E-Instruct"}, "Maverick"),
    ],
)  # fmt: skip
def test_a_configuration_that_asks_for_more(config, says, base, tmp_path, l4pack):
    refused(l4pack, base, write(tmp_path / "adapter", queries(), **config), says)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "holds no tensor"),
        (pair(QUERY, 128, 96), "takes [128, 128]"),
        (pair(f"{LAYER}self_attn.nothing", 128, 128), "no place"),
        (pair("base_model.model.vision_model.model.layers.9.self_attn.q_proj", 64, 64), "no place"),
        (pair("base_model.model.language_model.model.layers.77.self_attn.q_proj", 128, 128), "no place"),
        ({f"{QUERY}.lora_A.weight": numbers(4, 128)}, "no counterpart"),
        (queries() | {f"{QUERY}.lora_A.default.weight": numbers(4, 128)}, "two names"),
        (queries() | {f"{QUERY}.lora_magnitude_vector": numbers(128)}, "lora_magnitude_vector"),
        (queries() | {f"{QUERY}.lora_B.bias": numbers(128)}, "lora_B.bias"),
        (queries() | {f"{LAYER}self_attn.weight": numbers(1)}, "no place"),
        (queries() | {f"{LAYER}input_layernorm.weight": numbers(3)}, "input_layernorm"),
        ({name: tensor[None] for name, tensor in queries().items()}, "two axes"),
        (queries() | {f"{QUERY}.lora_A.weight": numbers(3, 128)}, "3 and 4"),
        ({name: tensor.to(torch.float8_e4m3fn) for name, tensor in queries().items()}, "F8_E4M3"),
        (pair(EXPERTS, 512, 99, rank=16), "experts"),
        (pair(EXPERTS, 512, 128, rank=4), "rank of 4 for 4 experts"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong(tensors, says, base, tmp_path, l4pack):
    refused(l4pack, base, write(tmp_path / "adapter", tensors), says)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_numbers_that_are_none(odd, base, tmp_path, l4pack):
    tensors = queries()
    tensors[f"{QUERY}.lora_A.weight"][2, 3] = odd
    adapter = write(tmp_path / "adapter", tensors)
    ended = l4pack("quantize", base, "-r", "int4-rtn", "--out", tmp_path / "out", "--lora", adapter)
    assert ended.code == 4
    assert "of the adapter holds an infinite or NaN number" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_sum_too_large_for_the_model(checkpoint, tmp_path, l4pack):
    base = checkpoint("scout", dtype="float16", intermediate_size=256)
    adapter = write(tmp_path / "adapter", {name: 300 * tensor for name, tensor in queries().items()}, lora_alpha=4e5)
    ended = l4pack("quantize", base, "-r", "int4-rtn", "--out", tmp_path / "out", "--lora", adapter)
    assert ended.code == 4
    assert "too large for F16" in ended.err


def test_files_that_are_no_adapter(base, tmp_path, l4pack):
    adapter = write(tmp_path / "adapter", queries())
    weights = adapter / "adapter_model.safetensors"
    outside = weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(outside)
    refused(l4pack, base, adapter, "link that leaves")
    weights.unlink()
    refused(l4pack, base, adapter, "has no adapter_model.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    refused(l4pack, base, adapter, "a pickle")
    weights.write_bytes(outside.read_bytes()[:-5])
    refused(l4pack, base, adapter, "truncated")
    refused(l4pack, base, weights, "is not a folder")
    (adapter / "adapter_config.json").write_text("[1")
    refused(l4pack, base, adapter, "not JSON")
    refused(l4pack, base, base, "no LoRA adapter")
    refused(l4pack, base, tmp_path / "nowhere", "there is no")


def test_an_adapter_alone_says_how_to_merge_it(base, tmp_path, l4pack):
    adapter = write(tmp_path / "adapter", queries())
    ended = l4pack("plan", adapter)
    assert ended.code == 4
    assert f"--lora {adapter}" in ended.err


def test_a_quantized_model_takes_none(artifact, tmp_path, l4pack):
    adapter = write(tmp_path / "adapter", queries())
    refused(l4pack, artifact("int4-rtn"), adapter, "is quantized")


def test_a_module_is_matched_by_its_full_path(base, tmp_path):
    adapter = write(tmp_path / "adapter", pair("base_model.model.vision_model.model.layers.0.self_attn.q_proj", 64, 64))
    merged = open_source(str(base), lora=[str(adapter)])
    changed = [name for name, entry in merged.entries.items() if entry.derived is not None]
    assert changed == ["vision_model.model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    "path", ["model.layers", "model.language_model.layers", "_orig_mod.language_model.model.layers"]
)
def test_other_prefixes_are_the_same_module(path, base, tmp_path):
    tensors = pair(f"base_model.model.{path}.0.feed_forward.shared_expert.gate_proj", 256, 128)
    merged = open_source(str(base), lora=[str(write(tmp_path / "adapter", tensors))])
    first, second = tensors.values()
    want = (read(open_source(str(base)), f"{SHARED}.weight").float() + second @ first * 2.0).to(torch.bfloat16)
    assert torch.equal(read(merged, f"{SHARED}.weight"), want)


def test_an_expert_of_its_own_in_a_fused_tensor(base, tmp_path):
    tensors = {}
    for number, (projection, shape) in enumerate({"up_proj": (256, 128), "gate_proj": (256, 128)}.items()):
        tensors |= pair(f"{EXPERTS}.2.{projection}", *shape, seed=number)
    merged = open_source(str(base), lora=[str(write(tmp_path / "adapter", tensors))])
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    want = read(open_source(str(base)), name).float()
    for column, projection in ((0, "gate_proj"), (256, "up_proj")):
        first, second = (tensors[f"{EXPERTS}.2.{projection}.lora_{half}.weight"] for half in "AB")
        want[2, :, column : column + 256] += (second @ first * 2.0).T
    assert torch.equal(read(merged, name), want.to(torch.bfloat16))


@pytest.mark.parametrize("swapped", [True, False])
def test_both_ways_that_peft_has_written_fused_experts(swapped, base, tmp_path):
    sides = (128, 512) if swapped else (512, 128)
    tensors = pair(EXPERTS, *sides, rank=16)
    merged = open_source(str(base), lora=[str(write(tmp_path / "adapter", tensors))])
    first, second = tensors.values()
    changes = torch.einsum("ore,eri->eoi", second.reshape(sides[0], 4, 4), first.reshape(4, 4, sides[1])) * 2.0
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    want = read(open_source(str(base)), name).float() + (changes if swapped else changes.transpose(1, 2))
    assert torch.equal(read(merged, name), want.to(torch.bfloat16))


def test_square_experts_need_to_be_told(checkpoint, tmp_path, l4pack):
    base, adapter = (
        checkpoint("scout"),
        write(tmp_path / "adapter", pair(EXPERTS, 128, 128, rank=16), peft_version=None),
    )
    refused(l4pack, base, adapter, "tells their axes apart", "0.19.1")
    shutil.rmtree(adapter)
    write(adapter, pair(EXPERTS, 128, 128, rank=16), peft_version="0.18.0")
    assert l4pack("plan", base, "--lora", adapter).code == 0


def test_an_artifact_is_held_against_what_it_was_made_from(base, tmp_path, l4pack):
    adapter, other = (write(tmp_path / name, queries(seed=seed)) for seed, name in enumerate(("mine", "other")))
    out = tmp_path / "out"
    made = l4pack("quantize", base, "-r", "int4-rtn", "--out", out, "--lora", adapter)
    assert made.code == 0, made.err
    assert f"--lora{adapter}" in "".join(made.out.split())
    again = l4pack("quantize", base, "-r", "int4-rtn", "--out", out, "--lora", other)
    assert again.code == 2, again
    assert l4pack("verify", out, "--against", base, "--lora", adapter).code == 0
    for options in ([], ["--lora", other]):
        assert "--lora mine" in l4pack("verify", out, "--against", base, *options).out
        ended = l4pack("evaluate", out, "--against", base, *options, "--samples", 1, "--sequence-length", 32)
        assert ended.code == 2
        assert "--lora mine" in ended.err
    assert l4pack("verify", out, "--lora", adapter).code == 2
    source = json.loads((out / "l4pack-manifest.json").read_text())["source"]
    assert [one["name"] for one in source["adapters"]] == ["mine"]


def test_two_that_exclude_each_other(base, tmp_path, l4pack):
    norm = {f"{QUERY}.weight": numbers(128, 128)}
    one, two = write(tmp_path / "one", queries()), write(tmp_path / "two", norm)
    ended = l4pack("plan", base, "--lora", one, "--lora", two)
    assert ended.code == 4
    assert "both change" in ended.err
