"""Checks against the source checkpoint: kept tensors bit for bit, dequantized weights within the scheme's error.

A matrix that was rounded to nearest lies within half a step of the source wherever the source lies in the range of the
scales. One that was calibrated (GPTQ and its kind) does not, so there the whole matrix, and every output row of it, may
be `MAX_RATIO` times as far away as rounding to nearest would be. That still tells a matrix that is transposed, from
another expert, from the wrong half of a fused tensor, or permuted: those are 1.4 times their own length away. GPTQ that
makes up for what earlier matrices lost moves a matrix of eight bits further than that, so where the manifest says that
GPTQ made it, `MAX_MOVE` of its length is allowed: three times what rounding to four bits costs. Where nothing says how it
was made, what rounding to four bits costs, a third of that, is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.matrices import MatrixBlock
from l4pack.checkpoint.reader import Reader
from l4pack.errors import SourceError
from l4pack.model.tensors import Linear, Role
from l4pack.quant.codes import KINDS
from l4pack.quant.dequantize import Dequantizer, scales_of, zero_points_of
from l4pack.quant.dtypes import FloatName
from l4pack.quant.floats import Float32Array, narrowed, widen
from l4pack.quant.layout import Layout
from l4pack.quant.qparams import QParams, qparams_of_range
from l4pack.quant.quantize import NonFiniteError, absmax, quantize_block, spread
from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.recipe import Method
from l4pack.verify.checks_kernels import STATISTICS, compare, group_ranges, widen_transposed
from l4pack.verify.checks_tensors import Matrix
from l4pack.verify.checks_values import fingerprint, is_dead
from l4pack.verify.origin import Made
from l4pack.verify.tally import UnitResult

MAX_RATIO = 3.0
MAX_MOVE = 0.3
MIN_COSINE = 0.9
MIN_ROW_COSINE = 0.5
_ROUNDING = 2.0**-8  # a source that quantizes without error may still be rounded to bfloat16
_ROWS = 64
_STRAY = 0.05  # the largest share of rows that can be damaged in a matrix that was rounded to nearest
# Of slopes (see `_lost_groups`); on solved matrices of trained models they stay within 0.94 and 1.06, and their variance
# within 0.6 and 1.4 of what is expected.
_SLOPE_BELOW, _SLOPE_ABOVE, _SPREAD, _SIGMAS, _WEAK = 0.22, 0.3, 6.0, 8.0, 0.02
_FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class Compared:
    """A matrix beside its source.

    `rows` float64 [out, STATISTICS]. Of each group, float32 [out, groups]: `slopes`, the factor on the source's weights,
    cut to the range of the stored scale, that comes nearest to the stored ones, and `energies`, their sum of squares.
    """

    rows: NDArray[np.float64]
    slopes: Float32Array
    energies: Float32Array

    @classmethod
    def empty(cls, rows: int, groups: int) -> Compared:
        """Room for a matrix."""
        slopes, energies = np.empty((2, rows, groups), np.float32)
        return cls(np.empty((rows, STATISTICS), np.float64), slopes, energies)

    def part(self, start: int, stop: int) -> Compared:
        """Some output rows."""
        return Compared(self.rows[start:stop], self.slopes[start:stop], self.energies[start:stop])


def kept_as(dtype: str) -> tuple[str, ...]:
    """The dtypes that an unquantized tensor of a source may have in an artifact: float32 may be rounded."""
    return ("F32", "BF16", "F16") if dtype == "F32" else (dtype,)


def as_kept(
    reader: Reader, source: TensorEntry, dtype: str, result: UnitResult
) -> Callable[[int, int], NDArray[np.uint8]]:
    """A source tensor's bytes as an artifact keeps them in `dtype`, by the place of the artifact's."""
    if source.dtype == dtype:
        return lambda start, nbytes: reader.span(source.name, start, nbytes)

    def rounded(start: int, nbytes: int) -> NDArray[np.uint8]:
        values: NDArray[Any] = reader.span(source.name, 2 * start, 2 * nbytes).view(np.float32)
        return _narrowed(values, dtype, result).view(np.uint8)

    return rounded


def _narrowed(values: NDArray[Any], dtype: str, result: UnitResult) -> NDArray[Any]:
    rounded = narrowed(values, "F16" if dtype == "F16" else "BF16")
    result.tally.kept_rounded += int((widen(rounded) != values).sum())
    return rounded


class SourceChecks:
    """Holds an artifact's matrices against the source's; one instance serves all threads."""

    def __init__(self, made_by: Callable[[Linear], Made | None]) -> None:
        """`made_by` says how a matrix was made, None where that is not known."""
        self._made_by = made_by

    def plain(self, name: str, mine: NDArray[Any], dtype: str, source: MatrixBlock, result: UnitResult) -> None:
        """An expert that was taken out of a fused tensor and not quantized: the same numbers, turned."""
        result.tally.kept_compared += 1
        theirs = source.out_in
        if dtype != source.dtype and dtype in kept_as(source.dtype):
            theirs = _narrowed(theirs, dtype, result)
        if dtype not in kept_as(source.dtype):
            result.found.error("kept", name, f"is {dtype}, the source is {source.dtype}")
        elif not np.array_equal(mine.view(np.uint8), np.ascontiguousarray(theirs).view(np.uint8)):
            result.found.error("kept", name, "its values differ from the source's")

    def matrix(
        self, matrix: Matrix, stored: Quantized, source: MatrixBlock, result: UnitResult, *, carried: bool = False
    ) -> bool:
        """Hold a quantized matrix against its source; returns whether that explains every byte of it.

        One that may be `carried`, of a source in the same scheme, is right where it stands for the very same numbers.
        """
        module, tally = matrix.linear.module, result.tally
        tally.matrices_compared += 1
        tally.weights_compared += matrix.linear.numel
        if matrix.linear.role is Role.ROUTED_EXPERT:
            some = _some(source)
            result.sources[module] = fingerprint(some, some)
        if is_dead(stored.values, matrix.scheme):
            explained = not source.values.view(f"u{source.values.itemsize}").any()
            if not explained:
                message = "every weight of the matrix has the same code, and the source's are not all zero"
                result.found.error("dead", module, message)
            return explained
        if carried and _same_numbers(matrix, stored, source):
            tally.within_half_step += 1
            tally.recomputed += 1
            return True
        made = self._made_by(matrix.linear)
        method = made.scheme.method if made else None
        wrong = None
        if made is not None and made.exact and method is Method.RTN:
            wrong = unequal_rows(stored, self._again(matrix.linear, made.scheme, source, stored), made.scheme)
            if not wrong.any():
                tally.within_half_step += 1
                tally.recomputed += 1
                return True
        self._bound(matrix, stored, source, wrong, method, result)
        return False

    def _bound(
        self,
        matrix: Matrix,
        stored: Quantized,
        source: MatrixBlock,
        wrong: NDArray[np.bool_] | None,
        method: Method | None,
        result: UnitResult,
    ) -> None:
        """Hold a matrix against what its scheme allows; `wrong` are rows that are not what rounding makes, if known."""
        with np.errstate(all="ignore"):
            compared = self._compared(matrix, stored, source)
            verdict = _verdict(compared, matrix, method)
            if wrong is None and method is None and not verdict.message:
                wrong = self._stray(matrix, stored, source, compared)
        tally = result.tally
        tally.within_half_step += not compared.rows[:, 0].any()
        if verdict.message:
            result.found.error("weights", matrix.linear.module, verdict.message)
        elif wrong is not None:
            count = f"{int(wrong.sum()):,} of {wrong.size:,} output rows"
            first = int(np.flatnonzero(wrong)[0])
            message = f"{count} are not what rounding makes of the source, the first is row {first}"
            result.found.error("weights", matrix.linear.module, message)
        else:
            tally.largest_error_ratio = max(tally.largest_error_ratio, verdict.ratio)

    def _stray(
        self, matrix: Matrix, stored: Quantized, source: MatrixBlock, compared: Compared
    ) -> NDArray[np.bool_] | None:
        """Rows [out] further off than rounding puts them, in a matrix whose others are just what rounding makes.

        Solving moves nearly every row, so a few are damage, whoever made the matrix. None where there are none.
        """
        far = compared.rows[:, 0] > 0
        if not 0 < far.sum() <= max(1, _STRAY * far.size):
            return None
        wrong = unequal_rows(stored, self._again(matrix.linear, matrix.scheme, source, stored), matrix.scheme)
        return wrong if 0 < wrong.sum() <= max(1, _STRAY * wrong.size) else None

    def _again(self, linear: Linear, scheme: Scheme, source: MatrixBlock, made: Quantized) -> Quantized:
        """What rounding to nearest makes of the source, by the code that `quantize` runs.

        Under the global scale that it has: what is merged with it has a part in that, see `merged`.
        """
        try:
            stored = source.values, source.layout, source.dtype
            amax = absmax(*stored) if scheme.strategy is Strategy.TENSOR else None
            return quantize_block(
                *stored, scheme, amax=amax, global_scale=made.over if scheme.globally_scaled else None
            )
        except NonFiniteError as error:
            raise SourceError(f"the source of {linear.module}: {error}", hint="the source is damaged") from error

    def _compared(self, matrix: Matrix, stored: Quantized, source: MatrixBlock) -> Compared:
        linear, scheme = matrix.linear, matrix.scheme
        groups = -(-linear.in_features // scheme.group_columns(linear.in_features))
        compared = Compared.empty(linear.out_features, groups)
        try:
            amax = absmax(source.values, source.layout, source.dtype) if scheme.strategy is Strategy.TENSOR else None
        except NonFiniteError as error:
            raise SourceError(f"the source of {linear.module}: {error}", hint="the source is damaged") from error
        step = math.lcm(_ROWS, scheme.row_multiple())
        # Two buffers for the whole matrix: a fresh array a piece costs more in page faults than the comparison.
        buffers = np.empty((2, min(step, linear.out_features), linear.in_features), np.float32)
        for start in range(0, linear.out_features, step):
            stop = min(start + step, linear.out_features)
            weight, decoded = buffers[:, : stop - start]
            _widen_rows(source, start, stop, weight)
            rtn = _rounding(weight, scheme, source.dtype, amax, stored.over)
            _compare(weight, decoded, _rows(stored, scheme, start, stop), rtn, scheme, compared.part(start, stop))
        return compared


def _same_numbers(matrix: Matrix, stored: Quantized, source: MatrixBlock) -> bool:
    """Whether every weight is the source's, to the bit."""
    size = matrix.linear.out_features, matrix.linear.in_features
    own, step = Dequantizer(stored, matrix.scheme, *size), math.lcm(_ROWS, matrix.scheme.row_multiple())
    for start in range(0, size[0], step):
        stop = min(start + step, size[0])
        mine = np.empty((stop - start, size[1]), np.float32)
        own.rows(slice(start, stop), mine)
        if not np.array_equal(_bits(mine), _bits(source.out_in[start:stop])):
            return False
    return True


