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
    if asymmetric. FP8: `values` uint8 E4M3FN codes [out, in]. `scale` is [out, groups] (group), [out, 1] (channel),
    [ceil(out / height), ceil(in / width)] (block) or [1] (tensor); bfloat16 scales are uint16 bit patterns.
    """

    values: NDArray[Any]
    scale: NDArray[Any]
    zero_point: NDArray[np.int32] | None
