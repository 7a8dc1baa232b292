"""Quantize a block of a weight matrix on the CPU, without torch.

The range of every group comes first, then scales and zero points, then the codes. Both passes over the weights are
Numba kernels (`cpu`), made on pieces of the block that stay in the CPU's caches; what lies between is NumPy on one
number per group. `torch_ops.quantize` gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant import cpu, superblocks
from l4pack.quant.codes import KINDS
from l4pack.quant.dtypes import FloatName
from l4pack.quant.floats import HELD_AS, Float32Array, not_finite, widen
from l4pack.quant.grid import E2M1, E4M3, INT4
from l4pack.quant.layout import Layout
from l4pack.quant.packing import pack_levels, pack_zero_points, packed_columns
from l4pack.quant.qparams import QParams, candidates, halving_sum, least_error, qparams_of_range
from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Observer, Scheme, Strategy

# A piece is read twice. Out x in it stays in the last-level cache; in x out, long runs of each row matter more.
PIECE_BYTES = {Layout.OUT_IN: 4 << 20, Layout.IN_OUT: 20 << 20}
PIECE_ROWS = 128  # pieces are multiples of this, and so of every block height and pack factor


class NonFiniteError(Exception):
    """A weight is infinite or not a number; `row` and `column` are its output and input feature in the block."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__(f"weight at output {row}, input {column} is not finite")
        self.row = row
        self.column = column


@dataclass(frozen=True)
class _Piece:
    """Some output rows of a block as the kernels take it: flat float bit patterns and a row stride in elements."""

    flat: NDArray[Any]
    stride: int
    out_features: int
    in_features: int
    layout: Layout


def quantize_block(
    source: NDArray[Any],
    layout: Layout,
    dtype: FloatName,
    scheme: Scheme,
    *,
    amax: float | None = None,
    column_weight: Float32Array | None = None,
    global_scale: float | None = None,
) -> Quantized:
    """Quantize the output rows of a matrix that `source` holds; the bytes don't depend on how rows were cut.

    `source` is 2-D with the whole input axis: [out, in] or [in, out] by `layout`, uint16 bit patterns for BF16,
    float16 or float32. Its last axis should be contiguous, its rows may have any stride. Blocks are cut only at
    multiples of `scheme.row_multiple()`. `amax`, the largest magnitude of the whole matrix, is needed for strategy
    `tensor` and must be `absmax` of it. `column_weight` (float32 [in], not negative) weights each input feature's
    squared error for observer `mse`: the diagonal of a Hessian; without it every feature counts the same.
    `global_scale` is needed for strategy `tensor_group`, see `scales.global_scale`.

    Raises NonFiniteError for an infinite or NaN weight, ValueError for a group that does not divide the input
    features, or a wrong `amax`, `global_scale` or dtype.
    """
    out_features, in_features = _shape(source, layout)
    check_scheme(in_features, scheme, amax, global_scale)
    if scheme.super_blocked:
        return _super_blocks(source, layout, dtype, column_weight)
    words = packed_columns(in_features, scheme.num_bits)
    packed = np.empty((out_features, words), np.uint32)
    weight = _padded_weight(column_weight, in_features, scheme) if scheme.observer is Observer.MSE else None
    parts: list[QParams] = []
    for start, piece in _pieces(source, layout, dtype):
        ranges = _ranges(piece, scheme.group_columns(in_features), start)
        part = _choose(piece, ranges, scheme, scheme.scale_float(dtype), amax, weight, global_scale or 1.0)
        parts.append(part)
        _encode(piece, scheme, part, packed[start : start + piece.out_features])
    return _assemble(packed, parts, scheme, in_features, global_scale)


def _super_blocks(
    source: NDArray[Any], layout: Layout, dtype: FloatName, column_weight: Float32Array | None
) -> Quantized:
    _, in_features = _shape(source, layout)
    weight = np.ones(in_features, np.float32) if column_weight is None else column_weight.astype(np.float32)
    parts = []
    for start, piece in _pieces(source, layout, dtype):
        _ranges(piece, in_features, start)  # refuses what is not finite
        cut = slice(start, start + piece.out_features)
        block = source[cut] if layout is Layout.OUT_IN else source[:, cut].T
        rows = np.ascontiguousarray(widen(block))
        headers = superblocks.search(rows, weight)
        levels = np.empty(rows.shape, np.int8)
        superblocks.levels_of(rows, *superblocks.values_of(headers), levels)
        parts.append((pack_levels(levels, INT4.bits), headers))
    words, headers = (np.concatenate(made) for made in zip(*parts, strict=True))
    return Quantized(words, headers, None)


