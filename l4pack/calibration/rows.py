"""Which tokens a matrix is solved for: those routed to its expert, and for a thin expert those it nearly got.

An expert that few tokens reach has a Hessian of low rank: solved for it alone, the rest of its weights would be rounded
for inputs never seen. The tokens that the router came nearest to giving it, by the margin between the winning logit and
its own, are what it would see on other text; as many as are missing are lent to it, scaled by the score that the router
would have given them, and count less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.stream.layer import LayerPass, Routing

BORROWED_WEIGHT = 0.25


@dataclass(frozen=True)
class UnitRows:
    """Rows of the hidden states, None for all of them; of an expert, its own first and then the borrowed ones.

    `scores` [rows, 1] multiply the inputs; `weights` [rows] say how much each counts (None: all alike); `kept` [rows]
    says whose original went to the same expert, by `original_scores`.
    """

    count: int
    rows: Tensor | None = None
    scores: Tensor | None = None
    weights: Tensor | None = None
    kept: Tensor | None = None
    original_scores: Tensor | None = None
    borrowed: int = 0

    @property
    def own(self) -> int:
        """Tokens that do go through the unit."""
        return self.count - self.borrowed

    @property
    def weight(self) -> float:
        """What all rows weigh together."""
        return float(self.count) if self.weights is None else float(self.weights.sum())


@dataclass(frozen=True)
class Block:
    """Some tokens' inputs to a unit: quantized so far, the original model's where there are any, and their weights."""

    inputs: Tensor
    original: Tensor | None
    weights: Tensor | None
    kept: Tensor | None


def expert_rows(expert: int, routing: Routing, original: Routing | None, min_tokens: int) -> UnitRows:
    """The rows of one expert under `routing`; at least `min_tokens`, if the text has as many."""
    rows, scores = routing.of(expert)
    lent = _nearest_missed(expert, routing, min_tokens - len(rows))
    weights = None
    if len(lent):
        weights = torch.cat((torch.ones(len(rows)), torch.full((len(lent),), BORROWED_WEIGHT)))
        scores = torch.cat((scores, routing.logits[lent, expert, None].sigmoid().to(scores.dtype)))
        rows = torch.cat((rows, lent))
    kept = original_scores = None
    if original is not None:
        same = original.experts[rows] == expert
        kept = same.any(1)
        kept[len(rows) - len(lent) :] = False
        original_scores = (original.scores[rows] * same).sum(1, keepdim=True)
    return UnitRows(len(rows), rows, scores, weights, kept, original_scores, len(lent))


def _nearest_missed(expert: int, routing: Routing, wanted: int) -> Tensor:
    """At most `wanted` rows that went elsewhere, those with the smallest margin, in order."""
    elsewhere = (routing.experts != expert).all(1).nonzero().reshape(-1)
    wanted = min(wanted, len(elsewhere))
    if wanted <= 0:
        return elsewhere[:0]
    logits = routing.logits[elsewhere]
    margin = logits.amax(1) - logits[:, expert]
    return elsewhere[torch.argsort(margin, stable=True)[:wanted]].sort().values


def blocks(taken: UnitRows, quantized: LayerPass, original: LayerPass | None) -> Iterator[Block]:
    """The unit's inputs, some rows at a time; none at all are one block."""
    step = quantized.blocks.rows
    for start in range(0, max(1, taken.count), step):
        part = slice(start, min(start + step, taken.count))
        rows = part if taken.rows is None else taken.rows[part]
        inputs = quantized.normed(rows)
        before = None if original is None else original.normed(rows)
        kept = None
        if taken.scores is not None:
            inputs = inputs * taken.scores[part].to(inputs.device)
            if before is not None and taken.original_scores is not None and taken.kept is not None:
                kept = taken.kept[part, None].to(inputs.device)
                before = torch.where(kept, before * taken.original_scores[part].to(inputs.device), inputs)
        weights = None if taken.weights is None else taken.weights[part].to(inputs.device)
        yield Block(inputs, before, weights, kept)
        quantized.let_go()
        if original is not None:
            original.let_go()
