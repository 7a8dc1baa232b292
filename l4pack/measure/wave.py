"""A visitor that takes the original stream and many altered ones beside it through one pass over the weights.

    original --+------------------------------------> compared at the end with
               |
               +-- layer 3, shared expert int4 ------> its altered stream
               +-- layer 7, attention fp8 -----------> its altered stream

An altered stream begins where its unit is: until there it is the original. In that layer its MLP's output is the
original layer's, plus what the altered unit gives more; from there on the original weights run it. So every weight is
read once for all streams, and every unit is quantized once for each option.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4pack.evaluate.answers import StreamAnswers
from l4pack.evaluate.scoring import score_against
from l4pack.gradient.keep import Place
from l4pack.measure.altered import Solving, altered
from l4pack.measure.changes import Change, Mixture, Single
from l4pack.measure.options import MeasureOptions
from l4pack.measure.terms import LayerTerms, Slopes, Terms
from l4pack.model.tensors import Role
from l4pack.stream.hidden import Packed, Rows
from l4pack.stream.lanes import NEVER, Lane, Model
from l4pack.stream.layer import Blocks, Forward, LayerPass
from l4pack.stream.sides import Stream, copy_rows
from l4pack.stream.units import Part, Unit, UnitWeights
from l4pack.stream.visitor import Progress, Visit, Visitor
from l4pack.stream.walk import Walk
from l4pack.work.identity import Identity

ORIGINAL, CALIBRATION = "original", "calibration"
SCRATCH = "scratch"  # where a unit is tried that has no stream of its own
_FILES = "altered"


@dataclass(frozen=True)
class Shared:
    """What all waves of a measurement share. `calibration` holds the tokens that calibrated options are solved for, `slopes`
    the gradients where changes are predicted from them."""

    model: Model
    measured: Packed
    calibration: Packed | None
    options: MeasureOptions
    blocks: Blocks
    work: Path
    job: Identity
    progress: Progress
    ahead: bool
    min_tokens: int
    slopes: Slopes | None = None


@dataclass(frozen=True)
class WaveFound:
    """Relative errors of single changes, their terms where there are gradients, and KL of every scored token by change."""

    errors: dict[str, float]
    terms: dict[str, Terms]
    kl: dict[str, Tensor]


class Wave(Visitor):
    """Altered streams that walk together."""

    def __init__(
        self,
        shared: Shared,
        changes: Sequence[Change],
        errors_only: Sequence[Single],
        *,
        keep_at: int | None = None,
    ) -> None:
        """`errors_only` are changes without a stream, whose relative error is found on the way. `keep_at` is the layer
        that the next wave begins in, whose inputs are kept for it."""
        self.shared, self.changes = shared, tuple(changes)
        self.errors_only = {single.key for single in errors_only}
        self._keep_at = keep_at
        self._first = min(change.layer for change in (*changes, *errors_only))
        self._calibrated = max(map(self._calibrated_layers, (*changes, *errors_only)))
        self._layer: _Layer | None = None

    def run(self) -> WaveFound:
        """Walk to the end. Raises StoppedError when asked to; a wave of the same changes then goes on."""
        shared = self.shared
        with Walk(
            self._lanes(), shared.work, shared.job, self, blocks=shared.blocks, progress=shared.progress, release=True,
            first=self._first, keep=self._keep_at, ahead=shared.ahead,
        ) as walk:  # fmt: skip
            try:
                walk.run()
            finally:
                self._close()
            errors = {key: error for record in walk.records for key, error in record["errors"].items()}
            terms = {key: Terms(**found) for record in walk.records for key, found in record["terms"].items()}
            return WaveFound(errors, terms, self._scored(walk.streams))

    def _close(self) -> None:
        if self._layer is not None:
            self._layer.close()
        self._layer = None

    def _lanes(self) -> list[Lane]:
        """The original on both texts, and the altered streams: each begins whole in the layer after its change."""
        model, measured, calibration = self.shared.model, self.shared.measured, self.shared.calibration
        lanes = [Lane(ORIGINAL, model, measured, kept=True)]
        ends = max(self._calibrated, self._keep_at or 0)
        if calibration is not None and ends:
            lanes.append(Lane(CALIBRATION, model, calibration, ends=ends, kept=True))
        begins = {change.key: 0 if isinstance(change, Mixture) else change.layer + 1 for change in self.changes}
        begins[SCRATCH] = NEVER
        return lanes + [Lane(name, model, measured, begins=step, files=_FILES) for name, step in begins.items()]

    def _calibrated_layers(self, change: Change) -> int:
        """How many layers the calibration text walks for a change: to the last in which it is solved on it."""
        config, schemes = self.shared.model.weights.checkpoint.config, self.shared.options.schemes
        singles = change.singles(config) if isinstance(change, Mixture) else [change]
        return max((single.layer + 1 for single in singles if schemes[single.option].calibrated), default=0)

    def visit(self, visit: Visit, unit: Unit, weights: UnitWeights) -> None:
        """Run a unit, as it is and as changes have it, in every stream."""
        if self._layer is None:
            self._layer = _Layer(self, visit)
        self._layer.visit(unit, weights)

    def leave(self, layer: int, streams: Mapping[str, Stream]) -> dict[str, Any]:
        """Relative errors and terms of the single changes made in a layer."""
        del layer, streams
        assert self._layer is not None
        found = self._layer.leave()
        self._close()
        return found

    def _scored(self, streams: Mapping[str, Stream]) -> dict[str, Tensor]:
        self.shared.progress.label(f"scoring {len(self.changes)} altered streams")
        model, packed = self.shared.model, self.shared.measured
        answers = [_Answers(model, streams[change.key].current) for change in self.changes]
        original = _Answers(model, streams[ORIGINAL].current)
        rows = packed.scored_rows()
        found = score_against(original, answers, (rows, rows), packed.targets(), one_head=True)
        return {change.key: scores.kl for change, scores in zip(self.changes, found, strict=True)}


class _Answers(StreamAnswers):
    """A stream's answers, its pages let go as soon as they are read."""

    def __init__(self, model: Model, outputs: Rows) -> None:
        super().__init__(model, outputs)
        self._rows = outputs

    def normed(self, rows: Tensor) -> Tensor:
        """See `evaluate.answers.Answers`."""
        found = super().normed(rows)
        self._rows.release()
        return found


