"""What a weight matrix is turned into: the numbers of one quantization scheme, and the bytes they cost.

Vocabulary and meaning follow compressed-tensors' `QuantizationArgs`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from l4pack.quant.dtypes import NAMES, FloatName
from l4pack.quant.grid import E2M1, GRIDS, INT4, Grid, NumberType, ScaleDtype


class Strategy(StrEnum):
    """Which weights of a matrix share one scale; `tensor_group`: a group's, over a global one of the whole matrix."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TENSOR_GROUP = "tensor_group"


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


FP4_SCALES = {Strategy.GROUP: ScaleDtype.E8M0, Strategy.TENSOR_GROUP: ScaleDtype.E4M3}
"""What scales of four-bit floats are, by the strategy: MXFP4's and NVFP4's."""

SUPER_BLOCK = 256, 32
"""Columns of a super-block of Q4_K, and of each of its groups."""
HEADER_COLUMNS = 16
"""Columns to a byte of a super-block's scales."""

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

    @model_validator(mode="before")
    @classmethod
    def _four_bit_floats_have_their_scales(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") == NumberType.FLOAT and values.get("num_bits") == 4:
            strategy = values.get("strategy", Strategy.GROUP)
            return {"scale_dtype": FP4_SCALES[strategy], **values} if strategy in FP4_SCALES else values
        return values

    @model_validator(mode="before")
    @classmethod
    def _super_blocks_are_searched_for(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("scale_dtype") == ScaleDtype.Q4_K:
            return {"symmetric": False, "group_size": SUPER_BLOCK[1], "observer": Observer.MSE, **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Scheme:
        _refuse(self.grouped and self.group_size is None, f"strategy '{self.strategy}' needs a group_size")
        _refuse(not self.grouped and self.group_size is not None, "group_size is for 'group' and 'tensor_group'")
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
        if self.grid is E2M1:
            _refuse(not self.symmetric, "FP4 is symmetric")
            _refuse(self.scale_rule is not ScaleRule.FULL_RANGE, "scale_rule 'meta' is for integers")
            _refuse(self.strategy not in FP4_SCALES, "FP4 takes strategy group (MXFP4) or tensor_group (NVFP4)")
            kind = FP4_SCALES[self.strategy]
            _refuse(self.scale_dtype is not kind, f"FP4 by '{self.strategy}' has scales of kind {kind}")
            return self
        _refuse(self.coded_scales, f"scales of kind {self.scale_dtype} are for FP4")
        _refuse(self.strategy is Strategy.TENSOR_GROUP, "strategy 'tensor_group' is for FP4")
        if self.super_blocked:
            found = (self.grid, self.strategy, self.group_size, self.symmetric, self.observer)
            wanted = (INT4, Strategy.GROUP, SUPER_BLOCK[1], False, Observer.MSE)
            _refuse(
                found != wanted,
                "scales of kind q4_k go with int 4, strategy group, group_size 32, asymmetric, observer mse",
            )
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

    @property
    def grouped(self) -> bool:
        """Whether some neighbouring columns share a scale."""
        return self.strategy in (Strategy.GROUP, Strategy.TENSOR_GROUP)

    @property
    def globally_scaled(self) -> bool:
        """Whether a whole matrix has a global scale beside those of its groups."""
        return self.strategy is Strategy.TENSOR_GROUP

    @property
    def coded_scales(self) -> bool:
        """Whether scales are stored as codes of a byte, see `scales`."""
        return self.scale_dtype in (ScaleDtype.E8M0, ScaleDtype.E4M3)

    @property
    def super_blocked(self) -> bool:
        """Whether scales and minima of groups are codes over numbers of a super-block, see `superblocks`."""
        return self.scale_dtype is ScaleDtype.Q4_K

    def column_multiple(self) -> int:
        """A matrix must have input features that are a multiple of this."""
        return SUPER_BLOCK[0] if self.super_blocked else self.group_size or 1

    def scale_float(self, source: FloatName) -> FloatName:
        """The float dtype that scales are stored in, for a matrix whose weights are `source`."""
        return NAMES.get(self.scale_dtype, source)

    @property
    def pack_factor(self) -> int:
        """Codes in one int32 word."""
        return 32 // self.num_bits

    def group_columns(self, in_features: int) -> int:
        """Columns (input features) that share one scale."""
        if self.grouped:
            return self.group_size or in_features
        if self.block_structure is not None:
            return self.block_structure[1]
        return in_features

    @property
    def block_rows(self) -> int:
        """Rows (output features) that share a scale where some neighbouring ones do."""
        return 1 if self.block_structure is None else self.block_structure[0]

    def row_multiple(self) -> int:
        """A matrix may be cut only at output rows that are a multiple of this."""
        if self.block_structure is not None:
            return self.block_rows
        return 1 if self.symmetric or self.super_blocked else self.pack_factor


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)
