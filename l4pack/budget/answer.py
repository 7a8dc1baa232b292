"""One question about memory answered whole: does it fit, up to where, what would fit, and what serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from l4pack.budget.devices import Device, find_host
from l4pack.budget.files import CONTAINERS, FileSubject
from l4pack.budget.model import Budget, budget
from l4pack.budget.named import Asked, Question, alternatives, question_of
from l4pack.budget.record import budget_record
from l4pack.budget.serve import serve_command
from l4pack.budget.solve import LargestLoads, Suggestion, changes, limits
from l4pack.errors import UsageError


@dataclass(frozen=True)
class Answer:
    """Whether a model fits; bytes are of the GPU that decides, and of the dear end of every range."""

    budget: Budget
    largest: LargestLoads
    changes: tuple[Suggestion, ...]  # where it does not fit
    promised_by: str | None  # the recipe whose promise filled in what was not said
    serve: str | None  # the command that serves it, where it fits

    @property
    def fits(self) -> bool:
        """Whether it surely fits."""
        return self.budget.fits

    @property
    def headroom_bytes(self) -> int:
        """Bytes to spare on each GPU; negative where they lack."""
        return self.budget.headroom_bytes

    @property
    def max_context(self) -> int:
        """Most tokens a sequence for this number of sequences; 0 where none fits."""
        return self.largest.max_context

    @property
    def max_sequences(self) -> int:
        """Most sequences of this context; 0 where none fits."""
        return self.largest.max_sequences

    def record(self) -> dict[str, Any]:
        """As JSON."""
        record = budget_record(self.budget, self.largest, self.changes)
        return {"promised_by": self.promised_by, **record, "serve": self.serve}


def answer(asked: Asked, runtime: str, devices: dict[str, Device]) -> Answer:
    """Budget for what is asked, on devices known by name. Raises SourceError, RecipeError and UsageError."""
    question = question_of(asked)
    _check_loaded(question, runtime)
    found = budget(question.subject, find_host(question.device, devices), question.load, runtime)
    others = alternatives(question.source, question.subject)
    tried = [] if found.fits else changes(found, question.load, runtime, devices, others)
    made = question.subject.config.quantized or isinstance(question.subject, FileSubject)
    serve = serve_command(found, question.source if made else "ARTIFACT")
    return Answer(found, limits(found), tuple(tried), question.promised_by, serve)


def _check_loaded(question: Question, runtime: str) -> None:
    """Raise UsageError for an artifact, or one to come, that no server loads: memory is that of the files made of it."""
    reader = question.subject.exported_for
    if reader is None or runtime in CONTAINERS:
        return
    way = f"l4pack fit SOURCE --runtime {reader.runtime} plans for a device"
    if question.recipe is None:
        way = f"budget what l4pack export {question.source} --to {reader.container} --out DIR makes"
    raise UsageError(
        f"{runtime} does not load {question.recipe or question.source}: it is for {reader.runtime}", hint=way
    )