class _Layer:
    """One layer of a wave."""

    def __init__(self, wave: Wave, visit: Visit) -> None:
        self._wave, self._shared, self._visit, self._index = wave, wave.shared, visit, visit.layer
        self._original, self._calibration = visit.passes[ORIGINAL], visit.passes.get(CALIBRATION)
        self._begun: list[Stream] = []  # whose MLP is altered here: they get the original's outputs and a difference
        self._errors: dict[str, tuple[float, float]] = {}
        self._terms = None if self._shared.slopes is None else LayerTerms(self._shared.slopes, visit.layer)

    def close(self) -> None:
        """Close the layer's gradients."""
        if self._terms is not None:
            self._terms.close()

    def visit(self, unit: Unit, weights: UnitWeights) -> None:
        """Run a unit in every stream."""
        if unit.part is Part.ATTENTION:
            self._attention(unit, weights)
        else:
            self._feed_forward(unit, weights)

    @torch.inference_mode()
    def leave(self) -> dict[str, Any]:
        """Complete the streams that began here; relative errors and terms of the single changes made here."""
        for stream in self._begun:
            for rows in self._rows():
                stream.following.data[rows] += self._visit.streams[ORIGINAL].following.data[rows]
                stream.following.release()
        terms = {} if self._terms is None else self._terms.found()
        return {
            "errors": {key: _ratio(*squares) for key, squares in self._errors.items()},
            "terms": {key: found.model_dump() for key, found in terms.items()},
        }

    def _originals(self) -> list[LayerPass]:
        return [self._original, *([self._calibration] if self._calibration else [])]

    def _walking(self) -> Iterator[tuple[Change, LayerPass]]:
        """Altered streams that go through the whole layer, or what follows their attention."""
        for change in self._wave.changes:
            if (one := self._visit.passes.get(change.key)) is not None:
                yield change, one

    def _single(self, role: Role, option: str) -> Single:
        return Single(self._index, role, option)

    def _altered_here(self, role: Role) -> list[str]:
        """Options that a unit of this layer must be quantized to, for a stream or for its error."""
        mixed = {change.option_at(self._index, role) for change, _ in self._walking() if isinstance(change, Mixture)}
        here = (self._index, role)
        single = {one.option for one in self._wave.changes if isinstance(one, Single) and one.unit == here}
        names = self._shared.options.by_role.get(role, ())
        wanted = {name for name in names if self._single(role, name).key in self._wave.errors_only}
        return [name for name in names if name in mixed | single | wanted]

    def _unaltered(self, role: Role) -> Iterator[LayerPass]:
        for change, one in self._walking():
            if change.option_at(self._index, role) is None:
                yield one

    def _mixed(self, role: Role, option: str) -> Iterator[LayerPass]:
        for change, one in self._walking():
            if isinstance(change, Mixture) and change.option_at(self._index, role) == option:
                yield one

    def _altered(self, unit: Unit, weights: UnitWeights, option: str) -> UnitWeights:
        scheme = self._shared.options.schemes[option]
        calibration = Solving(self._calibration, self._shared.min_tokens) if self._calibration is not None else None
        activation = self._shared.model.skeleton.text.hidden_act
        with torch.inference_mode():
            return altered(self._shared.model.weights, unit, weights, scheme, activation, calibration)

    def _attention(self, unit: Unit, weights: UnitWeights) -> None:
        for one in (*self._originals(), *self._unaltered(Role.ATTENTION)):
            one.attention(weights)
        for option in self._altered_here(Role.ATTENTION):
            changed = self._altered(unit, weights, option)
            for one in self._mixed(Role.ATTENTION, option):
                one.attention(changed)
            self._alter_attention(self._single(Role.ATTENTION, option), changed)

    def _alter_attention(self, single: Single, changed: UnitWeights) -> None:
        own = single.key in self._visit.streams
        if not own and single.key not in self._wave.errors_only:
            return
        name = single.key if own else SCRATCH
        used, stream = self._visit.streams[name], self._visit.streams[ORIGINAL]
        copy_rows(used.current, stream.current)
        one = self._visit.enter(name)
        one.attention(changed)
        if own:
            self._visit.passes[name] = one
        difference = size = 0.0
        for rows in self._rows():
            moved = used.middle.data[rows].double() - stream.middle.data[rows].double()
            difference += _energy(moved)
            size += _energy(stream.middle.data[rows].double() - stream.current.data[rows].double())
            if self._terms is not None:
                self._terms.add(single.key, Place.MIDDLE, rows, moved.float())
            used.middle.release()
        self._errors[single.key] = difference, size

    def _feed_forward(self, unit: Unit, weights: UnitWeights) -> None:
        role = Role(unit.part.value)
        module = self._original.mlp(unit, weights)
        for one in (*self._originals(), *self._unaltered(role)):
            one.feed_forward(unit, module)
        rows, _ = self._original.rows_of(unit)
        for option in self._altered_here(role):
            mixed = [one for one in self._mixed(role, option) if _has_rows(one, unit)]
            if not mixed and rows is not None and not len(rows):
                continue
            changed = self._original.mlp(unit, self._altered(unit, weights, option))
            for one in mixed:
                one.feed_forward(unit, changed)
            self._alter_mlp(self._single(role, option), unit, module, changed)

    @torch.inference_mode()
    def _alter_mlp(self, single: Single, unit: Unit, module: Forward, changed: Forward) -> None:
        stream = self._visit.streams.get(single.key)
        if stream is None and single.key not in self._wave.errors_only:
            return
        if stream is not None and stream not in self._begun:
            self._begun.append(stream)
            copy_rows(stream.following, None)
        difference, size = self._errors.get(single.key, (0.0, 0.0))
        for rows, inputs in self._original.inputs(unit):
            output = module(inputs).float()
            moved = changed(inputs).float() - output
            difference += _energy(moved.double())
            size += _energy(output.double())
            if self._terms is not None:
                self._terms.add(single.key, Place.OUTPUTS, rows, moved)
            if stream is not None:
                stream.following.data[rows] += moved.to(stream.following.data)
                stream.following.release()
        self._errors[single.key] = difference, size

    def _rows(self) -> Iterator[slice]:
        count, step = self._shared.measured.rows, self._shared.blocks.rows
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))
            self._original.let_go()


def _has_rows(one: LayerPass, unit: Unit) -> bool:
    rows, _ = one.rows_of(unit)
    return rows is None or len(rows) > 0


def _energy(values: Tensor) -> float:
    """Sum of squares, row by row first: torch shares out a sum of everything among threads, and their number would show."""
    return float(values.square().sum(-1).sum())


def _ratio(difference: float, size: float) -> float:
    """||y' - y||^2 / ||y||^2; a unit that gives nothing loses nothing."""
    return difference / size if size > 0 else 0.0
