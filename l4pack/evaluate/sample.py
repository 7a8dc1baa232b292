"""A sample of what an artifact says, beside its original: the same few prompts for every model, in an evaluation's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROMPTS = ("Why is the sky blue?", "Write a Python function that adds two numbers.")
PROMPT_TOKENS = 32  # of one, about, with what the template puts around it
USUAL_TOKENS, FEW_TOKENS = 16, 8  # of an answer: every token reads the weights again
LARGE_BYTES = 20 * 10**9  # of both models' weights
_SHOWN = 1000  # characters of an answer, fewer than an evaluation's record takes


@dataclass(frozen=True)
class Turn:
    """A prompt and what both models said; their answers begin with the `same` text, and go on as each does."""

    prompt: str
    same: str
    artifact: str
    original: str | None


def usual_tokens(weight_bytes: int) -> int:
    """How many tokens `build` asks for unless told, by the bytes of both models' weights."""
    return USUAL_TOKENS if weight_bytes <= LARGE_BYTES else FEW_TOKENS


def turns(record: Mapping[str, Any]) -> list[Turn]:
    """The sample of an evaluation's record; nothing where it has none."""
    return [_turn(one) for one in (record.get("sample") or {}).get("answers", ())]


def _turn(answer: Mapping[str, Any]) -> Turn:
    ours, theirs = answer["artifact"]["text"], (answer.get("original") or {}).get("text")
    same = len(ours) if theirs is None else parting(ours, theirs)
    return Turn(answer["prompt"], ours[:same], ours[same:], None if theirs is None else theirs[same:])


def parting(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements both begin with."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def on_a_line(text: str) -> str:
    """A text as a record holds it: printable, on a line, not too long."""
    plain = "".join(char if char.isprintable() else " " for char in text).strip()
    return plain if len(plain) <= _SHOWN else f"{plain[: _SHOWN - 1]}…"
