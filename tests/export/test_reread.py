"""The proof by integers says what the gguf library's decoder says, of every type, every code and every changed bit."""

from __future__ import annotations

import numpy as np
import pytest
from exporting import SCHEMES
from gguf import GGMLQuantizationType, dequantize

from l4pack.export.mlx import _by_arithmetic
from l4pack.export.reread import same_codes, same_words
from l4pack.formats.carrier import SolvedRows
from l4pack.formats.ggml import carrier_of
from l4pack.formats.mlx import carrier_of as carrier_of_mlx
from l4pack.quant.floats import round_to_bfloat16
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block
from l4pack.recipe import RecipeScheme

ROWS, COLUMNS = 128, 256
KINDS = {3: (np.uint16, np.uint16), 2: (np.uint8,)}  # of MLX's scales and biases
TYPES = {
    "int4-g32": "Q4_0",
    "int4-g64": "Q4_0",
    "int8-g64": "Q8_0",
    "int8-channel": "Q8_0",
    "mxfp4": "MXFP4",
    "q4_k": "Q4_K",
}


def solved(name):
    """Rows whose codes are all there are, and the carrier of them."""
    scheme = RecipeScheme.model_validate(SCHEMES[name])
    weights = np.random.default_rng(3).standard_normal((ROWS, COLUMNS), np.float32)
    weights[:, ::7] *= 3
    rows = SolvedRows(quantize_block(round_to_bfloat16(weights), Layout.OUT_IN, "BF16", scheme), scheme, COLUMNS)
    return rows, carrier_of(scheme, COLUMNS)


@pytest.mark.parametrize("name", TYPES)
def test_a_changed_bit_is_told_as_the_decoder_tells_it(name):
    rows, carrier = solved(name)
    (raw,) = carrier.encode(rows)
    kind = GGMLQuantizationType[TYPES[name]]
    right = dequantize(raw, kind)
    assert same_codes(carrier, raw, rows) is True
    for place in range(0, raw.shape[1], 5):
        for bit in range(8):
            wrong = raw.copy()
            wrong[place % ROWS, place] ^= 1 << bit
            with np.errstate(all="ignore"):
                same = np.array_equal(dequantize(wrong, kind).view(np.uint32), right.view(np.uint32))
            found = same_codes(carrier, wrong, rows)
            stricter = name in ("mxfp4", "q4_k") and not found  # E2M1's other zero, scales that change nothing
            assert found is same or stricter, (place, bit)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64", "int8-g64", "int8-channel", "mxfp4"])
def test_of_mlx_too(name):
    """Against its arithmetic, which MLX' own decoder is held to elsewhere."""
    rows, _ = solved(name)
    carrier = carrier_of_mlx(rows.scheme, COLUMNS, "BF16")
    raw = [np.ascontiguousarray(part).view(np.uint8).reshape(ROWS, -1) for part in carrier.encode(rows)]
    assert same_words(carrier, raw, rows) is True

    def values(parts):
        held = [part.view(kind) for part, kind in zip(parts, (np.uint32, *KINDS[len(parts)]), strict=True)]
        with np.errstate(all="ignore"):
            return _by_arithmetic(carrier, *held)

    right = values(raw)
    for number, part in enumerate(raw):
        for place in range(0, part.shape[1], 7):
            for bit in range(8):
                wrong = [one.copy() for one in raw]
                wrong[number][place % ROWS, place] ^= 1 << bit
                found = same_words(carrier, wrong, rows)
                same = np.array_equal(values(wrong).view(np.uint32), right.view(np.uint32))
                assert found is False or found is same, (number, place, bit)


def test_what_mlx_may_round_is_left_to_it():
    for name in ("int4-asym", "int4-float32"):
        rows, _ = solved(name)
        carrier = carrier_of_mlx(rows.scheme, COLUMNS, "BF16")
        raw = [np.ascontiguousarray(part).view(np.uint8).reshape(ROWS, -1) for part in carrier.encode(rows)]
        assert same_words(carrier, raw, rows) is None


def test_other_types_are_left_to_the_decoder():
    rows, carrier = solved("int4-asym")
    assert same_codes(carrier, carrier.encode(rows)[0], rows) is None
