"""Budgets of llama.cpp and mlx-lm from files, held against what llama.cpp itself allocates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from l4pack.budget.named import open_subject
from l4pack.checkpoint.writer import ShardWriter
from l4pack.containers.gguf_model import expected_shapes
from l4pack.containers.gguf_text import describe_text
from l4pack.containers.safetensors_folder import SafetensorsFolder
from l4pack.export.target import OutTensor
from l4pack.model.config import known_config, parse_config

GIB, MIB = 1024**3, 1024**2


def sparse_gguf(path, config, kind="Q4_0"):
    """A file with a header of the right size and no weights, as somebody else might have written it."""
    writer, nbytes = GGUFWriter(path, "llama4"), 0
    describe_text(writer, config)
    for name, shape in expected_shapes(config).items():
        dtype = GGMLQuantizationType["F32" if len(shape) == 1 or "gate_inp" in name else kind]
        block, width = GGML_QUANT_SIZES[dtype]
        size = int(np.prod(shape, dtype=object)) // block * width
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=dtype)
        nbytes += GGUFWriter.ggml_pad(size, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as stream:
        stream.truncate(GGUFWriter.ggml_pad(path.stat().st_size, 32) + nbytes)
    return path


@pytest.fixture(scope="module")
def scout(tmp_path_factory):
    return sparse_gguf(tmp_path_factory.mktemp("scout") / "scout-Q4_K_M.gguf", known_config("llama-4-scout"), "Q4_K")


def asked(l4pack, *arguments):
    ended = l4pack("budget", *arguments, "--json")
    assert ended.code in (0, 3), ended.err
    found = json.loads(ended.out)
    found["by_name"] = {line["name"]: line for line in found["lines"]}
    return found


@pytest.mark.parametrize(("sequences", "whole", "buffer"), [(1, 16, 44.53), (2, 16, 28.53)])
def test_caches_and_buffers_are_those_that_llama_cpp_says_it_makes(tmp_path, l4pack, sequences, whole, buffer):
    """llama.cpp (xllamacpp 2026.10.11549) wrote these MiB of the demo's GGUF file, 32,768 tokens in all."""
    text = dict(known_config("llama-4-scout").raw["text_config"])
    text |= {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 512}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    text |= {"num_local_experts": 6, "no_rope_layers": [1, 1, 1, 0], "architectures": ["Llama4ForCausalLM"]}
    path = sparse_gguf(tmp_path / "demo.gguf", parse_config(text))
    options = ("--device", "m4-max-128", "--context", 32768 // sequences, "--sequences", sequences)
    lines = asked(l4pack, path, *map(str, options))["by_name"]
    assert lines["KV cache, whole"]["low_bytes"] == whole * MIB
    assert lines["KV cache, chunks"]["low_bytes"] == 12.75 * MIB * sequences
    assert lines["compute buffer"]["low_bytes"] / MIB == pytest.approx(buffer, rel=0.02)


def test_a_foreign_file_has_a_verdict(scout, l4pack):
    found = asked(l4pack, scout, "--device", "m4-max-128", "--context", "32k")
    assert (found["fits"], found["runtime"]) == (True, "llama.cpp")
    assert found["weight_bytes"] == found["gpu_weight_bytes"]
    assert l4pack("budget", scout, "--device", "rtx4090", "--context", "32k").code == 3


def test_layers_are_split_between_a_gpu_and_the_machine(scout, l4pack):
    """llama.cpp puts the head and the last layers on the GPU, and the token embedding never."""
    all_of_it = asked(l4pack, scout, "--device", "h100", "--context", "32k")
    embedding = 202048 * 5120 // 256 * 144
    assert all_of_it["weight_bytes"] - all_of_it["gpu_weight_bytes"] == embedding == all_of_it["machine_bytes"]
    half = asked(l4pack, scout, "--device", "rtx4090", "--context", "32k", "--gpu-layers", "18")
    assert half["fits"]
    experts = half["by_name"]["routed experts"]["low_bytes"]
    assert experts * 48 == all_of_it["by_name"]["routed experts"]["low_bytes"] * 17
    none = asked(l4pack, scout, "--device", "rtx4090", "--context", "32k", "--gpu-layers", "0")
    assert none["gpu_weight_bytes"] == 0
    assert none["machine_bytes"] > none["weight_bytes"]


def test_what_would_fit_is_named(scout, l4pack):
    changes = asked(l4pack, scout, "--device", "rtx4090", "--context", "32k")["changes"]
    layers = next(one for one in changes if one["option"].startswith("--gpu-layers"))
    asked_again = (scout, "--device", "rtx4090", "--context", "32k", *layers["option"].split())
    assert asked(l4pack, *asked_again)["fits"]
    more = int(layers["option"].split()[1]) + 1
    assert not asked(l4pack, *asked_again[:-1], str(more))["fits"]


def test_several_gpus_share_the_layers(scout, l4pack):
    one, four = (asked(l4pack, scout, "--device", name, "--context", "32k") for name in ("h100", "4xh100"))
    assert four["gpu_weight_bytes"] < 0.3 * one["gpu_weight_bytes"]


def test_keys_and_values_of_eight_bits(scout, l4pack):
    options = (scout, "--device", "h100", "--context", "32k")
    wide, narrow = asked(l4pack, *options), asked(l4pack, *options, "--kv-dtype", "q8_0")
    assert narrow["kv_bytes"] * 32 == wide["kv_bytes"] * 17
    assert "--cache-type-k q8_0" in narrow["serve"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-dtype", "fp8"), "keeps no fp8 KV"),
        (("--gpu-layers", "-1"), "is negative"),
        (("--tp", "2"), "does not split tensors"),
        (("--runtime", "sglang"), "does not load"),
        (("--recipe", "int4"), "is made already"),
    ],
)
def test_what_llama_cpp_does_not_do_is_said(scout, options, message, l4pack):
    ended = l4pack("budget", scout, "--device", "8xh100", *options)
    assert ended.code in (2, 4)
    assert message in ended.err


