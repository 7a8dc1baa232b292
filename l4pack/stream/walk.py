"""Walking models through their layers side by side, and going on after a kill.

After each layer the outputs are put on disk and then a state (see `work.state`) says which layer is done and what its
outputs are; the inputs of the layer are overwritten only after that. So whatever is killed whenever, a complete layer
is there to go on from. A thread puts and seals them while the next layer's attention is computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from l4pack.errors import StoppedError
from l4pack.stream.embed import embed
from l4pack.stream.hidden import Packed
from l4pack.stream.layer import Blocks, LayerPass, Routing, Stream, side_span
from l4pack.stream.modules import Skeleton
from l4pack.stream.prefetch import Prefetch
from l4pack.stream.units import (
    Part,
    Unit,
    UnitWeights,
    expert_unit,
    feed_forward_unit,
    layer_units,
    load_unit,
    unit_bytes,
)
from l4pack.stream.weights import Weights
from l4pack.work.identity import Identity
from l4pack.work.seal import Span, seal
from l4pack.work.state import Found, StateFile

STATE_NAME = "state.json"


class _Done(Found):
    """Complete layers, and what was said of each."""

    layers: Annotated[int, Field(ge=1)]
    records: list[dict[str, Any]]


class Observer(Protocol):
    """What looks on while models walk; what it says of a layer is kept and survives a kill."""

    def unit(self, model: int, unit: Unit, layer_pass: LayerPass, forward: Callable[[Tensor], Tensor]) -> None:
        """A unit of model number `model` has run; `forward` runs it on other inputs."""

    def routed(self, model: int, layer: int, routing: Routing) -> None:
        """A router has been asked."""

    def layer(self, layer: int, streams: Sequence[Stream]) -> dict[str, Any]:
        """All models are through a layer, its outputs are each stream's `following`; returns plain JSON data."""
        ...


@dataclass(frozen=True)
class Model:
    """A checkpoint on the walk."""

    name: str
    weights: Weights
    skeleton: Skeleton


@dataclass
class Progress:
    """How a walk tells how far it is."""

    advance: Callable[[int], None] = lambda _: None
    label: Callable[[str], None] = lambda _: None
    stop: threading.Event = field(default_factory=threading.Event)


