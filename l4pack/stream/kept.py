"""What of a walk is on disk: the outputs of its last complete layer, and inputs copied for a walk that begins later.

A state (see `work.state`) says so after it is true. It vouches for one side of the lanes' files while the other side is
written, so whatever is killed whenever, a complete layer is there to go on from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from l4pack.stream.lanes import COPY_ENDING
from l4pack.work.identity import Identity
from l4pack.work.seal import Seal, Span, seal
from l4pack.work.state import Found, StateFile

STATE_NAME = "state.json"
_Steps = Annotated[int, Field(ge=0)]


class Walked(Found):
    """`layers` are the steps done; `records` are of those since the walk `begun`. `kept` is the step of the copies."""

    lanes: list[str] = Field(default=[])
    begun: _Steps = 0
    layers: _Steps = 0
    records: list[dict[str, Any]] = Field(default=[])
    kept: _Steps | None = None


class WalkState:
    """The state of the walks of one job, which come one after another in its folder."""

    def __init__(self, folder: Path, job: Identity) -> None:
        """Read what is there. Raises UsageError naming what changed when it belongs to another job."""
        self._folder = folder
        self._file = StateFile(folder / STATE_NAME, job, Walked)
        self._walked = self._file.read() or Walked()

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of each step done since the walk has begun."""
        return list(self._walked.records)

    def done(self, lanes: Sequence[str], most: int, spans: Callable[[int], Sequence[Span]]) -> int:
        """Steps that these lanes have behind them, if what those gave is as it was; `spans` tells where that lies."""
        known = self._walked
        sound = known.begun < known.layers <= most and len(known.records) == known.layers - known.begun
        same = known.lanes == list(lanes) and sound
        return known.layers if same and self._file.unbroken(spans(known.layers)) else 0

    def keeps(self, step: int, spans: Sequence[Span]) -> bool:
        """Whether that step's inputs are copied and are as they were."""
        return self._walked.kept == step and self._file.unbroken(spans)

    @property
    def kept(self) -> int | None:
        """The step whose inputs are copied."""
        return self._walked.kept

    def begin(self, lanes: Sequence[str], step: int) -> None:
        """Vouch for nothing but copies of that step's inputs, if there are any; call before other data is touched."""
        kept = step if self._walked.kept == step else None
        self._walked = Walked(lanes=list(lanes), begun=step, layers=step, kept=kept)
        self._write([] if kept is None else self._copies())

    def finish(self, records: Sequence[dict[str, Any]], spans: Sequence[Span], *, forget: bool) -> None:
        """Note all steps since the walk has begun, the last one's outputs being on disk in `spans`; with `forget`, that nothing
        is copied any more."""
        known = self._walked
        changes = {"layers": known.begun + len(records), "records": list(records)}
        self._walked = known.model_copy(update=changes | ({"kept": None} if forget else {}))
        self._write([*seal(self._folder, spans), *([] if forget else self._copies())])

    def keep(self, step: int, spans: Sequence[Span]) -> None:
        """Note that a step's inputs are copied, on disk in `spans`."""
        self._walked = self._walked.model_copy(update={"kept": step})
        outputs = [one for one in self._file.seals if not one.file.endswith(COPY_ENDING)]
        self._write([*outputs, *seal(self._folder, spans)])

    def _copies(self) -> list[Seal]:
        return [one for one in self._file.seals if one.file.endswith(COPY_ENDING)]

    def _write(self, seals: Sequence[Seal]) -> None:
        self._file.write(self._walked, seals)
