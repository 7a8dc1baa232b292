"""Log-likelihoods of token sequences by one checkpoint, layer by layer, in blocks that are kept when they are done."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from l4pack import __version__
from l4pack.checkpoint.parts import weight_parts
from l4pack.checkpoint.source import Checkpoint
from l4pack.evaluate.desk import model_of
from l4pack.evaluate.forward import Forward, Here
from l4pack.evaluate.scoring import score
from l4pack.evaluate.spread import Crew, SpreadForward
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.text.sequences import token_digest
from l4pack.work.identity import Identity
from l4pack.work.state import Found, StateFile

BLOCK_TOKENS = 2**21  # of one walk over the weights: 43 GB of hidden states at Llama 4's width
Scored = list[tuple[Tensor, Tensor]]
Scorer = Callable[[Sequence[TokenSequence]], Scored]


class BlockScores(Found):
    """Log-probabilities of one block's scored tokens, sequence after sequence, and whether each was the likeliest."""

    log_probability: list[float]
    likeliest: list[bool]


class StreamedScorer:
    """Log-likelihoods of token sequences by one checkpoint, layer by layer."""

    def __init__(
        self, checkpoint: Checkpoint, work: Path, compute: Compute, *,
        round_activations: bool = True, progress: Progress | None = None, ahead: bool = True, crew: Crew | None = None,
    ) -> None:  # fmt: skip
        """With a `crew`, others run the layers."""
        self._checkpoint, self._work, self._compute = checkpoint, work, compute
        self._round_activations, self._progress, self._ahead = round_activations, progress or Progress(), ahead
        self._crew = crew

    def __call__(self, sequences: Sequence[TokenSequence]) -> Scored:
        """For each sequence, log-probability of every scored token, and whether it was the likeliest.

        A block that an earlier run finished is not run again. Raises StoppedError and what a walk raises.
        """
        found: Scored = []
        cut = list(blocks(sequences, BLOCK_TOKENS))
        for number, block in enumerate(cut):
            if len(cut) > 1:
                self._progress.label(f"block {number + 1} of {len(cut)}")
            found += self._block(block)
        return found

    def _block(self, sequences: Sequence[TokenSequence]) -> Scored:
        job = self._job(sequences)
        folder = self._work / "finished"
        folder.mkdir(parents=True, exist_ok=True)
        state = StateFile(folder / f"{job.digest}.json", job, BlockScores)
        kept, lengths = state.read(), Packed(sequences).scored_lengths()
        if kept is None or len(kept.log_probability) != sum(lengths):
            values, likeliest = self._walked(sequences, job)
            kept = BlockScores(log_probability=values.tolist(), likeliest=likeliest.tolist())
            state.write(kept, ())
        parts = torch.tensor(kept.log_probability, dtype=torch.float64), torch.tensor(kept.likeliest)
        return list(zip(*(torch.split(part, lengths) for part in parts), strict=True))

    def _job(self, sequences: Sequence[TokenSequence]) -> Identity:
        places = hashlib.sha256(str([item.score_from for item in sequences]).encode()).hexdigest()
        return Identity(
            {
                "l4pack version": __version__,
                "--weights-only": not self._round_activations,
                "tokens of all tasks": token_digest([item.tokens for item in sequences]),
                "scored from": places,
                **self._compute.parts(),
                **weight_parts(self._checkpoint, "model"),
            }
        )

    def _walked(self, sequences: Sequence[TokenSequence], job: Identity) -> tuple[Tensor, Tensor]:
        packed, rows, targets = shared(sequences)
        with ExitStack() as stack:
            model = model_of("model", self._checkpoint, self._compute, stack, round_activations=self._round_activations)
            lanes, work = [Lane(model.name, model, packed)], self._work / "walk"
            forward = self._forward(model, packed, work)
            walk = Walk(lanes, work, job, forward.visitor, progress=self._progress, ahead=self._ahead)
            stack.enter_context(walk).run()
            (answers,) = stack.enter_context(forward.answers(walk))
            found = score(answers, rows, targets)
        shutil.rmtree(work)
        return found.log_probability, found.likeliest == targets

    def _forward(self, model: Model, packed: Packed, work: Path) -> Forward:
        if self._crew is None:
            return Here([model], packed)
        return SpreadForward(
            self._crew, [model], packed, work, self._compute, self._progress,
            paired=False, round_activations=self._round_activations,
        )  # fmt: skip


def shared(sequences: Sequence[TokenSequence]) -> tuple[Packed, Tensor, Tensor]:
    """Distinct sequences, and for every scored token of all the row it is answered at and the token itself, int64.

    Sequences that differ in their last token alone need the same rows: the choices A, B, C, D of a question are one.
    """
    places: dict[tuple[int, ...], int] = {}
    distinct: list[TokenSequence] = []
    for item in sequences:
        if item.tokens[:-1] not in places:
            places[item.tokens[:-1]] = len(distinct)
            distinct.append(item)
    packed = Packed(distinct)
    starts = [packed.starts[places[item.tokens[:-1]]] for item in sequences]
    rows = [start + item.scored() - 1 for start, item in zip(starts, sequences, strict=True)]
    return packed, torch.cat(rows), Packed(sequences).targets()


def blocks(sequences: Sequence[TokenSequence], most: int) -> Iterator[Sequence[TokenSequence]]:
    """Neighbouring sequences of at most `most` tokens together; a longer one comes alone."""
    first, tokens = 0, 0
    for number, item in enumerate(sequences):
        if tokens + len(item.tokens) > most and number > first:
            yield sequences[first:number]
            first, tokens = number, 0
        tokens += len(item.tokens)
    if sequences:
        yield sequences[first:]
