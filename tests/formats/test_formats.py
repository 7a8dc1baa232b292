"""Formats: the tensors a format file declares are those that compressed-tensors itself writes and reads."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from l4pack.errors import RecipeError
from l4pack.formats.format import Piece
from l4pack.formats.known import format_names, load_format
from l4pack.formats.readers import ReadersFile
from l4pack.quant.scheme import Scheme

NAMES = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float32: "F32",
         torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}  # fmt: skip

INT = [
    {"num_bits": bits, "strategy": "group", "group_size": size, "symmetric": symmetric}
    for bits in (4, 8) for size in (32, 64, 128) for symmetric in (True, False)
]  # fmt: skip
INT += [{"num_bits": 4, "strategy": "channel", "symmetric": symmetric} for symmetric in (True, False)]
FLOAT = [{"num_bits": 8, "type": "float", "strategy": strategy} for strategy in ("channel", "tensor")]
FP4 = {
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}
FLOAT.append({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]})


def test_shipped_formats():
    assert format_names() == [
        "float-quantized", "ggml-q4_k", "mxfp4-pack-quantized", "nvfp4-pack-quantized", "pack-quantized",
    ]  # fmt: skip
    for name in format_names():
        spec = load_format(name)
        assert spec.name == name
        read_by = {"llama.cpp"} if spec.exported else {"vllm", "transformers"}
        assert {reader.runtime for reader in spec.readers} >= read_by


@pytest.mark.parametrize("numbers", [*INT, *FLOAT, *FP4.values()], ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (384, 256)])
def test_the_declared_tensors_are_compressed_tensors_own(numbers, shape):
    name = "float-quantized" if numbers.get("type") == "float" else "pack-quantized"
    name = next((each for each, given in FP4.items() if given == numbers), name)
    out_features, in_features = shape
    scheme = Scheme.model_validate(numbers)
    load_format(name).check_accepts(scheme, "none", "test")
    ours = {
        each.suffix: (each.dtype, each.shape)
        for each in load_format(name).stored(scheme, out_features, in_features, "BF16")
    }
    theirs = _compressed(name, numbers, ours["weight_scale"][1], out_features, in_features)
    assert ours == {key: (NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in theirs.items()}


def _compressed(name, numbers, scale_shape, out_features, in_features):
    """What compressed-tensors makes of a module with this scheme."""
    dtype = {"nvfp4-pack-quantized": torch.float8_e4m3fn, "mxfp4-pack-quantized": torch.uint8}.get(name)
    weights = QuantizationArgs(**numbers, scale_dtype=dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=name)
    state = {
        "weight": torch.randn(out_features, in_features, dtype=torch.bfloat16),
        "weight_scale": torch.ones(scale_shape, dtype=torch.bfloat16),
    }
    if not weights.symmetric:
        state["weight_zero_point"] = torch.zeros(scale_shape, dtype=torch.int8)
    if weights.strategy == "tensor_group":
        state["weight_global_scale"] = torch.ones(1)
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat(name).value)
    return compressor.compress(state, scheme)


@pytest.mark.parametrize(
    ("name", "numbers", "activations", "key"),
    [
        ("pack-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, "none", "type"),
        ("float-quantized", INT[0], "none", "type"),
        ("pack-quantized", {**INT[0], "group_size": 16}, "none", "group_size"),
        ("pack-quantized", INT[0], "dynamic_token", "activations"),
    ],
)
def test_schemes_a_format_cannot_hold(name, numbers, activations, key):
    with pytest.raises(RecipeError, match=rf"here\.{key}: format {name} can't hold") as caught:
        load_format(name).check_accepts(Scheme.model_validate(numbers), activations, "here")
    assert caught.value.hint.startswith("it takes [")


def test_unknown_formats_and_keys():
    with pytest.raises(RecipeError, match="no format is named 'gguf'"):
        load_format("gguf")
    known = load_format("pack-quantized").describe()
    with pytest.raises(ValueError, match="Extra inputs"):
        ReadersFile.model_validate({"readers": known["readers"], "extra": 1})
    with pytest.raises(ValueError, match="not a safetensors dtype"):
        Piece.model_validate({**known["tensors"][0], "holds": "values", "dtype": "I31"})


def test_ragged_shapes_round_up():
    scheme = Scheme.model_validate({**FLOAT[2]})
    stored = load_format("float-quantized").stored(scheme, 200, 130, "F32")
    assert [(each.suffix, each.dtype, each.shape) for each in stored] == [
        ("weight", "F8_E4M3", (200, 130)),
        ("weight_scale", "F32", (2, 2)),
    ]
