"""Where the way down begins: the gradient of cross-entropy on the model's own answers.

One label a position is drawn from the model's own softmax, with a number that was drawn for the position beforehand: the
label doesn't depend on how rows or vocabulary are cut. The head is walked twice in chunks, so that no row of logits is ever
there: once for each row's sum, once for label and gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from l4pack.errors import L4packError
from l4pack.model.parts import HEAD
from l4pack.model.tensors import canonical_naming
from l4pack.stream.hidden import Rows
from l4pack.stream.lanes import Model
from l4pack.stream.rows import HEAD_ROWS, TOKENS_SCORED
from l4pack.work.signals import check_stop

LARGEST_DRAW = 1 - 1e-9  # so that rounding of sums can't leave a row without a label


class Head:
    """Norm and head of a model above the hidden states [rows, hidden] that leave its last layer."""

    def __init__(self, model: Model, states: Rows, stop: threading.Event) -> None:
        config = model.weights.checkpoint.config
        naming = canonical_naming(config)
        self._model, self._states, self._stop = model, states, stop
        self._norm = model.skeleton.norm(model.weights.tensor(naming.final_norm))
        self._name = naming.embedding if config.text.tie_word_embeddings else naming.head_weight
        self._vocabulary, self._count = config.text.vocab_size, len(states.data)

    def gradient(self, seed: int, target: Rows) -> None:
        """Write the gradient of the labels' summed cross-entropy with respect to the states, float32 [rows, hidden].

        Raises L4packError when a logit is not a number, StoppedError.
        """
        largest, total = self._sums()
        draws = torch.rand(self._count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        wanted, passed = draws.clamp(max=LARGEST_DRAW) * total, torch.zeros_like(total)
        for tokens, weight in self._chunks():
            for rows in self._blocks():
                terms = torch.exp(self._logits(rows, weight) - largest[rows, None].to(weight))
                sums = terms.sum(1, dtype=torch.float64).cpu()
                here, label = _labels(terms, sums, passed[rows], wanted[rows])
                passed[rows] += sums
                terms /= total[rows, None].to(terms)
                terms[here.to(terms.device), label.to(terms.device)] -= 1
                _add(target.data[rows], terms @ weight, first=tokens.start == 0)
                target.release()
        self._through_norm(target)

    def _through_norm(self, target: Rows) -> None:
        """Take the gradient with respect to normed states to the states themselves, in its place."""
        for rows in self._blocks():
            states = self._taken(rows).requires_grad_()
            arriving = target.data[rows].to(states.device, states.dtype)
            (found,) = torch.autograd.grad(self._norm(states), states, arriving)
            target.data[rows] = found.to(target.data)
            target.release()

    @torch.inference_mode()
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Each row's largest logit, and the sum of exponentials relative to it, float64 [rows]."""
        largest = torch.full((self._count,), -torch.inf, dtype=torch.float64)
        total = torch.zeros_like(largest)
        for _, weight in self._chunks():
            for rows in self._blocks():
                logits = self._logits(rows, weight)
                top = torch.maximum(largest[rows], logits.amax(1).cpu().double())
                powers = torch.exp(logits - top[:, None].to(logits)).sum(1, dtype=torch.float64).cpu()
                total[rows] = total[rows] * torch.exp(largest[rows] - top) + powers
                largest[rows] = top
        if not bool(torch.isfinite(total).all()):
            raise L4packError("the logits are infinite or not a number", hint=f"the norm or {HEAD} is damaged")
        return largest, total

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self._vocabulary, HEAD_ROWS):
            check_stop(self._stop)
            tokens = slice(start, min(start + HEAD_ROWS, self._vocabulary))
            yield tokens, self._model.weights.rows(self._name, tokens)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self._count, TOKENS_SCORED):
            yield slice(start, min(start + TOKENS_SCORED, self._count))
            self._states.release()

    def _taken(self, rows: slice) -> Tensor:
        skeleton = self._model.skeleton
        return self._states.data[rows].to(skeleton.device, skeleton.dtype)

    @torch.no_grad()
    def _logits(self, rows: slice, weight: Tensor) -> Tensor:
        """[rows, chunk]"""
        normed: Tensor = self._norm(self._taken(rows))
        return normed @ weight.T


def _labels(terms: Tensor, sums: Tensor, passed: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose label is in a chunk, and which of its tokens that is: where the sum passes what is wanted, int64 both.

    `terms` are the chunk's [rows, chunk] and `sums` theirs [rows]; `passed` are the sums before it.
    """
    here = ((passed <= wanted) & (passed + sums > wanted)).nonzero()[:, 0]
    after = passed[here, None] + terms[here.to(terms.device)].cpu().double().cumsum(1)
    return here, (after <= wanted[here, None]).sum(1).clamp(max=terms.shape[1] - 1)


def _add(target: Tensor, found: Tensor, *, first: bool) -> None:
    """Add to what may not be there yet."""
    if first:
        target.copy_(found)
    else:
        target += found.to(target)
