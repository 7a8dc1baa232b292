"""The last part of a tensor's name that tells a quantized matrix's tensors apart, as compressed-tensors calls them."""

from __future__ import annotations

from enum import StrEnum


class Suffix(StrEnum):
    """What a module's tensor is."""

    WEIGHT = "weight"
    PACKED = "weight_packed"
    SCALE = "weight_scale"
    ZERO_POINT = "weight_zero_point"
    SHAPE = "weight_shape"
    ORDER = "weight_g_idx"
    GLOBAL_SCALE = "weight_global_scale"
    INPUT_SCALE = "input_scale"
    INPUT_ZERO_POINT = "input_zero_point"
    INPUT_GLOBAL_SCALE = "input_global_scale"


INPUT_SCALES = (Suffix.INPUT_SCALE, Suffix.INPUT_GLOBAL_SCALE)
"""What a runtime scales a module's inputs by."""
