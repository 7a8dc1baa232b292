"""The numeric core on torch tensors: the readable definition of every number, and the path for CUDA.

`quantize` gives the same bytes as `quantize.quantize_block` on any device: both do the same float32 operations, each
rounded once, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l4pack.quant import torch_superblocks
from l4pack.quant.dtypes import FLOATS, NAMES
from l4pack.quant.grid import E2M1, E4M3, INT4, Grid
from l4pack.quant.packing import packed_columns
from l4pack.quant.qparams import SHRINK, top_level
from l4pack.quant.quantize import NonFiniteError, check_scheme
from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Observer, Scheme
from l4pack.quant.superblocks import ZERO_POINT
from l4pack.quant.torch_scales import Over, coded, codes_of, neighbours, values_of

DTYPES: dict[str, torch.dtype] = {word: getattr(torch, word) for word in NAMES}
"""Torch's float dtypes by the word of configurations, recipes and torch itself."""

_LIMITS = {DTYPES[kind.word]: (kind.smallest, kind.largest) for kind in FLOATS.values()}
_SMALL_FLOATS = {E4M3: torch.float8_e4m3fn}  # grids that torch rounds to by a cast


def to_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor of any shape as NumPy holds it, on the CPU: bfloat16 as uint16 bit patterns."""
    tensor = tensor.cpu()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def from_array(array: NDArray[Any]) -> Tensor:
    """The tensor that `to_array` made an array of; they share memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


@dataclass(frozen=True)
class QuantizedTensors:
    """As `Quantized`, on a device: scales in their own float dtype, FP8 values and scales that are codes as uint8."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: float | None = None

    def to_numpy(self) -> Quantized:
        """The same arrays on the CPU, bfloat16 scales as uint16 bit patterns."""
        zero_point = None if self.zero_point is None else self.zero_point.cpu().numpy()
        over = None if self.global_scale is None else np.array([self.global_scale], np.float32)
        return Quantized(self.values.cpu().numpy(), to_array(self.scale), zero_point, over)


@dataclass(frozen=True)
class ScaleTensors:
    """Scale in its stored dtype (float32 where that is a code, divided by the global scale) and signed float32 zero point,
    both [out or blocks of out, groups] (or [1])."""

    scale: Tensor
    zero_point: Tensor


def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    amax: float | None = None,
    column_weight: Tensor | None = None,
    global_scale: float | None = None,
) -> QuantizedTensors:
    """Quantize output rows of a matrix: `weight` [out, in], bfloat16, float16 or float32, any strides.

    `amax`, `column_weight` [in] and `global_scale`, and the errors raised, are those of `quantize_block`. An in x out tensor is passed
    as its transpose.
    """
    check_scheme(weight.shape[1], scheme, amax, global_scale)
    if scheme.super_blocked:
        return _super_blocks(weight, column_weight)
    qparams = choose_qparams(
        weight, scheme, amax=amax, column_weight=column_weight, over=1.0 if global_scale is None else global_scale
    )
    return encode(weight, scheme, qparams, global_scale)


def _super_blocks(weight: Tensor, column_weight: Tensor | None) -> QuantizedTensors:
    refuse_non_finite(weight)
    importance = torch.ones(weight.shape[1], device=weight.device) if column_weight is None else column_weight
    headers = torch_superblocks.search(weight.float(), importance[None])
    levels = torch_superblocks.levels_of(weight.float().contiguous(), *torch_superblocks.values_of(headers))
    return QuantizedTensors(pack_levels(levels, INT4.bits), headers, None)


def choose_qparams(
    weight: Tensor,
    scheme: Scheme,
    *,
    amax: float | None = None,
    column_weight: Tensor | None = None,
    over: float = 1.0,
) -> ScaleTensors:
    """Scales and zero points of `weight` [out, in], in the shape they are stored in; `over` is the global scale."""
    refuse_non_finite(weight)
    dtype = DTYPES.get(scheme.scale_dtype, weight.dtype)
    groups = _grouped(weight.float(), scheme)
    low, high = _ranges(groups, scheme)
    if amax is not None:
        if max(-low.min().item(), high.max().item()) > amax:
            raise ValueError(f"the block holds a magnitude above amax = {amax}")
        low, high = torch.zeros(1, device=weight.device), torch.full((1,), amax, device=weight.device)
    importance = torch.ones(weight.shape[1], device=weight.device) if column_weight is None else column_weight
    return _observed(groups, importance[None], low, high, scheme, dtype, over)


def group_qparams(weight: Tensor, scheme: Scheme, importance: Tensor, over: Over = 1.0) -> ScaleTensors:
    """As `choose_qparams` for groups in rows, and blocks of them, each row [in] with an `importance` of its own, [out, in]
    too, and a global scale `over`, [out, 1].

    Nothing is asked of the device: a weight that is not finite gives a scale that means nothing.
    """
    groups = _grouped(weight.float(), scheme)
    dtype = DTYPES.get(scheme.scale_dtype, weight.dtype)
    return _observed(groups, importance, *_ranges(groups, scheme), scheme, dtype, over)


def _ranges(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The ends of each group's or block's range, which holds zero: [rows or blocks of them, groups]."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if scheme.block_structure is None:
        return low, high
    return _by_block(low, scheme).amin(1), _by_block(high, scheme).amax(1)


def _observed(
    groups: Tensor, importance: Tensor, low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype, over: Over
) -> ScaleTensors:
    """Scales of ranges by the scheme's observer; `importance` is [rows or 1, in]."""
    candidates = _candidates(low, high, scheme, dtype, over)
    if scheme.observer is Observer.MINMAX:
        return next(candidates)
    return _least_error(groups, _grouped(importance.float(), scheme), candidates, scheme)