def test_layers_on_the_gpu_are_llama_cpps(l4pack):
    ended = l4pack("budget", "llama-4-scout", "--recipe", "int4", "--gpu-layers", "3")
    assert ended.code == 2
    assert "--gpu-layers goes with a GGUF file" in ended.err


def mlx_folder(folder: Path) -> Path:
    """Names as mlx-lm has them, of one layer of a tiny model, with its statement of quantization."""
    text = dict(known_config("llama-4-scout").raw["text_config"]) | {"num_hidden_layers": 1, "no_rope_layers": [1]}
    folder.mkdir()
    raw = {"model_type": "llama4", "text_config": text, "quantization": {"group_size": 64, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(raw))
    names = [f"language_model.model.layers.0.feed_forward.experts.{one}_proj.{part}" for one in ("gate", "up", "down")
             for part in ("weight", "scales", "biases")]  # fmt: skip
    names += ["language_model.model.embed_tokens.weight", "language_model.model.layers.0.self_attn.q_proj.scales"]
    tensors = [OutTensor(name, "BF16", (8, 16), 256, 32) for name in names]
    shards, places = SafetensorsFolder("mlx").lay_out([(one,) for one in tensors], 10**9)
    writer = ShardWriter(folder, shards, places)
    for one in tensors:
        writer.write(one.name, 0, np.zeros(256, np.uint8))
    writer.close()
    return folder


def test_a_folder_of_mlx(tmp_path, l4pack):
    folder = mlx_folder(tmp_path / "mlx")
    found = asked(l4pack, folder, "--device", "m4-max-128", "--context", "32k")
    assert (found["runtime"], found["weight_bytes"]) == ("mlx-lm", 11 * 256)
    assert found["by_name"]["routed experts"]["low_bytes"] == 9 * 256
    assert found["by_name"]["KV cache, chunks"]["low_bytes"] == (8192 + 2048) * 2 * 8 * 128 * 2
    assert found["serve"].startswith("mlx_lm.server")
    assert l4pack("budget", folder, "--device", "2xh100").code == 2
    assert open_subject(str(folder)).quantized is False


def test_an_artifact_is_exported_first(tmp_path, l4pack):
    ended = l4pack("budget", "llama-4-scout", "--runtime", "llama.cpp")
    assert ended.code == 2
    assert "l4pack export ARTIFACT --to gguf" in ended.err
