"""Q4_K's super-blocks: the kernels against torch, gguf's own decoder and plain arithmetic, and GPTQ on their grid."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from schemes import assert_same

from l4pack.formats.carrier import SolvedRows
from l4pack.formats.ggml import Q4_K
from l4pack.quant import gptq, gptq_batch, superblocks, torch_ops
from l4pack.quant.dequantize import Dequantizer, dequantize
from l4pack.quant.floats import round_to_bfloat16
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import NonFiniteError, quantize_block
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Rounded

SCHEME = Scheme(num_bits=4, scale_dtype="q4_k")
KINDS = ["normal", "heavy", "positive", "negative", "subnormal", "zero groups", "spread", "huge"]
kinds = pytest.mark.parametrize("kind", KINDS)


def weights(kind="normal", shape=(24, 512)):
    random = np.random.default_rng(11)
    values = random.standard_normal(shape) * 0.02
    if kind == "heavy":
        values = random.standard_t(3, shape) * 0.02
    elif kind in ("positive", "negative"):
        values = np.abs(values) + 0.01
        values = values if kind == "positive" else -values
    elif kind == "subnormal":
        values = values * 1e-6
    elif kind == "huge":
        values = np.clip(values * 1e40, -3e38, 3e38)
    elif kind == "spread":
        values = values * np.exp(4 * random.standard_normal(shape))
    elif kind == "zero groups":
        values[:, 16:64], values[3], values[4, ::2] = 0, 0, -0.0
    return torch.from_numpy(values).bfloat16().float().numpy()


def importance(columns=512):
    weight = np.random.default_rng(12).standard_normal(columns).astype(np.float32) ** 2
    weight[64:97] = 0  # a whole block of dead columns, and one more
    return weight


@kinds
def test_torch_and_kernels_give_the_same_bytes(kind):
    weight, columns = weights(kind), importance()
    made = quantize_block(weight, Layout.OUT_IN, "F32", SCHEME, column_weight=columns)
    on_torch = torch_ops.quantize(torch.from_numpy(weight), SCHEME, column_weight=torch.from_numpy(columns))
    assert_same(made, on_torch.to_numpy())
    values = dequantize(made, SCHEME, *weight.shape)
    np.testing.assert_array_equal(values, torch_ops.dequantize(on_torch, SCHEME, *weight.shape).numpy())
    assert np.isfinite(values).all()


@kinds
def test_gguf_reads_the_same_values_bit_for_bit(kind):
    weight = weights(kind)
    made = quantize_block(weight, Layout.OUT_IN, "F32", SCHEME)
    (block_bytes,) = Q4_K.encode(SolvedRows(made, SCHEME, weight.shape[1]))
    assert block_bytes.shape == (len(weight), Q4_K.parts(weight.shape[1])[0].nbytes)
    theirs = gguf.dequantize(block_bytes, gguf.GGMLQuantizationType.Q4_K)
    ours = dequantize(made, SCHEME, *weight.shape)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_layouts_and_cuts_change_no_bit(dtype):
    weight = weights(shape=(40, 256))
    stored = {"BF16": round_to_bfloat16(weight), "F32": weight, "F16": weight.astype(np.float16)}[dtype]
    whole = quantize_block(stored, Layout.OUT_IN, dtype, SCHEME)
    assert_same(whole, quantize_block(np.ascontiguousarray(stored.T), Layout.IN_OUT, dtype, SCHEME))
    part = quantize_block(stored[8:23], Layout.OUT_IN, dtype, SCHEME)
    np.testing.assert_array_equal(part.values, whole.values[8:23])
    np.testing.assert_array_equal(part.scale, whole.scale[8:23])
    rows = np.empty((15, 256), np.float32)
    Dequantizer(whole, SCHEME, *weight.shape).rows(slice(8, 23), rows)
    np.testing.assert_array_equal(rows, dequantize(part, SCHEME, 15, 256))


def test_levels_are_the_nearest_and_scales_are_where_ggml_has_them():
    weight = weights()
    made = quantize_block(weight, Layout.OUT_IN, "F32", SCHEME)
    scale, minimum = superblocks.values_of(made.scale)
    grid = np.arange(16, dtype=np.float32) * scale[..., None] - minimum[..., None]
    blocks = weight.reshape(*scale.shape, 32)
    nearest = np.abs(blocks[..., None] - grid[..., None, :]).min(-1)
    off = np.abs(blocks - dequantize(made, SCHEME, *weight.shape).reshape(blocks.shape))
    np.testing.assert_allclose(off, nearest, rtol=1e-4, atol=1e-9)
    header = made.scale.reshape(len(weight), -1, 16)[0, 0]
    d, dmin = header[:4].view(np.float16).astype(np.float32)
    codes, minima = _plain_codes(header[4:])
    np.testing.assert_array_equal(scale[0, :8], d * codes)
    np.testing.assert_array_equal(minimum[0, :8], dmin * minima)


def _plain_codes(packed):
    """ggml's `get_scale_min_k4`, one at a time."""
    scales, minima = np.zeros(8, np.float32), np.zeros(8, np.float32)
    for j in range(8):
        if j < 4:
            scales[j], minima[j] = packed[j] & 63, packed[j + 4] & 63
        else:
            scales[j] = (packed[j + 4] & 0xF) | ((packed[j - 4] >> 6) << 4)
            minima[j] = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
    return scales, minima