def _candidates(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype, over: Over) -> Iterator[ScaleTensors]:
    """See `qparams.candidates`, one after the other: first the scales of the whole ranges."""
    if scheme.coded_scales:
        kind = scheme.scale_dtype
        for codes in neighbours(codes_of(torch.maximum(-low, high), kind, over), kind):
            scale = values_of(codes, kind, over)
            yield ScaleTensors(scale, torch.zeros_like(scale))
        return
    yield _qparams_of_range(low, high, scheme, dtype)
    for fraction in torch.tensor(SHRINK[1:], dtype=torch.float32, device=low.device):
        yield _qparams_of_range(low * fraction, high * fraction, scheme, dtype)


def _least_error(
    groups: Tensor, importance: Tensor, candidates: Iterator[ScaleTensors], scheme: Scheme
) -> ScaleTensors:
    """Of the candidates, the scales with the smallest squared error."""
    best = next(candidates)
    least = _squared_error(groups, importance, best, scheme)
    for tried in candidates:
        error = _squared_error(groups, importance, tried, scheme)
        better = error < least
        least = torch.where(better, error, least)
        best = ScaleTensors(
            torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero_point, best.zero_point)
        )
    return best


def encode(
    weight: Tensor, scheme: Scheme, qparams: ScaleTensors, global_scale: float | None = None
) -> QuantizedTensors:
    """Quantize `weight` [out, in] with given scales and zero points."""
    out_features, in_features = weight.shape
    groups = _grouped(weight.float(), scheme)
    ratio = groups / _spread(qparams.scale.float(), scheme, out_features)
    if scheme.grid in _SMALL_FLOATS:
        codes = _cast(ratio, scheme.grid).view(torch.uint8)
        return QuantizedTensors(codes.flatten(1)[:, :in_features].contiguous(), qparams.scale, None)
    if scheme.grid is E2M1:
        packed = pack_e2m1(nearest(ratio, E2M1).flatten(1))
        scale = coded(qparams.scale, scheme.scale_dtype, global_scale or 1.0)
        return QuantizedTensors(packed, scale, None, global_scale)
    levels = nearest(ratio, scheme.grid, _spread(qparams.zero_point, scheme, out_features))
    packed = pack_levels(levels.flatten(1), scheme.num_bits)
    zero_point = None
    if not scheme.symmetric:
        zero_point = pack_levels(qparams.zero_point.T, scheme.num_bits).T.contiguous()
    return QuantizedTensors(packed, qparams.scale, zero_point)


