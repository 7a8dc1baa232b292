"""Four-bit floats: the kernels against the one-number-at-a-time oracle, torch and compressed-tensors' own compressor."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from pydantic import ValidationError
from schemes import assert_same

from l4pack.quant import cpu, torch_ops
from l4pack.quant import quantize as quantize_module
from l4pack.quant.dequantize import dequantize
from l4pack.quant.floats import round_to_bfloat16
from l4pack.quant.grid import E2M1, ScaleDtype
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import absmax, quantize_block
from l4pack.quant.quantized import Quantized
from l4pack.quant.scales import NEIGHBOURS, global_scale
from l4pack.quant.scheme import Observer, Scheme

SCHEMES = {
    "mxfp4": Scheme(num_bits=4, type="float", strategy="group", group_size=32),
    "nvfp4": Scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16),
}
KINDS = ["normal", "heavy", "positive", "subnormal", "zero groups", "spread", "huge"]
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
observers = pytest.mark.parametrize("observer", list(Observer))


def weights(kind: str, shape: tuple[int, int] = (24, 128)) -> np.ndarray:
    """bfloat16 numbers as float32 [out, in]."""
    random = np.random.default_rng(7)
    values = random.standard_normal(shape) * 0.02
    if kind == "heavy":
        values = random.standard_t(3, shape) * 0.02
    elif kind == "positive":
        values = np.abs(values)
    elif kind == "subnormal":
        values = values * 1e-38
    elif kind == "huge":
        values = np.clip(values * 1e40, -3e38, 3e38)
    elif kind == "spread":
        values = values * np.exp(6 * random.standard_normal(shape))
    elif kind == "zero groups":
        values[:, 16:64], values[3] = 0, 0
        values[4, ::2] = -0.0
    return torch.from_numpy(values).bfloat16().float().numpy()


def scale_over(weight: np.ndarray, scheme: Scheme) -> float | None:
    return global_scale(absmax(weight, Layout.OUT_IN, "F32")) if scheme.globally_scaled else None


def made(weight: np.ndarray, scheme: Scheme, importance: np.ndarray | None = None) -> Quantized:
    """What the kernels make of it, the same in either layout and from bfloat16."""
    over = scale_over(weight, scheme)
    found = quantize_block(weight, Layout.OUT_IN, "F32", scheme, global_scale=over, column_weight=importance)
    turned = np.ascontiguousarray(round_to_bfloat16(weight).T)
    other = quantize_block(turned, Layout.IN_OUT, "BF16", scheme, global_scale=over, column_weight=importance)
    assert_same(found, other)
    return found


def packed(codes: np.ndarray) -> np.ndarray:
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


@pytest.mark.parametrize("kind", KINDS)
@schemes
def test_bytes_are_the_oracles(scheme, kind):
    weight = weights(kind)
    expected = oracle.fp4(weight, scheme, scale_over(weight, scheme) or 1.0)
    got = made(weight, scheme)
    np.testing.assert_array_equal(got.values, packed(expected.codes))
    np.testing.assert_array_equal(got.scale, expected.scale)
    np.testing.assert_array_equal(dequantize(got, scheme, *weight.shape), expected.dequantized.astype(np.float32))


def test_numbers_are_rounded_to_the_nearest_and_ties_to_the_even_code():
    halfway = [(low + high) / 2 for low, high in itertools.pairwise(oracle.E2M1)]
    numbers = np.array([*oracle.E2M1, *halfway, *np.nextafter(np.float32(halfway), 0), 7, 1e30], np.float32)
    numbers = np.concatenate([numbers, -numbers])
    expected = [np.copysign(oracle.E2M1[oracle.nearest(abs(float(x)), oracle.E2M1)], x) for x in numbers]
    rounded = torch_ops.nearest(torch.from_numpy(numbers), E2M1)
    assert rounded.tolist() == expected
    words = np.zeros((1, 8), np.uint8)
    row = np.pad(numbers[:16], (0, 0)).view(np.uint32)
    ones, zeros = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    cpu.encode_out_in(row, 16, 16, 16, ones, zeros, 4, 2, words)
    codes = np.stack((words & 15, words >> 4), -1).reshape(-1)
    assert [E2M1.values[code] for code in codes] == expected[:16]


@pytest.mark.parametrize("kind", KINDS)
@observers
@schemes
def test_torch_makes_the_same_bytes(scheme, observer, kind):
    scheme = scheme.model_copy(update={"observer": observer})
    weight = weights(kind)
    importance = np.random.default_rng(1).random(weight.shape[1]).astype(np.float32) ** 4
    cpu_made = made(weight, scheme, importance)
    tensors = torch_ops.quantize(
        torch.from_numpy(weight),
        scheme,
        column_weight=torch.from_numpy(importance),
        global_scale=scale_over(weight, scheme),
    )
    assert_same(cpu_made, tensors.to_numpy())
    back = torch_ops.dequantize(tensors, scheme, *weight.shape).numpy()
    np.testing.assert_array_equal(back, dequantize(cpu_made, scheme, *weight.shape))


@schemes
def test_mse_takes_the_best_neighbouring_scale(scheme):
    weight = weights("heavy")
    importance = np.random.default_rng(4).random(weight.shape[1]).astype(np.float32)
    over, searched = scale_over(weight, scheme), scheme.model_copy(update={"observer": Observer.MSE})
    tried = [oracle.fp4(weight, scheme, over or 1.0, offset) for offset in NEIGHBOURS[scheme.scale_dtype]]
    found = dequantize(made(weight, searched, importance), scheme, *weight.shape)

    def errors(values: np.ndarray) -> np.ndarray:
        return ((values - weight) ** 2 * importance).reshape(len(weight), -1, scheme.group_size).sum(-1)

    best = np.min([errors(reference.dequantized) for reference in tried], axis=0)
    assert (errors(found) <= best * (1 + 1e-5)).all()
    assert errors(found).sum() < 0.97 * errors(tried[0].dequantized).sum()


@observers
@schemes
def test_cutting_rows_changes_no_byte(scheme, observer, monkeypatch):
    scheme = scheme.model_copy(update={"observer": observer})
    weight = weights("normal", (300, 64))
    over, whole = scale_over(weight, scheme), made(weight, scheme)
    monkeypatch.setattr(quantize_module, "PIECE_BYTES", dict.fromkeys(Layout, 1))
    parts = [
        quantize_block(weight[a:b], Layout.OUT_IN, "F32", scheme, global_scale=over)
        for a, b in itertools.pairwise([0, 8, 130, 300])
    ]
    values, scale = (np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "scale"))
    assert_same(whole, Quantized(values, scale, None, whole.global_scale))


def without_signed_zeros(words: np.ndarray) -> np.ndarray:
    """compressed-tensors keeps the sign of zero."""
    low, high = words & 15, words >> 4
    return np.where(low == 8, 0, low) | (np.where(high == 8, 0, high) << 4)


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero groups", "spread"])
@pytest.mark.parametrize("name", SCHEMES)
def test_minmax_is_compressed_tensors_own(name, kind):
    scheme, weight = SCHEMES[name], weights(kind)
    over = scale_over(weight, scheme)
    dtype = torch.uint8 if name == "mxfp4" else torch.float8_e4m3fn
    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy=scheme.strategy.value, group_size=scheme.group_size, scale_dtype=dtype
    )
    given = torch.from_numpy(weight)
    groups, globally = given.reshape(len(weight), -1, scheme.group_size), None if over is None else torch.tensor([over])
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, global_scale=globally)
    state = {"weight": given, "weight_scale": scale} | ({} if globally is None else {"weight_global_scale": globally})
    theirs = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(f"{name}-pack-quantized")
    compressed = compressor.compress(state, theirs)
    got = made(weight, scheme)
    np.testing.assert_array_equal(got.values, without_signed_zeros(compressed["weight_packed"].numpy()))
    np.testing.assert_array_equal(got.scale, compressed["weight_scale"].view(torch.uint8).numpy())
    back = compressor.decompress(compressed, theirs)["weight"]
    assert torch.equal(back.float(), torch.from_numpy(dequantize(got, scheme, *weight.shape)))


def test_weights_are_bfloat16_numbers():
    """A power of two for a global scale leaves at most six significant bits: no runtime rounds the values."""
    scheme, weight = SCHEMES["nvfp4"].model_copy(update={"observer": Observer.MSE}), weights("spread")
    values = torch.from_numpy(dequantize(made(weight, scheme), scheme, *weight.shape))
    assert torch.equal(values, values.bfloat16().float())


@pytest.mark.parametrize("amax", [7e-40, 1e-30, 0.3, 1.0, 448 * 6, 3e38, 0.0])
def test_global_scales_take_the_largest_group_near_the_top(amax):
    over = global_scale(amax)
    assert over == 2.0 ** round(np.log2(over))
    if amax and 2.0**-90 < over < 2.0**90:
        assert 448 / 4 < amax / 6 * over <= 448 / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "channel"}, "FP4 takes strategy"),
        ({"strategy": "group"}, "needs a group_size"),
        ({"group_size": 16, "symmetric": False}, "FP4 is symmetric"),
        ({"group_size": 16, "scale_dtype": "bfloat16"}, "has scales of kind"),
        ({"group_size": 16, "scale_rule": "meta"}, "is for integers"),
        ({"type": "int", "strategy": "tensor_group", "group_size": 16}, "'tensor_group' is for FP4"),
        ({"type": "int", "group_size": 16, "scale_dtype": "float8_e8m0fnu"}, "are for FP4"),
    ],
)
def test_schemes_that_are_none(changes, message):
    with pytest.raises(ValidationError, match=message):
        Scheme(**{"num_bits": 4, "type": "float", **changes})


def test_a_global_scale_goes_with_its_strategy():
    for scheme, over in ((SCHEMES["nvfp4"], None), (SCHEMES["mxfp4"], 2.0)):
        with pytest.raises(ValueError, match="goes with strategy 'tensor_group'"):
            quantize_block(weights("normal"), Layout.OUT_IN, "F32", scheme, global_scale=over)


def test_scale_kinds_follow_from_the_strategy():
    assert SCHEMES["mxfp4"].scale_dtype is ScaleDtype.E8M0
    assert SCHEMES["nvfp4"].scale_dtype is ScaleDtype.E4M3
