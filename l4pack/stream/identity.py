"""What was taken of a text, as parts of a job's identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_parts(record: Mapping[str, Any], option: str = "--text", samples: str = "--samples") -> dict[str, Any]:
    """By the options that chose it; where the text lies is no part, what it holds is."""
    options = {"sha256": option, "sequences": samples, "sequence_length": "--sequence-length", "seed": "--seed"}
    return {options.get(key, f"{option}: {key}"): value for key, value in record.items() if key != "source"}
