"""How far a dequantized weight may lie from the source: the kernels against plain NumPy, and where the limits are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch

from l4pack.calibration.mlp import stored
from l4pack.checkpoint.matrices import MatrixBlock
from l4pack.formats.float_quantized import FLOAT_QUANTIZED
from l4pack.model.tensors import Linear, Role
from l4pack.quant.dequantize import scales_of
from l4pack.quant.gptq import solve
from l4pack.quant.grid import E2M1, E4M3
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import absmax, quantize_block, spread
from l4pack.quant.quantized import Quantized
from l4pack.quant.scales import global_scale
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.recipe import Method
from l4pack.verify.checks_kernels import SLACK, STATISTICS, scan, widen_transposed
from l4pack.verify.checks_source import SourceChecks
from l4pack.verify.checks_tensors import Matrix
from l4pack.verify.origin import Made
from l4pack.verify.tally import UnitResult

OUT, IN = 136, 256
SCHEMES = {
    "int4": Scheme(num_bits=4, group_size=128),
    "int4 clipped": Scheme(num_bits=4, group_size=32, observer="mse"),
    "int4 asymmetric": Scheme(num_bits=4, group_size=64, symmetric=False),
    "int4 meta": Scheme(num_bits=4, group_size=128, scale_rule="meta", scale_dtype="float32"),
    "int8": Scheme(num_bits=8, strategy="channel"),
    "mxfp4": Scheme(num_bits=4, type="float", group_size=32),
    "nvfp4": Scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "nvfp4 clipped": Scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, observer="mse"),
    "fp8": Scheme(num_bits=8, type="float", strategy="channel"),
    "fp8 block": Scheme(num_bits=8, type="float", strategy="block", block_structure=(128, 128)),
    "fp8 tensor": Scheme(num_bits=8, type="float", strategy="tensor", scale_dtype="float32"),
}


def weights(seed: int = 0, heavy: bool = True) -> np.ndarray:
    """bfloat16 values with heavy tails, as float32 [OUT, IN]."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(4, (OUT, IN)) if heavy else generator.standard_normal((OUT, IN))
    return torch.from_numpy(values * 0.02).bfloat16().float().numpy()


