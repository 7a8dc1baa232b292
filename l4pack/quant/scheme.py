"""What a weight matrix is turned into: the numbers of one quantization scheme, and the bytes they cost.

Vocabulary and meaning follow compressed-tensors' `QuantizationArgs`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from l4pack.quant.dtypes import NAMES, FloatName
from l4pack.quant.grid import GRIDS, Grid, NumberType, ScaleDtype


class Strategy(StrEnum):
    """Which weights of a matrix share one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"


class Observer(StrEnum):
    """How the range of a group is chosen: its extremes, or the clip that minimises the squared error."""

    MINMAX = "minmax"
    MSE = "mse"


class ScaleRule(StrEnum):
    """Which level the largest magnitude of a symmetric integer group lands on.

    `full_range`: amax / ((2^bits - 1) / 2), as compressed-tensors does; `meta`: amax / 2^(bits-1), as Meta's own
    int4 code does, which clips positive maxima.
    """

    FULL_RANGE = "full_range"
    META = "meta"


BlockSide = Annotated[int, Field(gt=0, le=65536)]
GroupSize = Annotated[int, Field(gt=0, multiple_of=8, le=1024)]


class Scheme(BaseModel):
    """How the weights of one matrix are quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: Literal[4, 8]
    type: NumberType = NumberType.INT
    strategy: Strategy = Strategy.GROUP
    group_size: GroupSize | None = None
    block_structure: tuple[BlockSide, BlockSide] | None = None
    symmetric: bool = True
    observer: Observer = Observer.MINMAX
    scale_rule: ScaleRule = ScaleRule.FULL_RANGE
    scale_dtype: ScaleDtype = ScaleDtype.SOURCE

    @model_validator(mode="after")
    def _consistent(self) -> Scheme:
        _refuse(self.strategy is Strategy.GROUP and self.group_size is None, "strategy 'group' needs a group_size")
        _refuse(self.strategy is not Strategy.GROUP and self.group_size is not None, "group_size is for 'group'")
        _refuse(
            self.strategy is Strategy.BLOCK and self.block_structure is None,
            "strategy 'block' needs block_structure",
        )
        _refuse(
            self.strategy is not Strategy.BLOCK and self.block_structure is not None,
            "block_structure is for 'block'",
        )
        _refuse(
            self.strategy is Strategy.TENSOR and self.observer is Observer.MSE, "observer 'mse' is for finer strategies"
        )
        _refuse((self.type, self.num_bits) not in GRIDS, "type 'float' means FP8: num_bits must be 8")
        if not self.grid.even:
            _refuse(not self.symmetric, "FP8 is symmetric")
            _refuse(self.strategy is Strategy.GROUP, "FP8 takes strategy tensor, channel or block")
            _refuse(self.scale_rule is not ScaleRule.FULL_RANGE, "scale_rule 'meta' is for integers")
        else:
            _refuse(
                self.strategy not in (Strategy.GROUP, Strategy.CHANNEL),
                "integers take strategy group or channel",
            )
            _refuse(self.scale_rule is ScaleRule.META and not self.symmetric, "scale_rule 'meta' is symmetric")
        return self

    @property
    def grid(self) -> Grid:
        """The numbers that weights are rounded to."""
        return GRIDS[self.type, self.num_bits]

    def scale_float(self, source: FloatName) -> FloatName:
        """The dtype that scales are stored in, for a matrix whose weights are `source`."""
        return source if self.scale_dtype is ScaleDtype.SOURCE else NAMES[self.scale_dtype]

    @property
    def pack_factor(self) -> int:
        """Integer levels in one int32 word."""
        return 32 // self.num_bits

    def group_columns(self, in_features: int) -> int:
        """Columns (input features) that share one scale."""
        if self.strategy is Strategy.GROUP:
            return self.group_size or in_features
        if self.block_structure is not None:
            return self.block_structure[1]
        return in_features

    def row_multiple(self) -> int:
        """A matrix may be cut only at output rows that are a multiple of this."""
        if self.block_structure is not None:
            return self.block_structure[0]
        return 1 if self.symmetric else self.pack_factor


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)