def unequal_rows(stored: Quantized, again: Quantized, scheme: Scheme) -> NDArray[np.bool_]:
    """Which output rows differ from those of `again` in any bit of codes, scale or zero point: [out]."""
    wrong: NDArray[np.bool_] = (_bits(stored.values) != _bits(again.values)).any(axis=1)
    mine, theirs = _bits(stored.scale), _bits(again.scale)
    if mine.shape != theirs.shape:
        return np.ones_like(wrong)
    scales = (mine != theirs).reshape(len(mine), -1).any(axis=1)
    if scheme.strategy is Strategy.TENSOR:
        return wrong | bool(scales.any())
    wrong |= np.repeat(scales, scheme.block_rows)[: len(wrong)]
    if stored.zero_point is not None:
        points = (stored.zero_point != again.zero_point).any(axis=1)
        wrong |= np.repeat(points, scheme.pack_factor)[: len(wrong)]
    return wrong


def _some(source: MatrixBlock) -> NDArray[Any]:
    """Enough of a matrix to tell it from any other."""
    rows = max(1, _FINGERPRINT_BYTES // max(1, source.values[:1].nbytes))
    return np.ascontiguousarray(source.values[:rows])


def _widen_rows(source: MatrixBlock, start: int, stop: int, out: Float32Array) -> None:
    """Output rows as float32 into `out` [rows, in]."""
    if source.layout is Layout.OUT_IN or source.dtype == "F16":
        out[:] = widen(source.out_in[start:stop])
    else:
        widen_transposed(source.values[:, start:stop].view(f"u{source.values.itemsize}"), out)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def _rows(stored: Quantized, scheme: Scheme, start: int, stop: int) -> Quantized:
    """Some output rows of a stored matrix."""
    scale, zero_point = stored.scale, stored.zero_point
    if scheme.strategy is not Strategy.TENSOR:
        height = scheme.block_structure[0] if scheme.block_structure else 1
        scale = scale[start // height : -(-stop // height)]
    if zero_point is not None:
        zero_point = zero_point[start // scheme.pack_factor : -(-stop // scheme.pack_factor)]
    return Quantized(stored.values[start:stop], scale, zero_point, stored.global_scale)


def _compare(
    weight: Float32Array,
    stored: Float32Array,
    part: Quantized,
    rtn: QParams,
    scheme: Scheme,
    compared: Compared,
) -> None:
    """Compare some output rows; `stored` is filled with what they dequantize to."""
    rows, columns = weight.shape
    group = scheme.group_columns(columns)
    shape = (rows, -(-columns // group))
    scale = spread(scales_of(part, scheme), scheme, shape)
    zero = zero_points_of(part, scheme, rows)
    if zero is None:
        zero = np.zeros(shape, np.float32)
    Dequantizer(part, scheme, rows, columns).rows(slice(None), stored)
    rtn_scale, rtn_zero = (spread(values, scheme, shape) for values in (rtn.scale, rtn.zero_point))
    rounding = (scale, zero, rtn_scale, rtn_zero)
    into = (compared.rows, compared.slopes, compared.energies)
    compare(weight, stored, group, scheme.num_bits, KINDS[scheme.grid], *rounding, *into)


def _rounding(weight: Float32Array, scheme: Scheme, dtype: FloatName, amax: float | None, over: float) -> QParams:
    """Scales and zero points of min-max rounding to nearest; `over` is the global scale."""
    if amax is not None:
        return qparams_of_range(np.zeros(1, np.float32), np.full(1, amax, np.float32), scheme, dtype)
    group = scheme.group_columns(weight.shape[1])
    shape = (weight.shape[0], -(-weight.shape[1] // group))
    low, high = np.empty(shape, np.float32), np.empty(shape, np.float32)
    group_ranges(weight, group, low, high)
    if scheme.block_structure is not None:
        starts = np.arange(0, shape[0], scheme.block_structure[0])
        low, high = np.minimum.reduceat(low, starts, axis=0), np.maximum.reduceat(high, starts, axis=0)
    return qparams_of_range(low, high, scheme, dtype, over)


@dataclass(frozen=True)
class _Verdict:
    ratio: float  # error over that of rounding to nearest
    message: str = ""


def _verdict(compared: Compared, matrix: Matrix, method: Method | None) -> _Verdict:
    statistics = compared.rows
    far, error, rtn, squares, products = statistics.sum(axis=0)
    if squares == 0:
        return _Verdict(0.0, "" if error == 0 else "the source is all zeros, the artifact is not")
    size, rounding = math.sqrt(error / squares), math.sqrt(rtn / squares)
    stored = error - squares + 2 * products  # |d|^2 = |d - w|^2 - |w|^2 + 2 d w
    cosine = products / math.sqrt(squares * max(stored, 1e-300))
    ratio = size / max(rounding, 1e-12)
    told = f"relative error {size:.3g} (rounding to nearest: {rounding:.3g}), cosine {cosine:.3f}"
    moved = {Method.GPTQ: MAX_MOVE, None: MAX_MOVE / 3}.get(method, 0.0)
    limit = max(MAX_RATIO * rounding + _ROUNDING, moved)
    if not math.isfinite(size) or size > limit:
        return _Verdict(ratio, f"{told}: not this matrix of the source, or its scales are wrong")
    if not far:
        return _Verdict(ratio if rounding else 0.0)
    if method is Method.RTN:
        count = f"{int(far):,} of {matrix.linear.numel:,} weights"
        return _Verdict(ratio, f"{count} are more than half a step from the source; {told}")
    if cosine < MIN_COSINE and size > 1.5 * rounding:
        return _Verdict(ratio, f"{told}: not this matrix of the source, or its scales are wrong")
    return _Verdict(ratio, _lost_rows(statistics) or _lost_groups(compared, matrix.linear.in_features))


def _lost_rows(statistics: NDArray[np.float64]) -> str:
    """Output rows that are not those of the source, in a matrix that is right as a whole."""
    _, error, rtn, squares, products = statistics.T
    stored = np.maximum(error - squares + 2 * products, 1e-300)
    cosine = products / np.sqrt(np.maximum(squares, 1e-300) * stored)
    lost = np.flatnonzero((cosine < MIN_ROW_COSINE) & (error > MAX_RATIO**2 * rtn) & (squares > 0))
    if not lost.size:
        return ""
    return f"{lost.size:,} of {len(statistics):,} output rows are not the source's, the first is row {lost[0]}"


def _lost_groups(compared: Compared, in_features: int) -> str:
    """Groups whose scale is not theirs, in a matrix whose rows are right.

    Rounding errors, however large, hardly lean on the weights: over n weights with relative error r the slope stays
    within a few r / sqrt(n) of 1. A doubled scale makes it 1.7 to 2, a halved one 0.5 to 0.74, a turned sign -1; scales
    of other rows make many slopes a little wrong, which their spread shows.
    """
    size, error = in_features / compared.slopes.shape[1], compared.rows[:, 1].sum() / compared.rows[:, 3].sum()
    expected = error / size  # variance of a slope
    strong = compared.energies >= _WEAK * compared.energies.mean(axis=1, keepdims=True)
    off = np.where(strong & (compared.energies > 0), compared.slopes - 1, 0)
    unsure = _SIGMAS * math.sqrt(expected)
    lost = np.argwhere((off < -max(_SLOPE_BELOW, unsure)) | (off > max(_SLOPE_ABOVE, unsure)))
    if lost.size:
        row, group = lost[0]
        slope = 1 + off[row, group]
        return f"{len(lost):,} of {off.size:,} groups are {slope:.2f} times the source's, the first is group {group} of row {row}"
    squares = (off * off).mean(axis=1)
    if squares.mean() > _SPREAD * expected:
        return f"its scales are not in their places: {math.sqrt(squares.mean()):.1%} off, {math.sqrt(expected):.1%} expected"
    rows = compared.rows[:, 1] / np.maximum(compared.rows[:, 3], 1e-300) / size
    spread = _SPREAD * (1 + _SIGMAS * math.sqrt(2 / off.shape[1]))
    odd = np.flatnonzero(squares > spread * np.maximum(rows, expected))
    if odd.size:
        return f"the scales of {odd.size:,} of {len(off):,} output rows are not theirs, the first is row {odd[0]}"
    return ""
