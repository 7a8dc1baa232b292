"""One pass over the weights with the original stream and many altered ones beside it.

    original --+------------------------------------> compared at the end with
               |
               +-- layer 3, shared expert int4 ------> its altered stream
               +-- layer 7, attention fp8 -----------> its altered stream

An altered stream begins where its unit is: until there it is the original. In that layer its MLP's output is the
original layer's, plus what the altered unit gives more; from there on the original weights run it. So every weight is
read once for all streams, and every unit is quantized once for each option.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from l4pack.errors import StoppedError
from l4pack.evaluate.answers import StreamAnswers
from l4pack.evaluate.scoring import divergences
from l4pack.measure.altered import Blocks as Inputs
from l4pack.measure.altered import altered, calibration_inputs
from l4pack.measure.changes import Change, Mixture, Single
from l4pack.measure.lanes import SCRATCH, Lane, Lanes, copy_rows, lane_span
from l4pack.measure.options import Options
from l4pack.measure.originals import Originals
from l4pack.measure.state import State
from l4pack.model.tensors import Role
from l4pack.stream.hidden import Buffer, Packed
from l4pack.stream.layer import Blocks, Forward, LayerPass, Stream, side_span
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
from l4pack.stream.walk import Model, Progress
from l4pack.work.seal import Span


@dataclass(frozen=True)
class Job:
    """What all waves of a measurement share. `calibration` holds the tokens that calibrated options are solved for."""

    model: Model
    measured: Packed
    calibration: Packed | None
    options: Options
    blocks: Blocks
    work: Path
    progress: Progress
    min_tokens: int

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.model.weights.checkpoint.config.text.num_hidden_layers


class Wave:
    """Altered streams that walk together; a context manager that leaves its files for a run that goes on."""

    def __init__(
        self,
        job: Job,
        changes: Sequence[Change],
        errors_only: Sequence[Single],
        state: State,
        *,
        keep_at: int | None = None,
    ) -> None:
        """`errors_only` are changes without a stream, whose relative error is found on the way. `keep_at` is the layer
        that the next wave begins in, whose inputs are kept for it."""
        self.job, self.changes = job, tuple(changes)
        self.errors_only = {single.key for single in errors_only}
        self._state, self._keep_at = state, keep_at
        self._first = min(change.layer for change in (*changes, *errors_only))
        self._calibrated_to = max(map(self._last_calibrated, (*changes, *errors_only)))
        names = [change.key for change in changes]
        self._done = state.begin(names, self._spans)
        kept = self._done % 2 if self._done else None
        self.lanes = Lanes(job.work, names, job.measured.rows, self._width, job.model.skeleton.dtype, kept)
        self.originals = Originals(job.work, job.model, job.measured, job.calibration, self._kept_sides(kept))

    def _kept_sides(self, side: int | None) -> tuple[int | None, int | None]:
        """The calibration text's side is kept only where the last layer was calibrated on it."""
        return side, side if self.calibrates(self._done - 1) else None

    @property
    def _width(self) -> int:
        return int(self.job.model.skeleton.text.hidden_size)

    def run(self) -> dict[str, Tensor]:
        """Walk to the end; KL of every scored token by change. Raises StoppedError when asked to."""
        first = self._done or self._begin()
        self._set_side(first % 2)
        if first and first == self._keep_at and self._state.kept != first:
            self._keep()
        weights = self.job.model.weights
        for layer in range(first):
            self.count(layer_units(weights.checkpoint.config, layer))
        with Prefetch[Unit, UnitWeights](lambda unit: load_unit(weights, unit)) as ready:
            for layer in range(first, self.job.layers):
                self.job.progress.label(f"layer {layer + 1} of {self.job.layers}, {len(self.changes)} altered streams")
                self._save(layer, _Layer(self, layer, ready).run())
        return self._scored()

    def calibrates(self, layer: int) -> bool:
        """Whether the calibration text is needed in a layer, or after it."""
        return layer <= self._calibrated_to or layer < (self._keep_at or 0)

    def close(self) -> None:
        """Close the files, which stay."""
        self.originals.close()
        self.lanes.close()

    def _begin(self) -> int:
        """Put the first layer's inputs in place; returns that layer."""
        first = self._first
        if first and self._state.keeps(first, self.originals.kept_spans()):
            self._set_side(first % 2)
            self.originals.restore()
            return first
        self._set_side(0)
        self.originals.embed()
        for change in self.changes:
            if isinstance(change, Mixture):
                copy_rows(self.lanes[change.key].current, self.originals.measured.current)
        return 0

    def _last_calibrated(self, change: Change) -> int:
        """The last layer in which a change is solved for the calibration text; -1 for none."""
        config, schemes = self.job.model.weights.checkpoint.config, self.job.options.schemes
        singles = change.singles(config) if isinstance(change, Mixture) else [change]
        return max((single.layer for single in singles if schemes[single.option].calibrated), default=-1)

    def take(self, unit: Unit, ready: Prefetch[Unit, UnitWeights]) -> UnitWeights:
        """A unit's weights. Raises StoppedError when asked to stop."""
        if self.job.progress.stop.is_set():
            raise StoppedError(
                f"stopped in layer {unit.layer}; the layers before it are kept", hint="run the same command to go on"
            )
        self.count([unit])
        return ready.take(unit)

    def count(self, units: Sequence[Unit]) -> None:
        """Tell progress of units that are read, or need not be."""
        self.job.progress.advance(sum(unit_bytes(self.job.model.weights, unit) for unit in units))

    def _save(self, layer: int, errors: dict[str, float]) -> None:
        following = layer + 1
        self.originals.flush()
        self.lanes.flush(following % 2)
        # What is kept is forgotten before it is overwritten: a run killed between has this wave's own files.
        self._state.layer_done(layer, errors, self._spans(following), forget=following == self._keep_at)
        self._set_side(following % 2)
        if following == self._keep_at:
            self._keep()

    def _keep(self) -> None:
        assert self._keep_at is not None
        self.originals.keep()
        self._state.keep(self._keep_at, self.originals.kept_spans())

    def _spans(self, layers: int) -> list[Span]:
        """Where the outputs of the last of so many layers lie: of the originals that went through it, and of the lanes
        that had begun; the others' rows are made when they begin."""
        side, dtype = layers % 2, self.job.model.skeleton.dtype
        spans = [side_span("original", side, self.job.measured.rows, self._width, dtype)]
        if self.job.calibration is not None and self.calibrates(layers - 1):
            spans.append(side_span("calibration", side, self.job.calibration.rows, self._width, dtype))
        lane_bytes = self.job.measured.rows * self._width * dtype.itemsize
        for number, change in enumerate(self.changes):
            if isinstance(change, Mixture) or change.layer < layers:
                spans.append(lane_span(number, side, lane_bytes))
        return spans

    def _set_side(self, side: int) -> None:
        self.originals.set_side(side)
        self.lanes.set_side(side)

    def _scored(self) -> dict[str, Tensor]:
        self.job.progress.label(f"scoring {len(self.changes)} altered streams")
        model, packed = self.job.model, self.job.measured
        answers = [_Answers(model, self.lanes[change.key].current) for change in self.changes]
        original = _Answers(model, self.originals.measured.current)
        found = divergences(original, answers, packed.scored_rows(), packed.targets())
        return {change.key: kl for change, kl in zip(self.changes, found, strict=True)}