def test_the_search_is_better_than_the_range_and_minds_the_importance():
    weight, columns = weights("heavy", (64, 512)), importance()

    def error(made):
        off = dequantize(made, SCHEME, *weight.shape) - weight
        return float((off * off * columns).sum())

    minded = error(quantize_block(weight, Layout.OUT_IN, "F32", SCHEME, column_weight=columns))
    assert minded < 0.9 * error(quantize_block(weight, Layout.OUT_IN, "F32", SCHEME))
    ranged = Scheme(num_bits=4, group_size=32, symmetric=False, scale_dtype="float32")
    assert minded < 0.8 * _error_of(weight, ranged, columns)


def _error_of(weight, scheme, columns):
    off = dequantize(quantize_block(weight, Layout.OUT_IN, "F32", scheme), scheme, *weight.shape) - weight
    return float((off * off * columns).sum())


@pytest.mark.parametrize("tokens", [2000, 100])
def test_gptq_solves_on_the_grid(tokens):
    """Through the Hessian, and through few inputs themselves."""
    random = np.random.default_rng(3)
    mixing = random.standard_normal((512, 512)) * (random.random(512) ** 4 + 0.02)
    inputs = torch.from_numpy(random.standard_normal((tokens, 512)) @ mixing).float()
    weight, hessian = torch.from_numpy(weights()), inputs.T @ inputs
    thin = {"inputs": inputs.clone()} if tokens < 512 else {}
    problem = gptq.prepare_problem(hessian, **thin)
    found = gptq.solve_problem(problem, weight, SCHEME, sweeps=4)
    made = Rounded(found.levels, found.scale, found.zero_point.float(), found.headers)
    loss = float(((weight - made.values()) @ inputs.T).double().square().sum())
    assert loss == pytest.approx(found.error, rel=1e-2)
    assert found.error < 0.7 * found.rtn_error
    scale, _ = superblocks.values_of(found.headers.numpy())
    np.testing.assert_array_equal(scale, found.scale.numpy())


def test_several_matrices_at_once_are_each_solved_alike():
    random = np.random.default_rng(4)
    weight = torch.from_numpy(np.stack([weights(), weights("heavy")]))
    inputs = torch.from_numpy(random.standard_normal((2, 700, 512))).float()
    hessian = inputs.mT @ inputs
    alone = [gptq.solve(weight[k], hessian[k], SCHEME, sweeps=2) for k in range(2)]
    problems = gptq_batch.prepare_problems(hessian.clone(), None, torch.full((2,), 0.01), act_order=True, outputs=24)
    together = gptq_batch.solve_problems(problems, weight, SCHEME, sweeps=2)
    for k, one in enumerate(alone):
        np.testing.assert_array_equal(one.headers, together.rounded.headers[k])
        assert (one.levels == together.rounded.levels[k]).float().mean() > 0.99
        assert float(together.loss[k].sum()) == pytest.approx(one.error, rel=1e-2)


def test_what_it_can_not_be():
    for wrong in ({"group_size": 64}, {"symmetric": True}, {"observer": "minmax"}, {"num_bits": 8}):
        with pytest.raises(ValidationError, match="q4_k"):
            Scheme(**{"num_bits": 4, "scale_dtype": "q4_k", **wrong})
    with pytest.raises(ValueError, match="super-block"):
        quantize_block(np.zeros((8, 128), np.float32), Layout.OUT_IN, "F32", SCHEME)
    bad = weights()
    bad[5, 7] = np.nan
    with pytest.raises(NonFiniteError, match="output 5, input 7"):
        quantize_block(bad, Layout.OUT_IN, "F32", SCHEME)