def bits(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def quantize(values: np.ndarray, scheme: Scheme) -> Quantized:
    block = bits(values)
    amax = absmax(block, Layout.OUT_IN, "BF16") if scheme.strategy is Strategy.TENSOR else None
    return quantize_block(block, Layout.OUT_IN, "BF16", scheme, amax=amax, global_scale=scale_over(values, scheme))


def scale_over(values: np.ndarray, scheme: Scheme) -> float | None:
    return global_scale(float(np.abs(values).max())) if scheme.globally_scaled else None


def rounded(values: np.ndarray, scheme: Scheme) -> oracle.Reference:
    """What plain min-max rounding makes of the values."""
    if scheme.grid is E2M1:
        return oracle.fp4(values, scheme, scale_over(values, scheme) or 1.0)
    return oracle.quantize(values, scheme.model_copy(update={"observer": "minmax"}), "BF16")


def step_below(magnitude: float, scale: float, scheme: Scheme) -> float:
    """How far a stored number of the grid is from the next one towards zero."""
    if scheme.grid is E2M1:
        number = oracle.nearest(magnitude / scale, oracle.E2M1)
        return scale * (oracle.E2M1[number] - oracle.E2M1[number - 1] if number else 0.5)
    return max(magnitude / 8, scale * 2**-9) if scheme.grid is E4M3 else scale


def verdict(
    values: np.ndarray,
    stored: Quantized,
    scheme: Scheme,
    *,
    method: Method | None = None,
    turned: bool = False,
) -> UnitResult:
    linear = Linear("layers.0.m", Role.ROUTED_EXPERT, 0, 0, "gate_proj", OUT, IN, "t", Layout.OUT_IN)
    block = np.ascontiguousarray(bits(values).T) if turned else bits(values)
    made = None if method is None else Made(SimpleNamespace(method=method), exact=False)  # type: ignore[arg-type]
    checks = SourceChecks(lambda _: made)  # type: ignore[arg-type]
    result = UnitResult()
    source = MatrixBlock(block, Layout.IN_OUT if turned else Layout.OUT_IN, "BF16")
    checks.matrix(Matrix(linear, FLOAT_QUANTIZED, scheme, {}), stored, source, result)
    return result


def messages(result: UnitResult) -> list[str]:
    return [finding.message for finding in result.found]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("turned", [False, True])
def test_statistics_are_those_of_plain_numpy(scheme: Scheme, turned: bool) -> None:
    values = weights()
    arrays = quantize(values, scheme)
    reference = rounded(values, scheme)
    linear = SimpleNamespace(out_features=OUT, in_features=IN, module="m")
    checks = SourceChecks(lambda _: None)  # type: ignore[arg-type]
    block = np.ascontiguousarray(bits(values).T) if turned else bits(values)
    source = MatrixBlock(block, Layout.IN_OUT if turned else Layout.OUT_IN, "BF16")
    statistics = checks._compared(SimpleNamespace(linear=linear, scheme=scheme), arrays, source).rows  # type: ignore[arg-type]
    assert statistics.shape == (OUT, STATISTICS)
    far, error, rtn, squares, products = statistics.T
    assert not far.any()
    exact = values.astype(np.float64)
    np.testing.assert_allclose(squares, (exact**2).sum(1), rtol=1e-5)
    rounding = ((reference.dequantized - exact) ** 2).sum(1)
    if scheme.observer == "minmax":
        np.testing.assert_allclose(error, rounding, rtol=1e-4)
        np.testing.assert_allclose(products, (reference.dequantized * exact).sum(1), rtol=1e-4)
    if scheme.grid is E4M3:  # estimated from the spacing of E4M3, not rounded
        assert 0.8 < rtn.sum() / rounding.sum() < 1.25
    elif scheme.scale_rule == "full_range":
        np.testing.assert_allclose(rtn, rounding, rtol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_largest_error_rounding_can_make_passes_and_a_little_more_does_not(scheme: Scheme) -> None:
    """Move the source, not the artifact: half a step is allowed, a tenth of a step more is not."""
    values = weights(heavy=False)
    arrays = quantize(values, scheme)
    assert not messages(verdict(values, arrays, scheme, method=Method.RTN))
    row, column = 5, 9
    moved = values.copy()
    if scheme.observer != "minmax":
        return
    stored = rounded(values, scheme).dequantized[row, column]
    group = scheme.group_columns(IN)
    scale = spread(scales_of(arrays, scheme), scheme, (OUT, -(-IN // group)))[row, column // group]
    step = step_below(abs(stored), float(scale), scheme)
    moved[row, column] = stored - np.sign(stored or 1) * step * 0.5 * 0.9
    assert not messages(verdict(round_bfloat16(moved), arrays, scheme, method=Method.RTN))
    moved[row, column] = stored - np.sign(stored or 1) * step * 0.5 * SLACK * 1.4
    (message,) = messages(verdict(round_bfloat16(moved), arrays, scheme, method=Method.RTN))
    assert message.startswith("1 of 34,816 weights are more than half a step")


def round_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


WRONG = {
    "rows permuted": lambda w: w[np.random.default_rng(1).permutation(OUT)],
    "columns permuted": lambda w: w[:, np.random.default_rng(1).permutation(IN)],
    "another matrix": lambda w: weights(seed=7),
    "read along the other axis": lambda w: w.T.reshape(OUT, IN),
    "negated": lambda w: -w,
    "zeros": lambda w: w * 0 + np.float32(1e-6),
    "four times as large": lambda w: w * 4,
    "halves exchanged": lambda w: np.roll(w, OUT // 2, 0),
    "ten rows exchanged": lambda w: np.concatenate([w[10:0:-1], w[:1], w[11:]]),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_matrix_fails_even_where_calibration_is_allowed_for(scheme: Scheme, wrong: object) -> None:
    values = weights()
    stored = quantize(round_bfloat16(np.ascontiguousarray(wrong(values))), scheme)  # type: ignore[operator]
    assert messages(verdict(values, stored, scheme))
    assert messages(verdict(values, stored, scheme, method=Method.GPTQ))


def test_eight_bits_may_move_as_far_as_four_where_gptq_made_them() -> None:
    """GPTQ makes up for what earlier matrices lost, which costs four-bit errors whatever this matrix's bits are."""
    scheme, values = SCHEMES["int8"], weights()
    moved = values + 0.15 * values.std() * np.random.default_rng(1).standard_normal(values.shape).astype(np.float32)
    stored = quantize(round_bfloat16(moved), scheme)
    assert not messages(verdict(values, stored, scheme, method=Method.GPTQ))
    assert "not this matrix" in messages(verdict(values, stored, scheme))[0]
    little = quantize(round_bfloat16(values + 0.07 / 0.15 * (moved - values)), scheme)  # 0.07 was seen of real ones
    assert not messages(verdict(values, little, scheme))
    assert messages(verdict(values, little, scheme, method=Method.RTN))
    far = quantize(round_bfloat16(values + 3 * (moved - values)), scheme)
    assert "not this matrix" in messages(verdict(values, far, scheme, method=Method.GPTQ))[0]


@pytest.mark.parametrize("name", ["int4", "int4 clipped", "int4 asymmetric", "mxfp4"])
@pytest.mark.parametrize("tokens", [40, 600])
def test_gptq_passes_as_calibrated_and_not_as_rounded(name: str, tokens: int) -> None:
    """Correlated inputs, few and many: GPTQ moves most weights away from the nearest level."""
    scheme, values = SCHEMES[name], weights(heavy=False)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, 32, generator=generator) @ torch.randn(32, IN, generator=generator)
    inputs += 0.3 * torch.randn(tokens, IN, generator=generator)
    solved = solve(torch.from_numpy(values), inputs.T @ inputs, scheme)
    assert solved.method == "gptq"
    arrays = stored(solved, scheme)
    result = verdict(values, arrays, scheme)
    assert not messages(result)
    assert result.tally.within_half_step == 0
    assert 1 < result.tally.largest_error_ratio < 3
    assert "more than half a step" in messages(verdict(values, arrays, scheme, method=Method.RTN))[0]
    moved = replace(arrays, values=np.roll(arrays.values, 1, axis=0))
    assert messages(verdict(values, moved, scheme))


def test_a_source_of_zeros() -> None:
    scheme, zeros = SCHEMES["int4"], np.zeros((OUT, IN), np.float32)
    assert not messages(verdict(zeros, quantize(zeros, scheme), scheme, method=Method.RTN))
    assert messages(verdict(zeros, quantize(weights(), scheme), scheme)) == [
        "the source is all zeros, the artifact is not"
    ]


def test_values_that_fit_the_levels_exactly_have_no_error() -> None:
    scheme = SCHEMES["int4"]
    levels = np.random.default_rng(0).integers(-7, 8, (OUT, IN))
    levels[:, ::128] = 7
    levels[:, 1::128] = -8
    values = (levels * 0.0625).astype(np.float32)
    assert not messages(verdict(values, quantize(values, scheme), scheme, method=Method.RTN))


@pytest.mark.parametrize(("dtype", "exponent"), [(np.uint16, 0x7F80), (np.uint32, 0x7F800000), (np.uint8, 0x7F)])
def test_scan_counts_what_is_not_finite(dtype: type[np.generic], exponent: int) -> None:
    magnitude = int(np.iinfo(dtype).max) >> 1  # type: ignore[type-var]
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 4001, dtype=dtype, endpoint=True)  # type: ignore
    wanted = sum((int(value) & exponent) == exponent for value in values)
    assert scan(values, exponent, magnitude) == (wanted, True)
    assert scan(np.full(77, magnitude + 1, dtype), exponent, magnitude) == (0, False)  # minus zero is zero


@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (64, 64), (5, 200), (129, 31)])
def test_transposing_widens_every_value(shape: tuple[int, int]) -> None:
    block = np.random.default_rng(0).integers(0, 0x7F80, (shape[0], shape[1] + 9), dtype=np.uint16)[:, 4:-5]
    out = np.empty(shape[::-1], np.float32)
    widen_transposed(block, out)
    np.testing.assert_array_equal(out.view(np.uint32), block.T.astype(np.uint32) << 16)
