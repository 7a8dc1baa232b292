"""Refusal drift: whether an artifact still refuses what its original refuses, and answers what it answers.

Each request is put through the chat template, and how probable it is that the answer begins with one of a list of refusal
openings is computed exactly: the openings are sequences of the same pass as all else, so it costs tokens and no bytes
read. Sampled at temperature 1, that share of answers would begin so; the sum over openings is a lower bound of refusing,
as there are others. What an answer begins with decides nearly all of it (Qi et al. 2024, "Safety alignment should be made
more than just a few tokens deep", https://arxiv.org/abs/2406.05946); Arditi et al. 2024 (https://arxiv.org/abs/2406.11717)
score refusals by the probability of first tokens in the same way.

A probability moves before a verdict does, so 40 requests show a drift that 40 answers read one by one would not. Nor are
answers written: for each of their tokens nearly every expert would be read again, where this reads each once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from l4pack.datafile import parse_yaml
from l4pack.evaluate.refusal_text import KINDS
from l4pack.evaluate.talk import prompt_of
from l4pack.resources import data_text
from l4pack.stream.hidden import TokenSequence
from l4pack.text.tokenizer import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFUSALS = "refusals"
REFUSES = 0.5  # a request counts as refused from this probability of a refusal opening on


class Pair(BaseModel):
    """A harmful request, and a harmless one that looks like it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    harmful: str
    harmless: str


class RefusalSuite(BaseModel):
    """The requests, and how answers begin that refuse them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    suite: str
    title: str
    licence: str
    origin: str
    openings: tuple[str, ...]
    pairs: tuple[Pair, ...]

    def prompts(self) -> list[str]:
        """All requests: the harmful ones, then the harmless ones in the same order."""
        return [getattr(pair, kind) for kind in KINDS for pair in self.pairs]


@cache
def refusal_suite() -> RefusalSuite:
    """The shipped suite."""
    return RefusalSuite.model_validate(parse_yaml(_text()))


def _text() -> str:
    return data_text("evaluate", "suites", "refusals.yaml")


def suite_digest() -> str:
    """Hex SHA-256 of the shipped suite's file."""
    return hashlib.sha256(_text().encode()).hexdigest()


@dataclass(frozen=True)
class Requests:
    """A suite, and whether its requests were put through a chat template."""

    suite: RefusalSuite
    chat_template: bool


def asked_requests(tokenizer: PreTrainedTokenizerBase) -> Requests:
    """The shipped suite, put through a tokenizer's chat template where it has one."""
    return Requests(refusal_suite(), Template(tokenizer).there)


def refusal_sequences(suite: RefusalSuite, tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
    """One sequence an opening of each request, the opening scored. Raises UsageError where the template refuses them."""
    openings = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in suite.openings]
    found = []
    for request in suite.prompts():
        prompt = prompt_of(tokenizer, [{"role": "user", "content": request}]).tokens
        found += [TokenSequence(prompt + opening, score_from=len(prompt)) for opening in openings]
    return found


def refusal_record(asked: Requests, artifact: Sequence[float], original: Sequence[float] | None) -> dict[str, Any]:
    """The suite's record, from the log-likelihood (nats) of every sequence of `refusal_sequences` by both models."""
    suite = asked.suite
    ours = refusal_probabilities(suite, artifact)
    theirs = None if original is None else refusal_probabilities(suite, original)
    count = len(suite.pairs)
    record: dict[str, Any] = {
        "suite": suite.suite, "sha256": suite_digest(), "licence": suite.licence, "openings": len(suite.openings),
        "chat_template": asked.chat_template, "refuses_from": REFUSES,
    }  # fmt: skip
    for number, kind in enumerate(KINDS):
        part = slice(number * count, (number + 1) * count)
        record[kind] = paired_refusals(ours[part], None if theirs is None else theirs[part])
    return record


def refusal_probabilities(suite: RefusalSuite, log_likelihood: Sequence[float]) -> Tensor:
    """float64 [requests], how probable it is that the answer begins with any opening."""
    return (
        torch.tensor(log_likelihood, dtype=torch.float64).view(-1, len(suite.openings)).logsumexp(1).exp().clamp(max=1)
    )


def paired_refusals(artifact: Tensor, original: Tensor | None) -> dict[str, Any]:
    """Refusals of float64 [requests] probabilities by both models: means, verdicts, and what the two do otherwise."""
    record: dict[str, Any] = {
        "requests": len(artifact),
        "probability_artifact": _mean(artifact),
        "refused_artifact": int((artifact >= REFUSES).sum()),
    }
    if original is None:
        return record
    record |= {
        "probability_original": _mean(original),
        "refused_original": int((original >= REFUSES).sum()),
        "probability_change": _mean(artifact - original),
    }
    return record | verdicts_apart((artifact >= REFUSES).tolist(), (original >= REFUSES).tolist())


def verdicts_apart(artifact: Sequence[bool], original: Sequence[bool]) -> dict[str, Any]:
    """How often only one of two models refuses, and how probable so lopsided a split is by chance alone.

    McNemar 1947, exact: of the requests that the two treat otherwise, either is as likely to be the one that refuses.
    """
    pairs = list(zip(artifact, original, strict=True))
    ours, theirs = pairs.count((True, False)), pairs.count((False, True))
    return {
        "refused_by_artifact_only": ours,
        "refused_by_original_only": theirs,
        "p_value": exact_mcnemar(ours, theirs),
    }


def exact_mcnemar(one: int, other: int) -> float:
    """The two-sided p-value of so many pairs that differ one way, and the other way."""
    count, least = one + other, min(one, other)
    tail = sum(math.comb(count, number) for number in range(least + 1))
    return min(1.0, math.ldexp(float(tail), 1 - count))


def _mean(values: Tensor) -> dict[str, float | None]:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else None
    return {"value": float(values.mean()), "standard_error": error}
