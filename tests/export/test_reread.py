"""The proof by integers says what the gguf library's decoder says, of every type, every code and every changed bit."""

from __future__ import annotations

import numpy as np
import pytest
from exporting import SCHEMES
from gguf import GGMLQuantizationType, dequantize

from l4pack.export.reread import same_codes
from l4pack.formats.carrier import SolvedRows
from l4pack.formats.ggml import carrier_of
from l4pack.quant.floats import round_to_bfloat16
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block
from l4pack.recipe import RecipeScheme

ROWS, COLUMNS = 128, 256
TYPES = {"int4-g32": "Q4_0", "int4-g64": "Q4_0", "int8-g64": "Q8_0", "int8-channel": "Q8_0", "mxfp4": "MXFP4"}


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
            assert found is same or (name == "mxfp4" and not found), (place, bit)  # E2M1's other zero is told too


def test_other_types_are_left_to_the_decoder():
    rows, carrier = solved("int4-asym")
    assert same_codes(carrier, carrier.encode(rows)[0], rows) is None
