"""What a walk is made of, and what a visitor may say of it: which experts run, with which weights, and what is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from l4pack.stream.lanes import Model
from l4pack.stream.layer import LayerPass
from l4pack.stream.sides import Stream
from l4pack.stream.units import LoadedUnit, Unit, UnitWeights, unit_bytes
from l4pack.work.progress import Shown


@dataclass(frozen=True)
class Visit:
    """The lanes of one model in one layer; `model` is its number. A visitor may add `passes`."""

    layer: int
    model: int
    passes: dict[str, LayerPass]
    streams: Mapping[str, Stream]
    enter: Callable[[str], LayerPass]  # the pass of any lane of the model, by its name


@dataclass
class Progress(Shown):
    """How a walk tells how far it is, and is told to stop."""

    stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, shown: Shown, stop: threading.Event) -> Progress:
        """What `shown` is told, until `stop` is set."""
        return cls(shown.advance, shown.label, shown.step, stop)


class Visitor:
    """Called by a walk: `resume` once, the others in this order in every layer. As it is, a plain forward pass.

    Every pass of a visit must be run through every unit that it has rows for: the walk adds up what they give.
    Experts come `together` in neighbours, as many at once in every layer, whatever is done of them already.
    """

    together = 1
    elsewhere = False  # whether other processes run the layers, and this one opens no hidden states

    def resume(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """What `leave` gave in the layers done before; returns whether all else that they gave is there too."""
        del records
        return True

    def spread(self, visits: Sequence[Visit], settle: Callable[[], None]) -> bool:
        """Have others run the whole of a layer in all models, from attention on, if hidden states are `elsewhere`; returns
        whether they have.

        `settle` must be called before anything is written to what follows the layer.
        """
        del visits, settle
        return False

    def visit(self, visit: Visit, unit: Unit, weights: UnitWeights) -> None:
        """Run a unit, attention first, then the MLP of all tokens, then experts."""
        for one in visit.passes.values():
            one.run(unit, weights)

    def visit_together(self, visit: Visit, loaded: Sequence[LoadedUnit]) -> None:
        """Run what came together: `together` experts or fewer at a layer's end, or one unit of another part."""
        for one in loaded:
            self.visit(visit, one.unit, one.weights)

    def routed(self, visit: Visit) -> None:
        """The routers of all lanes have been asked."""

    def experts(self, visit: Visit, used: Iterable[int]) -> Iterable[int]:
        """Which experts run, of those `used` by any lane of this model or one before it in this layer."""
        del visit
        return sorted(used)

    def leave(self, layer: int, streams: Mapping[str, Stream]) -> dict[str, Any]:
        """All lanes are through a layer, whose outputs are `following`; returns plain JSON data, which survives a kill."""
        del layer, streams
        return {}

    def size(self, model: Model, unit: Unit) -> int:
        """What a unit counts in progress."""
        return unit_bytes(model.weights, unit)