def dequantize(quantized: QuantizedTensors, scheme: Scheme, out_features: int, in_features: int) -> Tensor:
    """float32 [out, in] of a quantized matrix, on its device."""
    stored = quantized.scale
    if scheme.super_blocked:
        scale, minimum = torch_superblocks.values_of(stored)
        codes = _grouped(unpack_levels(quantized.values, scheme.num_bits, in_features), scheme) - ZERO_POINT
        return codes.mul_(scale[..., None]).sub_(minimum[..., None]).flatten(1)
    if scheme.grid is E2M1:
        scale = values_of(stored, scheme.scale_dtype, quantized.global_scale or 1.0)
        values = _grouped(unpack_e2m1(quantized.values), scheme)
        return (values * _spread(scale, scheme, out_features)).flatten(1)
    scale = _spread(stored.float(), scheme, out_features)
    if scheme.grid in _SMALL_FLOATS:
        values = _grouped(quantized.values.view(_SMALL_FLOATS[scheme.grid]).float(), scheme)
        return (values * scale).flatten(1)[:, :in_features].contiguous()
    levels = _grouped(unpack_levels(quantized.values, scheme.num_bits, in_features), scheme)
    if quantized.zero_point is not None:
        zero_point = unpack_levels(quantized.zero_point.T, scheme.num_bits, out_features).T
        levels = levels - _spread(zero_point, scheme, out_features)
    return (levels * scale).flatten(1)


def pack_levels(levels: Tensor, num_bits: int) -> Tensor:
    """Signed levels [rows, columns] of any dtype as int32 words, like `packing.pack_levels`."""
    columns = levels.shape[1]
    per_word = 32 // num_bits
    codes = levels.to(torch.int32) + 2 ** (num_bits - 1)
    padding = packed_columns(columns, num_bits) * per_word - columns
    codes = torch.nn.functional.pad(codes, (0, padding)).reshape(len(codes), -1, per_word)
    words = codes[..., 0].clone()
    for k in range(1, per_word):
        words |= codes[..., k] << (k * num_bits)
    return words


def unpack_levels(words: Tensor, num_bits: int, columns: int) -> Tensor:
    """The levels [rows, columns] of packed words, as float32."""
    shifts = torch.arange(0, 32, num_bits, device=words.device, dtype=torch.int32)
    codes = (words[..., None] >> shifts) & (2**num_bits - 1)
    levels: Tensor = codes.flatten(1)[:, :columns].float() - 2 ** (num_bits - 1)
    return levels


def pack_e2m1(values: Tensor) -> Tensor:
    """E2M1 numbers [rows, columns], float32, as uint8 [rows, columns / 2]: two codes in a byte, the lower half first."""
    halves = values.abs() * 2
    codes = torch.where(halves < 4, halves, torch.where(halves < 8, halves / 2 + 2, halves / 4 + 4)).to(torch.uint8)
    codes = codes | ((values < 0).to(torch.uint8) << 3)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The float32 numbers [rows, columns] of `pack_e2m1`'s bytes."""
    table = torch.tensor(E2M1.values, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return table[codes.int()]


def refuse_non_finite(weight: Tensor) -> None:
    """Raise NonFiniteError for a number in [out, in] that is infinite or NaN."""
    finite = weight.isfinite()
    if not bool(finite.all()):
        row, column = np.argwhere(~finite.cpu().numpy())[0]
        raise NonFiniteError(int(row), int(column))


def _grouped(matrix: Tensor, scheme: Scheme) -> Tensor:
    """[rows, in] as [rows, groups, columns of a group], filled up with zeros."""
    columns = scheme.group_columns(matrix.shape[1])
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % columns))
    return padded.reshape(len(matrix), -1, columns)


