"""Blocks quantized by the CPU kernels against the one-number-at-a-time oracle: bytes, slices, strides, errors."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes import SCHEMES, assert_same

from l4pack.quant import codes, cpu
from l4pack.quant import quantize as quantize_module
from l4pack.quant.dequantize import dequantize
from l4pack.quant.floats import round_to_bfloat16, widen
from l4pack.quant.grid import NumberType, ScaleDtype
from l4pack.quant.layout import Layout
from l4pack.quant.qparams import SHRINK
from l4pack.quant.quantize import NonFiniteError, absmax, quantize_block
from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Observer, Scheme, Strategy

SHAPES = [(1, 8), (3, 40), (16, 128), (130, 256), (2, 384)]
NUMPY_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def stored(weight: np.ndarray, dtype: str) -> np.ndarray:
    """float32 weights as a checkpoint holds them."""
    return round_to_bfloat16(weight) if dtype == "BF16" else weight.astype(NUMPY_DTYPES[dtype])


def normal(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def laid_out(source: np.ndarray, layout: Layout) -> np.ndarray:
    """`source` [out, in] as a view into a wider buffer, as one half of a fused tensor is."""
    block = source if layout is Layout.OUT_IN else source.T
    wide = np.zeros((block.shape[0], block.shape[1] * 2 + 3), source.dtype)
    view = wide[:, block.shape[1] : 2 * block.shape[1]]
    view[:] = block
    return view


def run(source: np.ndarray, dtype: str, scheme: Scheme, layout: Layout = Layout.OUT_IN) -> Quantized:
    amax = absmax(source, Layout.OUT_IN, dtype) if scheme.strategy is Strategy.TENSOR else None
    return quantize_block(laid_out(source, layout), layout, dtype, scheme, amax=amax)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_the_oracles(name, shape, dtype):
    scheme = SCHEMES[name]
    if scheme.group_size and shape[1] % scheme.group_size:
        with pytest.raises(ValueError, match="does not divide"):
            run(stored(normal(shape), dtype), dtype, scheme)
        return
    if shape[0] > 100 and dtype != "BF16":
        shape = (33, shape[1])
    source = stored(normal(shape), dtype)
    expected = oracle.quantize(widen(source), scheme, dtype)
    for layout in Layout:
        got = run(source, dtype, scheme, layout)
        if scheme.type is NumberType.FLOAT:
            np.testing.assert_array_equal(got.values, expected.codes)
        else:
            np.testing.assert_array_equal(got.values, oracle.pack(expected.codes, scheme.num_bits))
        np.testing.assert_array_equal(widen(got.scale), expected.scale.reshape(got.scale.shape))
        assert got.scale.dtype == NUMPY_DTYPES[oracle.scale_name(scheme, dtype)]
        assert (got.zero_point is None) == scheme.symmetric
        if got.zero_point is not None:
            half = 2 ** (scheme.num_bits - 1)
            packed = oracle.pack((expected.zero_point + half).T, scheme.num_bits).T
            np.testing.assert_array_equal(got.zero_point, packed)
        np.testing.assert_array_equal(dequantize(got, scheme, *shape), expected.dequantized.astype(np.float32))


def test_scale_shapes_are_those_on_disk():
    source = stored(normal((130, 256)), "BF16")
    shapes = {name: run(source, "BF16", scheme).scale.shape for name, scheme in SCHEMES.items()}
    assert shapes["int4-g128"] == (130, 2)
    assert shapes["int8-channel"] == (130, 1)
    assert shapes["fp8-tensor"] == (1,)
    assert shapes["fp8-block"] == (2, 2)
    asymmetric = run(source, "BF16", SCHEMES["int4-g32-asym"])
    assert asymmetric.values.shape == (130, 32)
    assert asymmetric.zero_point.shape == (17, 8)


@pytest.mark.parametrize("observer", list(Observer))
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("name", SCHEMES)
def test_cutting_rows_changes_no_byte(name, layout, observer, monkeypatch):
    scheme = SCHEMES[name]
    if scheme.strategy is not Strategy.TENSOR:
        scheme = scheme.model_copy(update={"observer": observer})
    source = stored(normal((300, 256)), "BF16")
    amax = absmax(source, Layout.OUT_IN, "BF16") if scheme.strategy is Strategy.TENSOR else None
    whole = quantize_block(laid_out(source, layout), layout, "BF16", scheme, amax=amax)
    monkeypatch.setattr(quantize_module, "PIECE_BYTES", dict.fromkeys(Layout, 1))
    cuts = [0, 128, 256, 300] if scheme.strategy is Strategy.BLOCK else [0, 8, 88, 296, 300]
    parts = [
        quantize_block(laid_out(source[a:b], layout), layout, "BF16", scheme, amax=amax)
        for a, b in itertools.pairwise(cuts)
    ]
    scale = whole.scale if amax is not None else np.concatenate([part.scale for part in parts])
    zero_point = None if whole.zero_point is None else np.concatenate([part.zero_point for part in parts])
    assert_same(whole, Quantized(np.concatenate([part.values for part in parts]), scale, zero_point))


@pytest.mark.parametrize("name", ["int4-g32-asym", "fp8-channel"])
def test_several_tiles_are_as_one(name):
    source = stored(normal((2 * cpu.TILE + 5, 160)), "BF16")
    assert_same(*(run(source, "BF16", SCHEMES[name], layout) for layout in Layout))


def test_threads_change_no_byte():
    scheme = SCHEMES["int4-g32-asym"]
    sources = [stored(normal((64, 1024), seed), "BF16") for seed in range(8)]
    alone = [run(source, "BF16", scheme, Layout.IN_OUT) for source in sources]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda source: run(source, "BF16", scheme, Layout.IN_OUT), sources))
    for a, b in zip(alone, together, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("layout", list(Layout))
def test_awkward_memory_changes_no_byte(layout):
    scheme = SCHEMES["int4-g8"]
    weight = stored(normal((24, 40)), "F32")
    expected = run(weight, "F32", scheme)
    block = weight if layout is Layout.OUT_IN else np.ascontiguousarray(weight.T)
    unaligned = np.frombuffer(b"x" + block.tobytes(), np.uint8)[1:].view(np.float32).reshape(block.shape)
    read_only = block.copy()
    read_only.flags.writeable = False
    for awkward in (
        np.asfortranarray(block),
        block[::-1].copy()[::-1],
        np.repeat(block, 2, axis=1)[:, ::2],
        unaligned,
        read_only,
    ):
        assert_same(expected, quantize_block(awkward, layout, "F32", scheme))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_non_finite_weight_is_refused_with_its_place(dtype, layout, bad, monkeypatch):
    monkeypatch.setattr(quantize_module, "PIECE_BYTES", dict.fromkeys(Layout, 1))
    weight = normal((300, 64))
    weight[271, 13] = bad
    source = stored(np.nan_to_num(weight, nan=0, posinf=0, neginf=0), dtype)
    source[271, 13] = {"BF16": np.float32(bad).view(np.uint32) >> 16}.get(dtype, bad)
    for attempt in (
        lambda: quantize_block(laid_out(source, layout), layout, dtype, SCHEMES["int4-g8"]),
        lambda: absmax(laid_out(source, layout), layout, dtype),
    ):
        with pytest.raises(NonFiniteError, match="output 271, input 13") as caught:
            attempt()
        assert (caught.value.row, caught.value.column) == (271, 13)


def test_negative_nan_is_refused():
    source = stored(normal((4, 8)), "BF16")
    source[2, 5] = 0xFFC1
    with pytest.raises(NonFiniteError):
        quantize_block(source, Layout.OUT_IN, "BF16", SCHEMES["int4-g8"])


@pytest.mark.parametrize(
    ("scheme", "amax", "dtype", "message"),
    [
        ("int4-g128", None, "BF16", "does not divide"),
        ("fp8-tensor", None, "BF16", "amax goes with"),
        ("int4-g8", 1.0, "BF16", "amax goes with"),
        ("fp8-tensor", 1e-6, "BF16", "above amax"),
        ("int4-g8", None, "F32", "must be an array of float32"),
    ],
)
def test_wrong_requests_are_refused(scheme, amax, dtype, message):
    with pytest.raises(ValueError, match=message):
        quantize_block(stored(normal((4, 8)), "BF16"), Layout.OUT_IN, dtype, SCHEMES[scheme], amax=amax)


def test_fp8_codes_of_every_bfloat16_up_to_448_are_torchs():
    import torch

    patterns = np.arange(0x43E1, dtype=np.uint16)  # 0 to 448
    source = np.concatenate([patterns, patterns | 0x8000])
    source = np.pad(source, (0, -len(source) % 8)).reshape(8, -1)
    scheme = SCHEMES["fp8-tensor"]
    expected = torch.from_numpy(source.copy()).view(torch.bfloat16).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    for layout in Layout:
        got = quantize_block(laid_out(source, layout), layout, "BF16", scheme, amax=448.0)
        assert got.scale.tolist() == [1.0]
        np.testing.assert_array_equal(got.values, expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name):
    scheme = SCHEMES[name]
    source = np.zeros((8, 128), np.uint16)
    got = quantize_block(source, Layout.OUT_IN, "BF16", scheme, amax=0.0 if name == "fp8-tensor" else None)
    assert (widen(got.scale) == np.float32(2.0**-126)).all()
    assert not dequantize(got, scheme, 8, 128).any()


def test_float16_scales_stay_finite_and_normal():
    weight = np.array([[3e38] * 8, [1e-30] * 8], np.float32)
    scheme = Scheme(num_bits=4, group_size=8, scale_dtype=ScaleDtype.FLOAT16)
    got = quantize_block(weight, Layout.OUT_IN, "F32", scheme)
    assert got.scale.tolist() == [[65504.0], [2.0**-14]]


finite = st.floats(min_value=-1e4, max_value=1e4, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=48, max_size=48), st.sampled_from(sorted(SCHEMES)), st.sampled_from(list(Layout)))
def test_error_is_at_most_half_a_step(numbers, name, layout):
    scheme = SCHEMES[name].model_copy(update={"scale_dtype": ScaleDtype.FLOAT32})
    if scheme.group_size:
        scheme = scheme.model_copy(update={"group_size": 8})
    weight = np.array(numbers, np.float32).reshape(6, 8)
    got = run(weight, "F32", scheme, layout)
    back = dequantize(got, scheme, *weight.shape)
    scale = np.broadcast_to(widen(got.scale) if got.scale.size > 1 else widen(got.scale).ravel()[0], weight.shape)
    bound = scale / 2
    if scheme.type is NumberType.FLOAT:  # 3 mantissa bits, subnormals 2^-9 apart
        bound = np.maximum(np.abs(weight) / 16, scale * 2.0**-10)
    if name == "int4-meta" or not scheme.symmetric:
        bound = scale  # the largest weight is clipped by one level, or the zero point rounded by half of one
    assert (np.abs(back - weight) <= bound + np.abs(weight) * 2.0**-20).all()


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "fp8-tensor"])
def test_mse_finds_the_best_fraction_of_the_range(name):
    scheme = SCHEMES[name].model_copy(update={"observer": Observer.MSE})
    weight = widen(stored(np.random.default_rng(3).standard_t(4, (9, 256)).astype(np.float32) * 0.02, "BF16"))
    importance = np.random.default_rng(4).random(256).astype(np.float32)
    arranged = oracle.regions(weight.shape, scheme)
    shape = (len(arranged), len(arranged[0]))
    errors = np.zeros((len(SHRINK), *shape))
    for k, fraction in enumerate(SHRINK):
        back = oracle.quantize(weight, scheme, "BF16", np.full(shape, fraction)).dequantized
        squared = (back - weight) ** 2 * importance
        for a, b in np.ndindex(shape):
            errors[k, a, b] = squared[arranged[a][b]].sum()
    for layout in Layout:
        block = laid_out(stored(weight, "BF16"), layout)
        got = quantize_block(block, layout, "BF16", scheme, column_weight=importance)
        squared = (dequantize(got, scheme, *weight.shape) - weight) ** 2 * importance
        for a, b in np.ndindex(shape):
            assert squared[arranged[a][b]].sum() <= errors[:, a, b].min() * (1 + 1e-5)
    if scheme.num_bits == 4:  # or the search would have nothing to find
        assert errors.min(0).sum() < errors[0].sum()


def test_mse_of_a_whole_tensor_is_refused():
    scheme = SCHEMES["fp8-tensor"].model_copy(update={"observer": Observer.MSE})
    with pytest.raises(ValueError, match="'mse'"):
        run(stored(normal((4, 8)), "BF16"), "BF16", scheme)


def test_the_cpu_path_does_not_import_torch():
    code = "import sys, l4pack.quant.quantize, l4pack.quant.dequantize; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch):
    compiled = []

    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: compiled.append(function) or function

    monkeypatch.setattr(codes.numba, "njit", njit)
    assert codes.kernel(len) is len
    assert compiled == [len]