class _Answers(StreamAnswers):
    """A stream's answers, its pages let go as soon as they are read."""

    def __init__(self, model: Model, outputs: Buffer) -> None:
        super().__init__(model, outputs)
        self._buffer = outputs

    def normed(self, rows: Tensor) -> Tensor:
        """See `evaluate.answers.Answers`."""
        found = super().normed(rows)
        self._buffer.release()
        return found


class _Layer:
    """One layer of a wave."""

    def __init__(self, wave: Wave, layer: int, ready: Prefetch[Unit, UnitWeights]) -> None:
        self._wave, self._job, self._index, self._ready = wave, wave.job, layer, ready
        self._config = self._job.model.weights.checkpoint.config
        self._original = self._pass(wave.originals.measured, self._job.measured)
        self._calibration: LayerPass | None = None
        calibration = wave.originals.calibration
        if calibration is not None and self._job.calibration is not None and wave.calibrates(layer):
            self._calibration = self._pass(calibration, self._job.calibration)
        self._walking = {
            change: self._pass(wave.lanes[change.key], self._job.measured)
            for change in wave.changes
            if change.layer < layer or isinstance(change, Mixture)
        }
        self._begun: list[Lane] = []  # whose MLP is altered here: they get the original's outputs and a difference
        self._errors: dict[str, tuple[float, float]] = {}

    def run(self) -> dict[str, float]:
        """Walk all streams through the layer; relative errors of the single changes made here."""
        attention, shared = Unit(self._index, Part.ATTENTION), feed_forward_unit(self._config, self._index)
        self._ready.plan([attention, shared])
        self._attention(attention, self._wave.take(attention, self._ready))
        for one in self._passes():
            one.route()
        experts = self._experts()
        self._ready.plan(experts)
        for unit in (shared, *experts):
            self._feed_forward(unit, self._wave.take(unit, self._ready))
        read = {attention, shared, *experts}
        self._wave.count([unit for unit in layer_units(self._config, self._index) if unit not in read])
        self._finish()
        return {key: _ratio(*squares) for key, squares in self._errors.items()}

    def _pass(self, stream: Stream, packed: Packed) -> LayerPass:
        skeleton, job = self._job.model.skeleton, self._job
        return LayerPass(skeleton, self._index, packed, stream, job.blocks, release=True)

    def _passes(self) -> Iterator[LayerPass]:
        """Every stream that walks through the whole layer."""
        yield self._original
        if self._calibration is not None:
            yield self._calibration
        yield from self._walking.values()

    def _experts(self) -> list[Unit]:
        """Experts that any stream gives a token to."""
        used = {
            expert
            for one in self._passes()
            if one.routing is not None
            for expert, count in enumerate(one.routing.counts())
            if count
        }
        return [expert_unit(self._index, expert) for expert in sorted(used)]

    def _single(self, role: Role, option: str) -> Single:
        return Single(self._index, role, option)

    def _altered_here(self, role: Role) -> list[str]:
        """Options that a unit of this layer must be quantized to, for a stream or for its error."""
        mixed = {change.option_at(self._index, role) for change in self._walking if isinstance(change, Mixture)}
        here = (self._index, role)
        single = {one.option for one in self._wave.changes if isinstance(one, Single) and one.unit == here}
        names = self._job.options.by_role.get(role, ())
        wanted = {name for name in names if self._single(role, name).key in self._wave.errors_only}
        return [name for name in names if name in mixed | single | wanted]

    def _unaltered(self, role: Role) -> Iterator[LayerPass]:
        for change, one in self._walking.items():
            if change.option_at(self._index, role) is None:
                yield one

    def _mixed(self, role: Role, option: str) -> Iterator[LayerPass]:
        for change, one in self._walking.items():
            if isinstance(change, Mixture) and change.option_at(self._index, role) == option:
                yield one

    def _lane(self, single: Single) -> Lane | None:
        return self._wave.lanes.get(single.key)

    def _altered(self, unit: Unit, weights: UnitWeights, option: str) -> UnitWeights:
        scheme = self._job.options.schemes[option]
        inputs: Inputs | None = None
        if scheme.calibrated and self._calibration is not None and self._job.calibration is not None:
            tokens = self._job.calibration.rows
            inputs = calibration_inputs(unit, self._calibration, tokens, self._job.min_tokens)
        activation = self._job.model.skeleton.text.hidden_act
        with torch.inference_mode():
            return altered(self._job.model.weights, unit, weights, scheme, activation, inputs)

    def _attention(self, unit: Unit, weights: UnitWeights) -> None:
        originals = [self._original, *([self._calibration] if self._calibration else [])]
        for one in (*originals, *self._unaltered(Role.ATTENTION)):
            one.attention(weights)
        for option in self._altered_here(Role.ATTENTION):
            changed = self._altered(unit, weights, option)
            for one in self._mixed(Role.ATTENTION, option):
                one.attention(changed)
            self._alter_attention(self._single(Role.ATTENTION, option), changed)

    def _alter_attention(self, single: Single, changed: UnitWeights) -> None:
        lane = self._lane(single)
        if lane is None and single.key not in self._wave.errors_only:
            return
        used = lane or self._wave.lanes[SCRATCH]
        copy_rows(used.current, self._wave.originals.measured.current)
        one = self._pass(used, self._job.measured)
        one.attention(changed)
        if lane is not None:
            self._walking[single] = one
        stream = self._wave.originals.measured
        difference = size = 0.0
        for rows in self._rows():
            difference += _squared(used.middle.data[rows], stream.middle.data[rows])
            size += _squared(stream.middle.data[rows], stream.current.data[rows])
            used.middle.release()
        self._errors[single.key] = difference, size

    def _feed_forward(self, unit: Unit, weights: UnitWeights) -> None:
        role = Role(unit.part.value)
        originals = [self._original, *([self._calibration] if self._calibration else [])]
        module = self._original.mlp(unit, weights)
        for one in (*originals, *self._unaltered(role)):
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
        lane = self._lane(single)
        if lane is None and single.key not in self._wave.errors_only:
            return
        if lane is not None and lane not in self._begun:
            self._begun.append(lane)
            copy_rows(lane.following, None)
        difference, size = self._errors.get(single.key, (0.0, 0.0))
        for rows, inputs in self._original.inputs(unit):
            output = module(inputs).float()
            moved = changed(inputs).float() - output
            difference += _energy(moved.double())
            size += _energy(output.double())
            if lane is not None:
                lane.following.data[rows] += moved.to(lane.following.data)
                lane.following.release()
        self._errors[single.key] = difference, size

    @torch.inference_mode()
    def _finish(self) -> None:
        for one in self._passes():
            one.finish()
        for lane in self._begun:
            for rows in self._rows():
                lane.following.data[rows] += self._wave.originals.measured.following.data[rows]
                lane.following.release()

    def _rows(self) -> Iterator[slice]:
        count, step = self._job.measured.rows, self._job.blocks.rows
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))
            self._original.let_go()


def _has_rows(one: LayerPass, unit: Unit) -> bool:
    rows, _ = one.rows_of(unit)
    return rows is None or len(rows) > 0


def _squared(first: Tensor, second: Tensor) -> float:
    """||first - second||^2."""
    return _energy(first.double() - second.double())


def _energy(values: Tensor) -> float:
    """Sum of squares, row by row first: torch shares out a sum of everything among threads, and their number would show."""
    return float(values.square().sum(-1).sum())


def _ratio(difference: float, size: float) -> float:
    """||y' - y||^2 / ||y||^2; a unit that gives nothing loses nothing."""
    return difference / size if size > 0 else 0.0
