"""The torch path gives the bytes of the CPU kernels, and compressed-tensors reads both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from schemes import SCHEMES, assert_same

from l4pack.quant import torch_ops
from l4pack.quant.dequantize import dequantize
from l4pack.quant.grid import NumberType, ScaleDtype
from l4pack.quant.layout import Layout
from l4pack.quant.packing import pack_levels, pack_zero_points, unpack_levels, unpack_zero_points
from l4pack.quant.quantize import NonFiniteError, absmax, quantize_block
from l4pack.quant.scheme import Observer, Scheme, Strategy

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHAPE = (136, 256)
KINDS = ["normal", "positive", "huge", "subnormal", "zero groups", "extreme"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are too small to share between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(kind: str, rows: int = SHAPE[0]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, SHAPE[1], generator=generator) * 0.02
    if kind == "huge":
        return (normal * 1e40).clamp(-3.38e38, 3.38e38)
    if kind == "subnormal":
        return normal * 1e-38
    if kind == "zero groups":
        return torch.where(torch.arange(SHAPE[1]) % 64 < 32, 0, normal)
    if kind == "extreme":
        return (normal * torch.exp(20 * torch.randn(normal.shape, generator=generator))).clamp(-3.38e38, 3.38e38)
    return normal.abs() if kind == "positive" else normal


def as_numpy(weight: torch.Tensor) -> np.ndarray:
    return weight.view(torch.uint16).numpy() if weight.dtype is torch.bfloat16 else weight.numpy()


def both(weight: torch.Tensor, dtype: str, scheme: Scheme, importance: torch.Tensor | None = None):
    source = as_numpy(weight)
    amax = absmax(source, Layout.OUT_IN, dtype) if scheme.strategy is Strategy.TENSOR else None
    column_weight = None if importance is None else importance.numpy()
    cpu = quantize_block(source, Layout.OUT_IN, dtype, scheme, amax=amax, column_weight=column_weight)
    return cpu, torch_ops.quantize(weight, scheme, amax=amax, column_weight=importance)


@pytest.mark.parametrize("observer", list(Observer))
@pytest.mark.parametrize("name", SCHEMES)
def test_torch_bytes_are_the_kernels(name, observer):
    scheme = SCHEMES[name]
    if scheme.strategy is not Strategy.TENSOR:
        scheme = scheme.model_copy(update={"observer": observer})
    by_row = scheme.strategy in (Strategy.GROUP, Strategy.CHANNEL)
    for dtype, torch_dtype in TORCH_DTYPES.items():
        kinds = [kind for kind in KINDS if dtype != "F16" or kind not in ("huge", "extreme")]
        blocks = [weights(kind, rows=12) for kind in kinds]
        for block in [torch.cat(blocks)] if by_row else blocks:
            cpu, tensors = both(block.to(torch_dtype), dtype, scheme)
            assert_same(cpu, tensors.to_numpy())
            back = torch_ops.dequantize(tensors, scheme, *block.shape).numpy()
            np.testing.assert_array_equal(back, dequantize(cpu, scheme, *block.shape))


@pytest.mark.parametrize("scale_dtype", ["source", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["int4-g128", "int4-channel-asym", "fp8-block"])
def test_every_scale_dtype_is_the_same_on_torch(name, scale_dtype):
    scheme = SCHEMES[name].model_copy(update={"scale_dtype": ScaleDtype(scale_dtype)})
    for kind in ("normal", "huge", "subnormal"):
        cpu, tensors = both(weights(kind), "F32", scheme)
        assert_same(cpu, tensors.to_numpy())


@pytest.mark.parametrize("name", ["int4-g32-asym", "int8-channel", "fp8-block"])
def test_importance_chooses_the_same_on_torch(name):
    scheme = SCHEMES[name].model_copy(update={"observer": Observer.MSE})
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4
    cpu, tensors = both(weights("normal").bfloat16(), "BF16", scheme, importance)
    assert_same(cpu, tensors.to_numpy())


@pytest.mark.parametrize("block", [(64, 96), (128, 128), (24, 40)])
@pytest.mark.parametrize("observer", list(Observer))
def test_ragged_blocks_are_the_same_on_torch(block, observer):
    scheme = Scheme(num_bits=8, type="float", strategy="block", block_structure=block, observer=observer)
    cpu, tensors = both(weights("normal").bfloat16(), "BF16", scheme)
    assert cpu.scale.shape == (-(-136 // block[0]), -(-256 // block[1]))
    assert_same(cpu, tensors.to_numpy())


@pytest.mark.parametrize("name", SCHEMES)
def test_requantizing_the_result_under_its_scales_changes_nothing(name):
    scheme = SCHEMES[name]
    for kind in ("normal", "positive", "subnormal"):
        weight = weights(kind)
        qparams = torch_ops.choose_qparams(
            weight, scheme, amax=float(weight.abs().max()) if name == "fp8-tensor" else None
        )
        once = torch_ops.encode(weight, scheme, qparams)
        again = torch_ops.encode(torch_ops.dequantize(once, scheme, *SHAPE), scheme, qparams)
        assert torch.equal(once.values, again.values)


def test_an_input_major_tensor_is_passed_as_its_transpose():
    fused = weights("normal").T.contiguous()
    scheme = SCHEMES["int4-g32-asym"]
    assert_same(both(fused.T.contiguous(), "F32", scheme)[0], torch_ops.quantize(fused.T, scheme).to_numpy())


def test_torch_refuses_what_the_kernels_refuse():
    weight = weights("normal")
    with pytest.raises(ValueError, match="does not divide"):
        torch_ops.quantize(weight[:, :40], SCHEMES["int4-g128"])
    with pytest.raises(ValueError, match="above amax"):
        torch_ops.quantize(weight, SCHEMES["fp8-tensor"], amax=1e-3)
    weight[77, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="output 77, input 5"):
        torch_ops.quantize(weight, SCHEMES["int4-g128"])


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (16, 128), (7, 8), (130, 256)], ids=str)
@pytest.mark.parametrize("num_bits", [4, 8])
def test_packing_is_compressed_tensors(num_bits, shape):
    half = 2 ** (num_bits - 1)
    levels = np.random.default_rng(0).integers(-half, half, shape, np.int8)
    for dimension, words in ((1, pack_levels(levels, num_bits)), (0, pack_zero_points(levels, num_bits))):
        expected = pack_to_int32(torch.from_numpy(levels), num_bits, packed_dim=dimension).numpy()
        np.testing.assert_array_equal(words, expected)
        assert words.dtype == np.int32
        unpacked = unpack_from_int32(torch.from_numpy(words), num_bits, torch.Size(shape), packed_dim=dimension)
        np.testing.assert_array_equal(unpacked.numpy(), levels)
    np.testing.assert_array_equal(unpack_levels(pack_levels(levels, num_bits), num_bits, shape[1]), levels)
    np.testing.assert_array_equal(unpack_zero_points(words, num_bits, shape[0]), levels)
    tensors = torch_ops.pack_levels(torch.from_numpy(levels), num_bits)
    np.testing.assert_array_equal(tensors.numpy(), pack_levels(levels, num_bits))
    np.testing.assert_array_equal(torch_ops.unpack_levels(tensors, num_bits, shape[1]).numpy(), levels)


def test_packed_words_are_these():
    levels = np.array([[-8, -7, 0, 7, 1, 2, 3, -1, 5]], np.int8)
    assert [hex(word & 0xFFFFFFFF) for word in pack_levels(levels, 4)[0].tolist()] == ["0x7ba9f810", "0xd"]
    assert [hex(word & 0xFFFFFFFF) for word in pack_levels(levels[:, :4], 8)[0].tolist()] == ["0x87807978"]


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.type is NumberType.INT])
def test_compressed_tensors_decompresses_to_our_weights(name):
    scheme = SCHEMES[name]
    tensors = torch_ops.quantize(weights("normal").bfloat16(), scheme)
    arguments = QuantizationArgs(
        num_bits=scheme.num_bits,
        type="int",
        strategy=scheme.strategy.value,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
    )
    state = {
        "weight_packed": tensors.values,
        "weight_scale": tensors.scale,
        "weight_shape": torch.tensor(SHAPE),
    }
    if tensors.zero_point is not None:
        state["weight_zero_point"] = tensors.zero_point
    theirs = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=[], weights=arguments))["weight"]
    ours = dequantize(tensors.to_numpy(), scheme, *SHAPE)
    assert torch.equal(theirs, torch.from_numpy(ours).bfloat16())
