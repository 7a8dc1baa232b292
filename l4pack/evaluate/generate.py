"""Sequences continued by a model's likeliest tokens, one by one, from weights that are streamed for every token.

Keys and values are kept, so that after the first token only new ones walk through the layers: of the experts, those that
they are routed to are read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from l4pack.checkpoint.source import Checkpoint
from l4pack.evaluate.answers import StreamAnswers
from l4pack.evaluate.scoring import score
from l4pack.model.config import TextConfig
from l4pack.plan.memory import Computing, computing_on, walk_within
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.kv import KeptCache, unchanged
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import Blocks, LayerPass
from l4pack.stream.modules import Skeleton
from l4pack.stream.units import Part, Unit, UnitWeights
from l4pack.stream.visitor import Progress, Visit, Visitor
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights, stored_itemsize
from l4pack.work import machine
from l4pack.work.identity import Identity
from l4pack.work.signals import check_stop


@dataclass(frozen=True)
class Asking:
    """How a model is asked: most tokens of an answer, where it is computed, and the memory it may take."""

    most: int = 32
    compute: str = "auto"
    max_ram: int | None = None
    max_vram: int | None = None


def continued(
    checkpoint: Checkpoint,
    prompts: Sequence[TokenSequence],
    ends: frozenset[int],
    asking: Asking,
    progress: Progress,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, with the one of `ends` that ends them if one comes.

    Raises BudgetError, SourceError, StoppedError, and L4packError for weights that are damaged.
    """
    compute = Compute.of(asking.compute)
    ahead = _ahead(checkpoint, prompts, asking, compute)
    with (
        tempfile.TemporaryDirectory(prefix="l4pack-chat-") as folder,
        Weights(checkpoint, compute.device, compute.dtype, tiled=compute.tiles > 0) as weights,
    ):
        model = Model(checkpoint.name, weights, Skeleton(checkpoint.config, compute.device, compute.dtype))
        steps = _Steps(model, prompts, ends, Path(folder), ahead=ahead)
        for number in range(asking.most):
            if not steps.open:
                break
            check_stop(progress.stop)
            progress.label(f"{checkpoint.name}, token {number + 1} of {asking.most}")
            steps.take(Progress(progress.advance, stop=progress.stop))
    return steps.found


def _ahead(checkpoint: Checkpoint, prompts: Sequence[TokenSequence], asking: Asking, compute: Compute) -> bool:
    """Whether a unit is loaded while another computes. Raises BudgetError where not even one by one fits."""
    whole = [replace(prompt, tokens=(*prompt.tokens, *[0] * asking.most)) for prompt in prompts]
    computing = computing_on(compute, checkpoint.config, whole, merging=checkpoint.merging_bytes)
    computing = replace(computing, tiles=compute.tiles, stored=stored_itemsize(checkpoint))
    kept = sum(kept_bytes(computing, len(one.tokens)) for one in whole)
    ram, device = machine.memory(asking.max_ram), compute.device_room(asking.max_vram)
    return walk_within(computing, lambda one: one.memory(held=kept, scored=True), ram, device)[1]


def kept_bytes(computing: Computing, length: int) -> int:
    """Keys and values of a sequence in all layers; those with chunks keep one."""
    text: TextConfig = computing.text
    chunk = min(length, text.attention_chunk_size or length)
    tokens = sum(chunk if layer in text.rope_layers else length for layer in range(text.num_hidden_layers))
    return 2 * tokens * text.num_key_value_heads * text.head_dim * computing.itemsize


class _Steps:
    """One walk a token, all prompts in it that have not come to an end."""

    def __init__(
        self, model: Model, prompts: Sequence[TokenSequence], ends: frozenset[int], work: Path, *, ahead: bool
    ) -> None:
        self._model, self._prompts, self._ends, self._work, self._ahead = model, prompts, ends, work, ahead
        self._keeping = _Keeping()
        self.open = list(range(len(prompts)))
        self.found: list[list[int]] = [[] for _ in prompts]
        usual = Blocks.on(model.skeleton.device, model.skeleton.text.hidden_size)
        self._blocks = usual, replace(usual, attention=1)  # a token that goes on from kept ones comes alone

    def take(self, progress: Progress) -> None:
        """Find the next token of every prompt that is open."""
        packed = Packed([self._coming(number) for number in self.open])
        self._keeping.numbers = dict(zip(packed.starts, self.open, strict=False))
        step = max(map(len, self.found))
        lane = Lane(self._model.name, self._model, packed)
        with Walk(
            [lane],
            self._work / str(step),
            Identity({"kind": "chat"}),
            self._keeping,
            blocks=self._blocks[step > 0],
            progress=progress,
            ahead=self._ahead,
        ) as walk:
            walk.run()
            answers = StreamAnswers(self._model, walk.streams[lane.name].current)
            last = torch.tensor(packed.starts[1:]) - 1
            likeliest = score(answers, last, torch.zeros_like(last)).likeliest.tolist()
        for number, token in zip(self.open, likeliest, strict=True):
            self.found[number].append(token)
        self.open = [number for number in self.open if self.found[number][-1] not in self._ends]

    def _coming(self, number: int) -> TokenSequence:
        prompt, found = self._prompts[number], self.found[number]
        if not found:
            return prompt
        return TokenSequence((found[-1],), position=len(prompt.tokens) + len(found) - 1)


class _Keeping(Visitor):
    """A forward pass whose keys and values are kept; `numbers` says which sequence begins at a row."""

    def __init__(self) -> None:
        self.numbers: Mapping[int, int] = {}
        self._kept: dict[int, KeptCache] = {}

    def visit(self, visit: Visit, unit: Unit, weights: UnitWeights) -> None:
        """Run a unit; attention sees what is kept of its layer, and adds to it."""
        for one in visit.passes.values():
            if unit.part is Part.ATTENTION:
                one.attention(weights, self._entry(one, weights))
            else:
                one.run(unit, weights)

    def _entry(self, layer: LayerPass, weights: UnitWeights) -> KeptCache:
        cache = self._kept.setdefault(layer.index, KeptCache(layer.chunk))
        coming, number = [], -1
        for piece in (piece for batch in layer.batches() for piece in batch):
            number = self.numbers.get(piece.start, number)
            coming.append((number, piece))
        cache.expect(weights.kv_cache or unchanged, coming)
        return cache