def _by_block(values: Tensor, scheme: Scheme) -> Tensor:
    """[out, groups] as [blocks, rows of a block, groups], filled up with zeros."""
    height = scheme.row_multiple()
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % height))
    return padded.reshape(-1, height, values.shape[1])


def _spread(values: Tensor, scheme: Scheme, out_features: int) -> Tensor:
    """[out or 1, groups or 1, 1] from the shape a scale is stored in."""
    if scheme.block_structure is not None:
        values = values.repeat_interleave(scheme.block_structure[0], dim=0)[:out_features]
    return values.reshape(-1, values.shape[-1], 1)


def _qparams_of_range(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype) -> ScaleTensors:
    """As `qparams.qparams_of_range`."""
    smallest, largest = _LIMITS[dtype]
    if scheme.symmetric:
        scale = (torch.maximum(-low, high) / top_level(scheme)).clamp(smallest, largest).to(dtype)
        return ScaleTensors(scale, torch.zeros_like(scale, dtype=torch.float32))
    lowest, highest = scheme.grid.lowest, scheme.grid.highest
    scale = ((high - low) / (highest - lowest)).clamp(smallest, largest).to(dtype)
    return ScaleTensors(scale, (lowest - low / scale.float()).round().clamp(lowest, highest))


def nearest(ratio: Tensor, grid: Grid, zero_point: Tensor | float = 0.0) -> Tensor:
    """The grid's numbers nearest to float32 value / scale, half to even and its ends beyond them, in the same shape.

    An even grid is shifted by the zero point, which broadcasts; others have none.
    """
    if grid in _SMALL_FLOATS:
        return _cast(ratio, grid).float()
    if grid is E2M1:
        return levels_of(ratio * 2, grid) / 2
    return levels_of(ratio, grid, zero_point)


def levels_of(ratio: Tensor, grid: Grid, zero_point: Tensor | float = 0.0) -> Tensor:
    """The grid's levels, see `Grid.unit`, nearest to value / scale, in the dtype and shape of `ratio`; zero has no sign."""
    if grid in _SMALL_FLOATS:
        return _cast(ratio, grid).to(ratio.dtype) + 0.0
    if grid is not E2M1:
        return (ratio.round() + zero_point).clamp(grid.lowest, grid.highest)
    magnitude = ratio.abs().clamp(max=12)
    apart = 1.0 + (magnitude >= 4).to(ratio.dtype) + 2 * (magnitude >= 8).to(ratio.dtype)
    return (magnitude / apart).round().mul_(apart).copysign_(ratio)


def _cast(ratio: Tensor, grid: Grid) -> Tensor:
    return ratio.clamp(grid.lowest, grid.highest).to(_SMALL_FLOATS[grid])


def _squared_error(groups: Tensor, importance: Tensor, tried: ScaleTensors, scheme: Scheme) -> Tensor:
    """Weighted squared error of each group or block, in the shape of its scale.

    The search rounds weight * (1 / scale), which is faster than a division and differs only at ties.
    """
    scale = _spread(tried.scale.float(), scheme, len(groups))
    ratio = groups * (1 / scale)
    zero_point = _spread(tried.zero_point, scheme, len(groups))
    error = (nearest(ratio, scheme.grid, zero_point) - zero_point) * scale - groups
    total = _halving_sum((error * error) * importance)
    return total if scheme.block_structure is None else _halving_sum(_by_block(total, scheme).transpose(1, 2))


def _halving_sum(terms: Tensor) -> Tensor:
    """Sum over the last axis by adding its upper half onto its lower until one is left."""
    while (count := terms.shape[-1]) > 1:
        half = count // 2
        terms = torch.cat((terms[..., :half] + terms[..., count - half :], terms[..., half : count - half]), dim=-1)
    return terms[..., 0]