def absmax(source: NDArray[Any], layout: Layout, dtype: FloatName) -> float:
    """Largest magnitude of a block [rows, columns] of either layout. Raises NonFiniteError for an infinite or NaN
    weight."""
    _, in_features = _shape(source, layout)
    largest = 0.0
    for start, piece in _pieces(source, layout, dtype):
        low, high = _ranges(piece, in_features, start)
        largest = max(largest, float(-low.min()), float(high.max()))
    return largest


def _shape(source: NDArray[Any], layout: Layout) -> tuple[int, int]:
    """(out_features, in_features)."""
    rows, columns = source.shape
    return (rows, columns) if layout is Layout.OUT_IN else (columns, rows)


def check_scheme(in_features: int, scheme: Scheme, amax: float | None, global_scale: float | None) -> None:
    """Raise ValueError if a matrix of `in_features` inputs can't be quantized so."""
    if in_features % scheme.column_multiple():
        what = "a super-block" if scheme.super_blocked else f"group_size {scheme.group_size}"
        raise ValueError(f"{what} does not divide {in_features} input features")
    if (scheme.strategy is Strategy.TENSOR) != (amax is not None):
        raise ValueError("amax goes with strategy 'tensor'")
    if scheme.globally_scaled != (global_scale is not None):
        raise ValueError("a global scale goes with strategy 'tensor_group'")
    if scheme.strategy is Strategy.TENSOR and scheme.observer is Observer.MSE:
        raise ValueError("observer 'mse' can't choose the scale of a whole tensor from a slice of it")