class Walk:
    """Walks one or more models over the same sequences; a context manager."""

    def __init__(
        self,
        models: Sequence[Model],
        packed: Packed,
        work: Path,
        job: Identity,
        *,
        blocks: Blocks | None = None,
        observer: Observer | None = None,
        progress: Progress | None = None,
        release: bool = False,
    ) -> None:
        """`work` is a folder that this process holds; one begun for another `job` is refused with UsageError.

        With `release`, pages of hidden states are let go as soon as they are used, so that they don't count as the
        process's.
        """
        self.models, self.packed, self.work = tuple(models), packed, work
        self.records: list[dict[str, Any]] = []
        self._blocks = blocks or Blocks.on(models[0].skeleton.device, models[0].skeleton.text.hidden_size)
        self._observer = observer
        self._progress = progress or Progress()
        self._release = release
        work.mkdir(parents=True, exist_ok=True)
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: Future[None] | None = None
        self._state = StateFile(work / STATE_NAME, job, _Done)
        self._done = self._read_state()
        self.resumed_layers = self._done
        kept = self._done % 2 if self._done else None
        if not self._done:
            self._state.remove()
        width = models[0].weights.checkpoint.config.text.hidden_size
        self.streams = [Stream(work, model.name, packed.rows, width, model.skeleton.dtype, kept) for model in models]

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *error: Any) -> None:
        self._saver.shutdown(wait=True)
        for stream in self.streams:
            stream.close()

    @property
    def layers(self) -> int:
        """Layers of the models."""
        return self.models[0].weights.checkpoint.config.text.num_hidden_layers

    def run(self) -> None:
        """Walk to the last layer; each stream's `current` then holds its outputs. Raises StoppedError when asked to."""
        if self._done == 0:
            for model, stream in zip(self.models, self.streams, strict=True):
                embed(model.weights, model.skeleton, self.packed, stream.current)
        for number in range(len(self.models)):
            for layer in range(self._done):
                self._count_unread(number, layer, ())
        with Prefetch(self._load) as ready:
            for layer in range(self._done, self.layers):
                self._layer(layer, ready)
        self._settle()

    def _load(self, key: tuple[int, Unit]) -> UnitWeights:
        return load_unit(self.models[key[0]].weights, key[1])

    def _layer(self, layer: int, ready: Prefetch[tuple[int, Unit], UnitWeights]) -> None:
        used: set[int] = set()
        started = time.monotonic()
        for number, model in enumerate(self.models):
            self._progress.label(f"layer {layer + 1} of {self.layers}, {model.name}")
            self._layer_of(number, layer, ready, used)
        rate = self.packed.rows * len(self.models) / max(time.monotonic() - started, 1e-9)
        self._progress.label(f"layer {layer + 1} of {self.layers} done, {rate:,.0f} tokens/s")
        record = self._observer.layer(layer, self.streams) if self._observer else {}
        self._save(layer, record)

    def _layer_of(
        self, number: int, layer: int, ready: Prefetch[tuple[int, Unit], UnitWeights], used: set[int]
    ) -> None:
        config = self.models[number].weights.checkpoint.config
        stream, release = self.streams[number], self._release
        one = LayerPass(self.models[number].skeleton, layer, self.packed, stream, self._blocks, release=release)
        attention, shared = Unit(layer, Part.ATTENTION), feed_forward_unit(config, layer)
        ready.plan([(number, attention), (number, shared)])
        one.attention(self._take(number, attention, ready))
        if self._observer:
            self._observer.unit(number, attention, one, _attention_at_start(one))
        routing = one.route()
        experts = []
        if routing is not None:
            used |= {expert for expert, count in enumerate(routing.counts()) if count}
            experts = [expert_unit(layer, expert) for expert in sorted(used)]
            if self._observer:
                self._observer.routed(number, layer, routing)
        ready.plan((number, unit) for unit in experts)
        self._settle()  # from here on the file is written that a killed run would go on from
        for unit in (shared, *experts):
            module = one.mlp(unit, self._take(number, unit, ready))
            one.feed_forward(unit, module)
            if self._observer:
                self._observer.unit(number, unit, one, module)
        self._count_unread(number, layer, (attention, shared, *experts))
        one.finish()

    def _take(self, number: int, unit: Unit, ready: Prefetch[tuple[int, Unit], UnitWeights]) -> UnitWeights:
        if self._progress.stop.is_set():
            raise StoppedError(
                f"stopped in layer {unit.layer}; the layers before it are kept", hint="run the same command to go on"
            )
        weights = ready.take((number, unit))
        self._progress.advance(unit_bytes(self.models[number].weights, unit))
        return weights

    def _count_unread(self, number: int, layer: int, read: Sequence[Unit]) -> None:
        """Tell progress of a layer's bytes that need not be read: experts without tokens, layers done before."""
        weights = self.models[number].weights
        unread = [unit for unit in layer_units(weights.checkpoint.config, layer) if unit not in set(read)]
        self._progress.advance(sum(unit_bytes(weights, unit) for unit in unread))

    def _save(self, layer: int, record: dict[str, Any]) -> None:
        self.records.append(record)
        found = _Done(layers=layer + 1, records=list(self.records))
        written, spans = [stream.following for stream in self.streams], self._spans(layer + 1)

        def save() -> None:
            for buffer in written:
                buffer.flush()
            self._state.write(found, seal(self.work, spans))

        self._settle()
        self._saving = self._saver.submit(save)
        for stream in self.streams:
            stream.advance()

    def _settle(self) -> None:
        """Wait until the last complete layer is on disk."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def _spans(self, layers: int) -> list[Span]:
        """Where the outputs of the last of so many layers lie."""
        rows, width = self.packed.rows, self.models[0].weights.checkpoint.config.text.hidden_size
        return [side_span(model.name, layers % 2, rows, width, model.skeleton.dtype) for model in self.models]

    def _read_state(self) -> int:
        """Layers that are done and whose outputs are there as they were."""
        found = self._state.read()
        if found is None or len(found.records) != found.layers or found.layers > self.layers:
            return 0
        if not self._state.unbroken(self._spans(found.layers)):
            return 0
        self.records = found.records
        return found.layers


def _attention_at_start(one: LayerPass) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        return one.attention_of(inputs, torch.arange(inputs.shape[1])[None])

    return forward
