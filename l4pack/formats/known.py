"""The formats there are: adding one is a module like `pack_quantized`, a line here, and `formats/NAME.yaml`."""

from __future__ import annotations

from collections.abc import Mapping

from l4pack.errors import RecipeError
from l4pack.formats.float_quantized import FLOAT_QUANTIZED
from l4pack.formats.format import Format
from l4pack.formats.fp4 import MXFP4_PACK_QUANTIZED, NVFP4_PACK_QUANTIZED
from l4pack.formats.pack_quantized import PACK_QUANTIZED
from l4pack.formats.super_blocks import GGML_Q4_K
from l4pack.quant.suffixes import Suffix

FORMATS = {
    form.name: form for form in (FLOAT_QUANTIZED, PACK_QUANTIZED, NVFP4_PACK_QUANTIZED, MXFP4_PACK_QUANTIZED, GGML_Q4_K)
}


def format_names() -> list[str]:
    """Names of the formats."""
    return sorted(FORMATS)


def load_format(name: str) -> Format:
    """A format by name. Raises RecipeError."""
    if name not in FORMATS:
        raise RecipeError(f"no format is named '{name}'", hint=f"formats: {', '.join(format_names())}")
    return FORMATS[name]


def format_of(dtypes: Mapping[str, str]) -> Format | None:
    """The format that a module's tensors, dtypes by suffix, show it to be in; None for one that is not quantized.

    A plain `weight` tells by its dtype alone, any other name of codes by itself; formats that share it, by their dtypes.
    """
    named = [form for form in FORMATS.values() if form.values.suffix in dtypes]
    right = [form for form in named if form.has_dtypes(dtypes)]
    others = [form for form in named if form.values.suffix is not Suffix.WEIGHT]
    return next(iter(right or others), None)
