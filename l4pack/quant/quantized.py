"""The arrays of a quantized matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Quantized:
    """The arrays of one quantized matrix, or of a slice of its rows, as an artifact stores them.

    Integers: `values` int32 words [out, ceil(in * bits / 32)]; `zero_point` int32 words [ceil(out * bits / 32), groups]
    if asymmetric. FP8: `values` uint8 E4M3FN codes [out, in]. FP4: two E2M1 codes in a byte of `values` [out, in / 2], the
    lower half first; `scale` are uint8 codes, see `scales`; `global_scale` float32 [1] for strategy `tensor_group`. Q4_K: `scale` are
    the 16 bytes of each super-block, uint8 [out, in / 16], see `superblocks`. Else `scale` is [out, groups] (group), [out, 1] (channel),
    [ceil(out / height), ceil(in / width)] (block) or [1] (tensor); bfloat16 scales are uint16 bit patterns.
    """

    values: NDArray[Any]
    scale: NDArray[Any]
    zero_point: NDArray[np.int32] | None
    global_scale: NDArray[np.float32] | None = None

    @property
    def over(self) -> float:
        """What codes of scales are divided by, beside what they mean; 1 where there is no global scale."""
        return 1.0 if self.global_scale is None else float(self.global_scale[0])
