"""Models through their layers and their answers scored: in this process, or on the workers of a cluster, to the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from l4pack.evaluate.answers import Answers, StreamAnswers
from l4pack.evaluate.outcome import Scored, score_models
from l4pack.evaluate.reference import StoredReference
from l4pack.stream.hidden import Packed
from l4pack.stream.lanes import Model
from l4pack.stream.visitor import Visitor
from l4pack.stream.walk import Walk


class Forward(Protocol):
    """Who runs the layers of a walk, as its `visitor`, and scores what comes of it."""

    @property
    def visitor(self) -> Visitor:
        """What the walk is given."""
        ...

    def answers(self, walk: Walk) -> AbstractContextManager[Sequence[Answers]]:
        """Each model's answers, once the walk is at its end."""
        ...

    def score(self, walk: Walk) -> list[Scored]:
        """Each artifact's scores of every scored token, once the walk is at its end. Raises L4packError."""
        ...


@dataclass(frozen=True)
class Here:
    """This process; `stored` are the original's answers where they were kept."""

    models: Sequence[Model]
    packed: Packed
    stored: StoredReference | None = None
    visitor: Visitor = field(default_factory=Visitor)

    @contextmanager
    def answers(self, walk: Walk) -> Iterator[Sequence[Answers]]:
        """See `Forward`."""
        yield [StreamAnswers(model, walk.streams[model.name].current) for model in self.models]

    def score(self, walk: Walk) -> list[Scored]:
        """See `Forward`."""
        with self.answers(walk) as answers:
            return score_models(answers, self.stored, self.packed)
