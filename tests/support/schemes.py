"""Schemes to try, and what it means that two results are the same."""

from __future__ import annotations

import numpy as np

from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Scheme

SCHEMES = {
    "int4-g8": Scheme(num_bits=4, group_size=8),
    "int4-g32-asym": Scheme(num_bits=4, group_size=32, symmetric=False),
    "int4-g128": Scheme(num_bits=4, group_size=128),
    "int4-meta": Scheme(num_bits=4, group_size=32, scale_rule="meta"),
    "int4-channel-asym": Scheme(num_bits=4, strategy="channel", symmetric=False),
    "int8-g128-asym": Scheme(num_bits=8, group_size=128, symmetric=False),
    "int8-channel": Scheme(num_bits=8, strategy="channel"),
    "fp8-channel": Scheme(num_bits=8, type="float", strategy="channel"),
    "fp8-tensor": Scheme(num_bits=8, type="float", strategy="tensor", scale_dtype="float32"),
    "fp8-block": Scheme(num_bits=8, type="float", strategy="block", block_structure=(128, 128)),
}


def assert_same(first: Quantized, second: Quantized) -> None:
    for name in ("values", "scale", "zero_point", "global_scale"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=name)
