"""Long context: a sentence with a number hidden in text, and the number asked for at the end, by log-likelihood.

Kamradt, "Needle in a haystack", 2023; RULER's single-needle task (Hsieh et al. 2024, https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from l4pack.errors import UsageError
from l4pack.stream.hidden import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
DIGITS = 7
_CITIES = ("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi")


@dataclass(frozen=True)
class Needle:
    """A hidden number: how deep it lies, and its sequence with and without it."""

    depth: float
    with_needle: TokenSequence
    without: TokenSequence


def needles(
    length: int, haystack: list[int], tokenizer: PreTrainedTokenizerBase, seed: int, max_positions: int
) -> list[Needle]:
    """One needle a depth in `length` tokens; the text is repeated where it is short. Raises UsageError."""
    if length > max_positions:
        raise UsageError(f"--needle {length} is more than the model's context of {max_positions}", hint="take less")
    rng = np.random.default_rng(seed)
    result = []
    for depth, city in zip(DEPTHS, _CITIES, strict=True):
        number = "".join(str(digit) for digit in rng.integers(0, 10, DIGITS))
        hidden = _ids(tokenizer, f"\nThe secret number of {city} is {number}.\n")
        question = _ids(tokenizer, f"\nThe secret number of {city} is")
        answer = _ids(tokenizer, f" {number}")
        result.append(_needle(length, haystack, depth, hidden, question, answer, tokenizer.bos_token_id))
    return result


def _needle(
    length: int, haystack: list[int], depth: float, hidden: list[int], question: list[int], answer: list[int],
    bos: int | None,
) -> Needle:  # fmt: skip
    start = [] if bos is None else [bos]
    room = length - len(start) - len(hidden) - len(question) - len(answer)
    if room < 1 or not haystack:
        raise UsageError(f"--needle {length} leaves no room for text", hint="take a greater length")
    text = (haystack * (room // len(haystack) + 2))[: room + len(hidden)]
    at = int(depth * room)
    with_needle = start + text[:at] + hidden + text[at:room] + question + answer
    without = start + text + question + answer
    scored = length - len(answer)
    return Needle(depth, TokenSequence(tuple(with_needle), scored), TokenSequence(tuple(without), scored))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def needle_sequences(found: list[Needle]) -> list[TokenSequence]:
    """All sequences of all needles."""
    return [sequence for needle in found for sequence in (needle.with_needle, needle.without)]


def needle_record(
    length: int, found: list[Needle], log_probability: list[Tensor], greedy: list[Tensor]
) -> dict[str, Any]:
    """Retrieval at each depth, from every sequence's answer: log-probability (nats) and whether likeliest, [tokens]
    each."""
    rows = []
    for number, needle in enumerate(found):
        there, absent = log_probability[2 * number], log_probability[2 * number + 1]
        rows.append(
            {
                "depth": needle.depth,
                "retrieved": bool(greedy[2 * number].all()),
                "log_likelihood": float(there.sum()),
                "log_likelihood_without": float(absent.sum()),
            }
        )
    share = float(torch.tensor([row["retrieved"] for row in rows], dtype=torch.float64).mean())
    return {"length": length, "retrieved": share, "needles": rows}
