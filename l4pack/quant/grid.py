"""Number grids: what a weight, divided by its scale, can be rounded to; and what the scales themselves are.

What tells integers from floats is asked of a `Grid`. Rounding to its nearest number is `torch_ops.nearest`, and spelled out
again in the kernels for speed; tests hold both against the values listed here. Whether a grid is used with a zero point is the
scheme's choice (`Scheme.symmetric`), and only evenly spaced grids can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class NumberType(StrEnum):
    """Integer levels, or floats: E4M3 in eight bits (FP8), E2M1 in four (FP4)."""

    INT = "int"
    FLOAT = "float"


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers that codes of `bits` bits stand for; `values[code]` is a code's, NaN for one that is no number."""

    type: NumberType
    bits: int
    values: tuple[float, ...]

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Every number, ascending, each once."""
        return tuple(sorted({value for value in self.values if not math.isnan(value)}))

    @property
    def lowest(self) -> float:
        """The smallest number."""
        return self.levels[0]

    @property
    def highest(self) -> float:
        """The largest number."""
        return self.levels[-1]

    @cached_property
    def step(self) -> float:
        """What every number is a whole multiple of."""
        return min(abs(level) for level in self.levels if level)

    @property
    def unit(self) -> float:
        """What GPTQ's levels are told in: a step where an int8 then holds them all, else 1, and a level is the number."""
        return self.step if self.highest / self.step <= 127 else 1.0

    @cached_property
    def even(self) -> bool:
        """Whether neighbours are all equally far apart: then zero points shift it."""
        return len({above - below for below, above in zip(self.levels, self.levels[1:], strict=False)}) == 1


def _integers(bits: int) -> Grid:
    """Two's complement; the stored code of a level is the level plus 2^(bits-1), as compressed-tensors packs it."""
    half = 2 ** (bits - 1)
    return Grid(NumberType.INT, bits, tuple(float(level) for level in range(-half, half)))


def _floats(exponent_bits: int, mantissa_bits: int, *, nan: bool) -> Grid:
    """Sign, exponent and mantissa with no infinity; with `nan`, the code with every bit but the sign set is NaN."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    magnitudes = []
    for code in range(steps * 2**exponent_bits):
        exponent, mantissa = divmod(code, steps)
        fraction = mantissa / steps + (exponent > 0)
        magnitudes.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    if nan:
        magnitudes[-1] = math.nan
    return Grid(NumberType.FLOAT, 1 + exponent_bits + mantissa_bits, (*magnitudes, *(-value for value in magnitudes)))


INT4, INT8 = _integers(4), _integers(8)
E4M3 = _floats(4, 3, nan=True)
"""FP8 (E4M3FN; Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433): to 448, subnormals 2^-9 apart."""
E2M1 = _floats(2, 1, nan=False)
"""FP4 (OCP Microscaling Formats 1.0): 0, 0.5, 1, 1.5, 2, 3, 4, 6 of either sign; every code is a number."""

GRIDS = {(grid.type, grid.bits): grid for grid in (INT4, INT8, E4M3, E2M1)}
"""Every grid by what recipes and compressed-tensors call it: `type` and `num_bits`."""


class ScaleDtype(StrEnum):
    """The kind of a scale: a float dtype, where `source` is that of the matrix it was made from.

    Those of four-bit floats are a byte each, see `scales`: powers of two (E8M0, as MXFP4 has them), or E4M3 numbers over
    a global scale that a whole matrix has (NVFP4). Those of Q4_K are 6-bit codes over numbers of a super-block, and so are
    the minima that stand for zero points, see `superblocks`.
    """

    SOURCE = "source"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    E8M0 = "float8_e8m0fnu"
    E4M3 = "float8_e4m3fn"
    Q4_K = "q4_k"
