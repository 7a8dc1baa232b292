"""Log-probabilities and KL divergence of every scored token, without ever holding a row of logits.

The vocabulary is walked in chunks, with one pass over each head. For reference logits a and artifact logits b of a
token position, over the vocabulary v:

    log p(v) = a_v - log sum exp a            KL(p || q) = sum p_v (a_v - b_v) - log sum exp a + log sum exp b

The sums are kept relative to the largest logit so far, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.errors import L4packError
from l4pack.evaluate.answers import Answers
from l4pack.model.parts import HEAD
from l4pack.stream.rows import HEAD_ROWS, TOKENS_SCORED


@dataclass(frozen=True)
class Scores:
    """One model's answers, float64 [scored tokens] each: log-probability of the true token, and the likeliest token."""

    log_probability: Tensor
    likeliest: Tensor


@dataclass(frozen=True)
class PairedScores:
    """Reference and artifact on the same tokens; `kl` is KL(reference || artifact) in nats, float64."""

    reference: Scores
    artifact: Scores
    kl: Tensor


class _Online:
    """log sum exp, true logit and largest logit of some rows, chunk by chunk."""

    def __init__(self, targets: Tensor) -> None:
        count = len(targets)
        self.targets = targets
        self.largest = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.total = torch.zeros(count, dtype=torch.float64)
        self.true = torch.zeros(count, dtype=torch.float64)
        self.likeliest = torch.zeros(count, dtype=torch.long)

    def add(self, block: slice, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take logits [block, chunk] of tokens from `first`; returns exp(logits - largest) and the old sums' factor."""
        top, index = logits.max(1)
        before = self.largest[block].to(logits.device)
        largest = torch.maximum(before, top)
        self.likeliest[block] = torch.where(top > before, index + first, self.likeliest[block].to(index.device)).cpu()
        factor, powers = torch.exp(before - largest), torch.exp(logits - largest[:, None])
        self.total[block] = (self.total[block].to(logits.device) * factor + powers.sum(1)).cpu()
        self.largest[block] = largest.cpu()
        self._true(block, first, logits)
        return powers, factor

    def _true(self, block: slice, first: int, logits: Tensor) -> None:
        targets = self.targets[block].to(logits.device) - first
        inside = (targets >= 0) & (targets < logits.shape[1])
        found = logits.gather(1, targets.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.true[block] = torch.where(inside, found, self.true[block].to(logits.device)).cpu()

    def log_sum(self) -> Tensor:
        """log sum exp of the logits, float64 [tokens]."""
        return self.largest + self.total.log()

    def scores(self, name: str) -> Scores:
        """Raises L4packError when a logit was not a number."""
        log_probability = self.true - self.log_sum()
        if not bool(torch.isfinite(log_probability).all()):
            raise L4packError(f"{name}: the logits are infinite or not a number", hint=f"the norm or {HEAD} is damaged")
        return Scores(log_probability, self.likeliest)


@torch.inference_mode()
def score(answers: Answers, rows: Tensor, targets: Tensor, name: str = "model") -> Scores:
    """Score one model: `rows` of hidden states and the token that follows each, int64 [tokens] both. Raises
    L4packError."""
    online = _Online(targets)
    for tokens in _chunks(answers.vocabulary):
        head = answers.head(tokens)
        for block in _blocks(len(rows)):
            online.add(block, tokens.start, _logits(answers.normed(rows[block]), head))
    return online.scores(name)


@torch.inference_mode()
def score_pair(reference: Answers, artifact: Answers, rows: tuple[Tensor, Tensor], targets: Tensor) -> PairedScores:
    """Score two models on the same tokens: `rows` of each one's hidden states, and `targets`, int64 [tokens] all.

    Raises L4packError."""
    return score_against(reference, [artifact], rows, targets)[0]


@torch.inference_mode()
def score_against(
    reference: Answers,
    others: Sequence[Answers],
    rows: tuple[Tensor, Tensor],
    targets: Tensor,
    *,
    one_head: bool = False,
) -> list[PairedScores]:
    """Score models on the tokens that the reference is scored on once: `rows` of its hidden states and of theirs, and
    `targets`, int64 [tokens] all. With `one_head` they have its head, which is read once for all.

    Raises L4packError.
    """
    ours, theirs = _Online(targets), [_Online(targets) for _ in others]
    gaps = [torch.zeros(len(targets), dtype=torch.float64) for _ in others]
    for tokens in _chunks(reference.vocabulary):
        head = reference.head(tokens)
        heads = [head if one_head else one.head(tokens) for one in others]
        for block in _blocks(len(targets)):
            a = _logits(reference.normed(rows[0][block]), head)
            scaled = ours.add(block, tokens.start, a)
            for answers, own, online, gap in zip(others, heads, theirs, gaps, strict=True):
                b = _logits(answers.normed(rows[1][block]), own)
                _add_pair(gap, online, block, tokens.start, (a, b), scaled)
    scores = ours.scores("original")
    return [
        PairedScores(scores, online.scores("changed" if one_head else "artifact"), _divergence(gap, ours, online))
        for gap, online in zip(gaps, theirs, strict=True)
    ]


def _add_pair(
    gap: Tensor, theirs: _Online, block: slice, first: int, pair: tuple[Tensor, Tensor], scaled: tuple[Tensor, Tensor]
) -> None:
    """Add a chunk's part of sum p (a - b), for logits a and b and what `_Online.add` said of a."""
    (a, b), (powers, factor) = pair, scaled
    theirs.add(block, first, b)
    gap[block] = (gap[block].to(a.device) * factor + (powers * (a - b)).sum(1)).cpu()


def _divergence(gap: Tensor, ours: _Online, theirs: _Online) -> Tensor:
    return gap / ours.total - ours.log_sum() + theirs.log_sum()


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    return (hidden @ head.T).double()


def _chunks(vocabulary: int) -> Iterator[slice]:
    for start in range(0, vocabulary, HEAD_ROWS):
        yield slice(start, min(start + HEAD_ROWS, vocabulary))


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, TOKENS_SCORED):
        yield slice(start, min(start + TOKENS_SCORED, count))
