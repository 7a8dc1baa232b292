"""Which text is taken, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

DEMO_TEXT, DEMO_CALIBRATION = "demo", "demo-calibration"
NAMED_SETS = ("wikitext2", "c4", "c4-new")  # optimum.gptq.data
DEFAULT_SAMPLES, DEFAULT_LENGTH = 32, 2048


@dataclass(frozen=True)
class TextChoice:
    """Which text, and how much of it: at most `samples` times `sequence_length` tokens."""

    source: str = DEMO_TEXT
    samples: int = DEFAULT_SAMPLES
    sequence_length: int | None = None  # None: 2048, or the model's context if that is shorter
    seed: int = 0