def _pieces(source: NDArray[Any], layout: Layout, dtype: FloatName) -> Iterator[tuple[int, _Piece]]:
    """Cut a block into pieces of output rows, each with the first of its rows."""
    expected = HELD_AS[dtype]
    if source.dtype != expected:
        raise ValueError(f"{dtype} weights must be an array of {np.dtype(expected)}, not {source.dtype}")
    out_features, in_features = _shape(source, layout)
    fitting = PIECE_BYTES[layout] // max(1, in_features * source.itemsize)
    rows = max(PIECE_ROWS, fitting // PIECE_ROWS * PIECE_ROWS)
    for start in range(0, out_features, rows):
        end = min(out_features, start + rows)
        cut = source[start:end] if layout is Layout.OUT_IN else source[:, start:end]
        flat, stride = _flatten(cut.astype(np.float32) if dtype == "F16" else cut)
        yield start, _Piece(flat, stride, end - start, in_features, layout)


def _flatten(block: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """The read-only memory from a block's first element to its last, as bit patterns, and the row stride."""
    step, itemsize = block.strides[0], block.itemsize
    if block.strides[1] != itemsize or step % itemsize or step < itemsize * block.shape[1] or not block.flags.aligned:
        block = np.ascontiguousarray(block)
        step = block.strides[0]
    stride = step // itemsize
    length = (block.shape[0] - 1) * stride + block.shape[1]
    flat = np.lib.stride_tricks.as_strided(block, (length,), (itemsize,), writeable=False)
    return flat.view(f"u{itemsize}"), stride


def _ranges(piece: _Piece, group: int, start: int) -> tuple[Float32Array, Float32Array]:
    """Smallest and largest value of each group, zero included: float32 [out, groups]."""
    shape = (piece.out_features, -(-piece.in_features // group))
    low_key, high_key = np.empty(shape, np.int32), np.empty(shape, np.int32)
    ranges = cpu.ranges_out_in if piece.layout is Layout.OUT_IN else cpu.ranges_in_out
    ranges(piece.flat, piece.stride, piece.in_features, group, low_key, high_key)
    low = (low_key ^ ((low_key >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    high = high_key.view(np.float32)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise _non_finite(piece, start)
    return low, high


def _non_finite(piece: _Piece, start: int) -> NonFiniteError:
    rows, columns = piece.in_features, piece.out_features
    if piece.layout is Layout.OUT_IN:
        rows, columns = columns, rows
    itemsize = piece.flat.itemsize
    block = np.lib.stride_tricks.as_strided(
        piece.flat, (rows, columns), (piece.stride * itemsize, itemsize), writeable=False
    )
    out_in = block if piece.layout is Layout.OUT_IN else block.T
    row, column = np.argwhere(not_finite(out_in, "BF16" if itemsize == 2 else "F32"))[0]
    return NonFiniteError(start + int(row), int(column))


def _padded_weight(column_weight: Float32Array | None, in_features: int, scheme: Scheme) -> Float32Array:
    """One weight per input feature, with zeros up to whole groups."""
    group = scheme.group_columns(in_features)
    weight = np.zeros(-(-in_features // group) * group, np.float32)
    weight[:in_features] = 1 if column_weight is None else column_weight
    return weight


def _choose(
    piece: _Piece,
    ranges: tuple[Float32Array, Float32Array],
    scheme: Scheme,
    name: FloatName,
    amax: float | None,
    weight: Float32Array | None,
    over: float,
) -> QParams:
    """Scales of a piece in the shape they are stored in, from the ranges [out, groups] of its rows."""
    low, high = ranges
    if amax is not None:
        if max(-low.min(initial=0.0), high.max(initial=0.0)) > amax:
            raise ValueError(f"the block holds a magnitude above amax = {amax}")
        low, high = np.zeros(1, np.float32), np.full(1, amax, np.float32)
    elif scheme.block_structure is not None:
        starts = np.arange(0, len(low), scheme.block_structure[0])
        low, high = np.minimum.reduceat(low, starts, axis=0), np.maximum.reduceat(high, starts, axis=0)
    if weight is None:
        return qparams_of_range(low, high, scheme, name, over)
    tried = candidates(low, high, scheme, name, over)
    return least_error(tried, _errors(piece, tried, scheme, weight))


def _errors(piece: _Piece, tried: QParams, scheme: Scheme, weight: Float32Array) -> Float32Array:
    """Squared error of each group or block under each candidate of `tried`, in the shape of its scales."""
    group = scheme.group_columns(piece.in_features)
    shape = (piece.out_features, -(-piece.in_features // group), tried.scale.shape[-1])
    errors = np.empty(shape, np.float32)
    scale, zero_point = (spread(values, scheme, shape) for values in (tried.scale, tried.zero_point))
    measure = cpu.errors_out_in if piece.layout is Layout.OUT_IN else cpu.errors_in_out
    kind = KINDS[scheme.grid]
    position = (piece.flat, piece.stride, piece.in_features, group)
    measure(*position, weight, scale, zero_point, scheme.num_bits, kind, errors)
    if scheme.block_structure is None:
        return errors
    height = scheme.block_structure[0]
    blocks = np.zeros((len(tried.scale) * height, *shape[1:]), np.float32)
    blocks[: shape[0]] = errors
    return halving_sum(blocks.reshape(-1, height, *shape[1:]))


def _encode(piece: _Piece, scheme: Scheme, qparams: QParams, packed: NDArray[np.uint32]) -> None:
    group = scheme.group_columns(piece.in_features)
    shape = (piece.out_features, -(-piece.in_features // group))
    scale, zero_point = (spread(values, scheme, shape) for values in (qparams.scale, qparams.zero_point))
    kind = KINDS[scheme.grid]
    arguments = (piece.flat, piece.stride, piece.in_features, group, scale, zero_point, scheme.num_bits, kind)
    if piece.layout is Layout.OUT_IN:
        cpu.encode_out_in(*arguments, packed.view(np.uint8))
    else:
        cpu.encode_in_out(*arguments, packed)


def spread(values: Float32Array, scheme: Scheme, shape: tuple[int, ...]) -> Float32Array:
    """One value per output row and group, `shape` = [out, groups], from the shape a scale is stored in."""
    if scheme.block_structure is not None:
        return np.repeat(values, scheme.block_structure[0], axis=0)[: shape[0]]
    return np.ascontiguousarray(np.broadcast_to(values, shape))


def _assemble(
    packed: NDArray[np.uint32], parts: list[QParams], scheme: Scheme, in_features: int, global_scale: float | None
) -> Quantized:
    scale = parts[0].stored if scheme.strategy is Strategy.TENSOR else np.concatenate([p.stored for p in parts])
    if scheme.grid is E4M3:
        return Quantized(np.ascontiguousarray(packed.view(np.uint8)[:, :in_features]), scale, None)
    if scheme.grid is E2M1:
        over = None if global_scale is None else np.array([global_scale], np.float32)
        return Quantized(packed.view(np.uint8), scale, None, over)
    if scheme.symmetric:
        return Quantized(packed.view(np.int32), scale, None)
    zero_point = np.concatenate([p.zero_point for p in parts])
    return Quantized(packed.view(np.int32), scale, pack_zero_points(zero_point, scheme.num_bits))
