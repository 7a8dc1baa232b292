"""The walk back through a model: up with every layer's inputs kept, then layer by layer down with the gradient.

On the way down one unit's weights are in memory at a time, as on the way up, and after each layer a state (see
`work.state`) vouches for the gradient that has come out of it, for the moments so far and the inputs that are left: a run
that was killed goes on from there, to the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from l4pack.gradient.head import Head
from l4pack.gradient.inputs import InputKeeper, LayerRows, kept_seals
from l4pack.gradient.layer import BackwardPass
from l4pack.gradient.visitor import ANSWERS, GradientVisitor
from l4pack.stream.compute import calibrating
from l4pack.stream.hidden import Buffer, Packed, Rows
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import Blocks
from l4pack.stream.prefetch import Prefetch
from l4pack.stream.sides import Stream, StreamFiles
from l4pack.stream.transfer import beside, hand_over
from l4pack.stream.units import LoadedUnit, Unit, UnitWeights, expert_unit, layer_units, load_unit, unit_bytes
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.work.identity import Identity
from l4pack.work.seal import Span, seal
from l4pack.work.signals import check_stop
from l4pack.work.state import Found, StateFile

STATE_NAME = "state.json"
KEPT = torch.bfloat16  # what layers' inputs are kept in
_UP, _INPUTS, _GRADIENT, _ENTERING = "up", "inputs", "gradient", "entering.hidden"
_Ready = Prefetch[Unit, LoadedUnit]


class Descended(Found):
    """How many steps are left on the way down, the head and the layers; what was kept for them is needed still."""

    left: Annotated[int, Field(ge=0)]


class BackwardWalk:
    """Takes gradients back through a model; what is kept of them, a visitor says.

    The loss is cross-entropy on the model's own answers: one label a position of `packed`, drawn with `seed`.
    """

    def __init__(
        self,
        model: Model,
        packed: Packed,
        work: Path,
        job: Identity,
        seed: int,
        visitor: GradientVisitor,
        *,
        kept: torch.dtype = KEPT,
        blocks: Blocks | None = None,
        progress: Progress | None = None,
        ahead: bool = True,
    ) -> None:
        """`work` is a folder that this process holds. Raises UsageError when it was begun for another `job`."""
        work.mkdir(parents=True, exist_ok=True)
        self._model, self._packed, self._work, self._job, self._seed = model, packed, work, job, seed
        self._visitor = visitor
        self._progress, self._ahead = progress or Progress(), ahead
        skeleton = model.skeleton
        self._blocks = blocks or Blocks.on(skeleton.device, skeleton.text.hidden_size)
        text = skeleton.config.text
        self._layers, width = text.num_hidden_layers, text.hidden_size
        self._inputs = LayerRows(work, _INPUTS, packed.rows, width, kept)
        self._files = StreamFiles(work, _GRADIENT, visitor.streams, (packed.rows, width, torch.float32))
        self._state = StateFile(work / STATE_NAME, job, Descended)

    def walk(self) -> None:
        """Up and down, or go on; what is there in the end is what the visitor keeps. Raises StoppedError, L4packError, and
        BudgetError when the disk has no room."""
        with calibrating():
            left = self._left()
            if left is None:
                self._up()
                left = self._layers + 1
            else:
                self._count(range(self._layers))
            self._count(range(left, self._layers))
            if left > self._layers:
                self._head()
                left = self._layers
            if left:
                self._down(left)
        wanted = {span.file for span in self._spans(0)}
        for path in self._work.glob("*.hidden"):
            if path.name not in wanted:
                path.unlink()

    def _left(self) -> int | None:
        """How many steps are left; None when there is nothing to go on from."""
        found = self._state.read()
        if found is None or found.left > self._layers + 1 or not self._state.unbroken(self._spans(found.left)):
            return None
        return found.left

    def _spans(self, left: int) -> list[Span]:
        """What is vouched for when so many steps are left."""
        found = [span for layer in range(left, self._layers) for span in self._visitor.spans(layer)]
        inputs = [self._inputs.span(step) for step in range(left)]
        return [*found, *inputs, *(self._gradients(left) if 0 < left <= self._layers else [])]

    def _gradients(self, left: int) -> list[Span]:
        """Where the gradients lie that the next step takes in."""
        return [self._files.span(name, self._side(left)) for name in self._visitor.streams]

    def _side(self, left: int) -> int:
        return (self._layers - left) % 2

    def _up(self) -> None:
        """Walk forward, keeping inputs; a run before this one may have done some of it."""
        self._state.remove()
        lane, keeper = Lane("original", self._model, self._packed), InputKeeper(self._inputs, self._layers)
        with Walk(
            [lane], self._work / _UP, self._job, keeper,
            blocks=self._blocks, progress=self._progress, release=True, ahead=self._ahead,
        ) as walk:  # fmt: skip
            walk.run()
            self._state.write(Descended(left=self._layers + 1), kept_seals(walk.records))

    def _head(self) -> None:
        """Take the gradient through head and norm; the files of the way up make room for it."""
        shutil.rmtree(self._work / _UP, ignore_errors=True)
        self._progress.label("gradient of the answers")
        with self._opened(self._layers, kept=False) as gradients, self._inputs.of(self._layers) as states:
            Head(self._model, states, self._progress.stop).gradient(self._seed, gradients[ANSWERS].current)
            self._visitor.begin(gradients)
            self._finish(self._layers)

    def _down(self, left: int) -> None:
        with (
            self._opened(left, kept=True) as gradients,
            self._entering() as entering,
            Prefetch(self._load, ahead=self._ahead) as ready,
        ):
            for layer in reversed(range(left)):
                self._layer(layer, gradients, entering, ready)
                self._finish(layer)
                for stream in gradients.values():
                    stream.side = 1 - stream.side
                self._count([layer])
                self._progress.step(f"layer {layer + 1} of {self._layers} done backwards")

    def _finish(self, left: int) -> None:
        """Vouch for what a step has made, and for what the steps left need."""
        wanted = self._spans(left)
        if left:
            self._files.flush(self._side(left))
        still = [one for one in self._state.seals if Span(one.file, one.start, one.nbytes) in wanted]
        known = {Span(one.file, one.start, one.nbytes) for one in still}
        made = seal(self._work, [span for span in wanted if span not in known])
        self._state.write(Descended(left=left), [*still, *made])
        self._inputs.forget(left)

    @contextmanager
    def _opened(self, left: int, *, kept: bool) -> Iterator[dict[str, Stream]]:
        try:
            yield self._files.open(self._side(left), kept=kept)
        finally:
            self._files.close()

    @contextmanager
    def _entering(self) -> Iterator[Rows]:
        """Where a layer's keys and values lie."""
        text = self._model.skeleton.text
        width = 2 * text.num_key_value_heads * text.head_dim
        buffer = Buffer(self._work / _ENTERING, self._packed.rows, width, torch.float32)
        try:
            yield Rows(buffer)
        finally:
            buffer.close()

    def _layer(self, layer: int, gradients: dict[str, Stream], entering: Rows, ready: _Ready) -> None:
        attention, everyones, *experts = layer_units(self._model.skeleton.config, layer)
        ready.plan((attention, everyones))
        with self._inputs.of(layer) as inputs:
            passes = self._passes(layer, inputs, gradients, entering)
            self._visitor.arrived(layer, passes)
            first, *others = passes.values()
            first.middle(self._taken(attention, ready))
            routing = first.route()
            for one in others:
                one.follow(first)
            if routing is not None:
                experts = [expert_unit(layer, expert) for expert, count in enumerate(routing.counts()) if count]
                ready.plan(experts)
            for unit in (everyones, *experts):
                weights = self._taken(unit, ready)
                for one in passes.values():
                    one.mlp_backward(unit, weights)
            self._visitor.at_middle(layer, passes)
            self._label(attention)
            for one in passes.values():
                one.attention_backward()

    def _passes(
        self, layer: int, inputs: Rows, gradients: dict[str, Stream], entering: Rows
    ) -> dict[str, BackwardPass]:
        """One of each gradient, over the same hidden states."""
        skeleton, middle = self._model.skeleton, gradients[ANSWERS].middle
        stream = Stream("original", (inputs, inputs), middle, 0)
        return {
            name: BackwardPass(skeleton, layer, self._packed, stream, one, entering, self._blocks)
            for name, one in gradients.items()
        }

    def _taken(self, unit: Unit, ready: _Ready) -> UnitWeights:
        check_stop(self._progress.stop)
        self._label(unit)
        return ready.take(unit).weights

    def _load(self, unit: Unit) -> LoadedUnit:
        weights = self._model.weights
        with beside(weights.device):
            loaded = LoadedUnit(unit, load_unit(weights, unit))
        hand_over(loaded.weights.on_device())
        return loaded

    def _label(self, unit: Unit) -> None:
        number = "" if unit.expert is None else f" {unit.expert + 1}"
        what = f"{unit.part.value.replace('_', ' ')}{number}"
        self._progress.label(f"layer {unit.layer + 1} of {self._layers} backwards, {what}")

    def _count(self, layers: Sequence[int]) -> None:
        """Tell progress of layers that need not be run (any more)."""
        model = self._model
        units = [unit for layer in layers for unit in layer_units(model.skeleton.config, layer)]
        self._progress.advance(sum(unit_bytes(model.weights, unit) for unit in units))
