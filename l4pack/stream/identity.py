"""What was taken of a text, as parts of a job's identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_parts(record: Mapping[str, Any], option: str = "--text", samples: str = "--samples") -> dict[str, Any]:
    """What was taken of a text, as parts of a job's identity; where the text lies is none."""
    options = {
        "sha256": option, "sequences": f"sequences taken ({samples})", "sequence_length": "--sequence-length",
        "seed": "--seed",
    }  # fmt: skip
    return {options.get(key, f"{option}: {key}"): value for key, value in record.items() if key != "source"}
