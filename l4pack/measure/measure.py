"""Measuring what every unit costs under every option: which changes are run, in which waves, and what is made of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch

from l4pack import __version__
from l4pack.artifact.original import weights_digest
from l4pack.checkpoint.apart import refuse_overlap
from l4pack.checkpoint.parts import weight_parts
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError, UsageError
from l4pack.evaluate.statistics import clusters
from l4pack.measure.changes import Change, Mixture, Single, anchors, mixtures_of, singles_of
from l4pack.measure.costs import (
    CHEAP_FLOP,
    Costs,
    flop_of,
    layer_bytes,
    stream_bytes,
    streams_at_once,
)
from l4pack.measure.identity import model_fingerprint
from l4pack.measure.options import MeasureOptions, family, options_for
from l4pack.measure.predict import Clusters, Estimate, Predictor, added
from l4pack.measure.record import ChangeRecord, Joint, ModelId, Sensitivity, Total, combined
from l4pack.measure.state import State
from l4pack.measure.texts import Texts, load_texts
from l4pack.measure.wave import Shared, Wave
from l4pack.plan.memory import Memory, computing_on, measuring, walk_within
from l4pack.recipe import Calibration
from l4pack.stream.compute import Compute, reproducible
from l4pack.stream.hidden import Packed
from l4pack.stream.identity import text_parts
from l4pack.stream.lanes import Model
from l4pack.stream.layer import Blocks
from l4pack.stream.modules import Skeleton
from l4pack.stream.visitor import Progress
from l4pack.stream.weights import Weights
from l4pack.text.choice import TextChoice
from l4pack.timing.jobs import layer_weights
from l4pack.timing.jobs import measuring as measuring_work
from l4pack.timing.work import Work
from l4pack.work import machine
from l4pack.work.folder import check_writable, owned
from l4pack.work.identity import Identity, flat

WORK_KIND = "measure"


class Direct(StrEnum):
    """Which changes are measured, the rest being predicted."""

    ALL = "all"
    ANCHORS = "anchors"
    AUTO = "auto"


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure, on what, and where."""

    out: Path
    text: TextChoice = field(default_factory=TextChoice)
    calibration: str | None = None
    calibration_samples: int = Calibration().samples
    options: tuple[str, ...] = ()
    direct: Direct = Direct.AUTO
    streams: int | None = None
    compute: str = "auto"
    max_ram: int | None = None
    max_vram: int | None = None
    restart: bool = False

    @property
    def work(self) -> Path:
        """Where hidden states go meanwhile."""
        return self.out.with_name(f"{self.out.name}.partial")


@dataclass(frozen=True)
class PreparedMeasurement:
    """A measurement that can begin: everything read but the weights."""

    checkpoint: Checkpoint
    settings: MeasureSettings
    options: MeasureOptions
    texts: Texts
    compute: Compute
    direct: Direct
    singles: tuple[Single, ...]
    mixtures: tuple[Mixture, ...]
    costs: Costs
    ahead: bool  # whether units are loaded while others compute

    def first(self) -> list[Change]:
        """The changes that are measured whatever is found."""
        return [*self.mixtures, *_direct(self.checkpoint, self.options, self.singles, self.direct)]

    def work(self, device: str) -> list[Work]:
        """What the measurement does, where it is done on that kind of device."""
        text, costs = self.checkpoint.config.text, self.costs
        layers, rows = text.num_hidden_layers, (costs.tokens, costs.calibration_tokens)
        walked = [(layers, rows[0]), (layers, rows[1]), *((layers - change.layer, rows[0]) for change in self.first())]
        changed = Counter((single.role, self.options.schemes[single.option]) for single in self.singles)
        weights, length = layer_weights(self.checkpoint), self.texts.measured.record["sequence_length"]
        return measuring_work(text, weights, walked, changed, rows, costs.waves, length, device)

    def job(self) -> Identity:
        """What decides the figures: an interrupted measurement goes on only with the same."""
        calibration = self.texts.calibration
        calibrated = {} if calibration is None else calibration.record
        parts = {
            "l4pack version": __version__,
            **text_parts(self.texts.measured.record),
            **text_parts(calibrated, "--calibration", "--calibration-samples"),
            "--direct": self.direct.value,
            **self.compute.parts(),
            **weight_parts(self.checkpoint),
        }
        for name, scheme in self.options.schemes.items():
            parts |= flat(scheme.model_dump(mode="json"), f"--options: {name}")
        return Identity(parts)


def prepare_measurement(checkpoint: Checkpoint, settings: MeasureSettings) -> PreparedMeasurement:
    """Check and plan everything that can be without reading a weight.

    Raises SourceError (quantized already, no weights, no tokenizer), UsageError (options, text), BudgetError.
    """
    _check_source(checkpoint)
    _check_out(settings.out)
    options = options_for(checkpoint.config, settings.options)
    texts = load_texts(
        checkpoint, settings.text, settings.calibration, settings.calibration_samples, needed=options.calibrated
    )
    compute = replace(Compute.of(settings.compute), dtype=torch.float32)  # BF16 would drown the smallest changes
    text = checkpoint.config.text
    singles, mixtures = singles_of(checkpoint.config, options), mixtures_of(checkpoint.config, options)
    rows = _tokens(texts)
    streams = streams_at_once(text, rows, compute.dtype, settings.streams, settings.work)
    length = texts.measured.record["sequence_length"]
    direct = _resolved(settings.direct, checkpoint, singles, rows[0], length)
    changes: list[Change] = [*mixtures, *_direct(checkpoint, options, singles, direct)]
    streams = min(streams, len(changes))
    needed, ahead = _memory(checkpoint, settings, compute, texts, options, streams)
    waves = math.ceil(len(changes) / streams)
    kept = sum(rows) * text.hidden_size * compute.dtype.itemsize if waves > 1 else 0
    costs = Costs(
        changes=len(singles),
        direct=len(changes) - len(mixtures),
        joint=len(mixtures),
        streams=streams,
        waves=waves,
        tokens=rows[0],
        calibration_tokens=rows[1],
        flop=flop_of(text, text.num_hidden_layers, sum(rows), length) + _flop(checkpoint, changes, rows[0], length),
        read_bytes=waves * layer_bytes(checkpoint),
        disk_bytes=stream_bytes(text, (streams + 2) * rows[0] + rows[1], compute.dtype) + kept,
        peak_ram_bytes=needed.ram,
    )
    return PreparedMeasurement(
        checkpoint, settings, options, texts, compute, direct, tuple(singles), tuple(mixtures), costs, ahead
    )


def _memory(
    checkpoint: Checkpoint,
    settings: MeasureSettings,
    compute: Compute,
    texts: Texts,
    options: MeasureOptions,
    streams: int,
) -> tuple[Memory, bool]:
    """Of altered streams beside the original's own, over both texts, and whether units are loaded ahead. Raises
    BudgetError."""
    sequences = [*texts.measured.sequences, *(texts.calibration.sequences if texts.calibration else ())]
    computing = computing_on(compute, checkpoint.config, sequences, streams=streams + 2)
    ram, device = machine.memory(settings.max_ram), compute.device_room(settings.max_vram)
    return walk_within(computing, partial(measuring, solved=options.calibrated), ram, device)


def measure(prepared: PreparedMeasurement, progress: Progress | None = None) -> Sensitivity:
    """Run a measurement and write its file. Raises StoppedError; an interrupted one goes on when called again."""
    settings, work = prepared.settings, prepared.settings.work
    refuse_overlap([prepared.checkpoint], work, settings.out)
    check_writable(settings.out.parent)
    with ExitStack() as stack:
        folder = stack.enter_context(owned(work, WORK_KIND, restart=settings.restart))
        stack.enter_context(reproducible())
        job = prepared.job()
        state = State(work, job)
        runner = _Runner(_shared(prepared, job, stack, progress or Progress()), prepared, state)
        runner.run(prepared.first())
        if prepared.direct is Direct.AUTO:
            off = Predictor(prepared.singles, prepared.options, state, runner.clusters).off()
            runner.run([single for single in prepared.singles if family(single.option) in off])
        found = _record(prepared, state, runner.clusters)
        found.write(settings.out)
        folder.remove()
    return found


class _Runner:
    """Runs changes in waves."""

    def __init__(self, shared: Shared, prepared: PreparedMeasurement, state: State) -> None:
        self._shared, self._prepared, self._state = shared, prepared, state
        lengths = [len(item.scored()) for item in shared.measured.sequences]
        self.clusters = Clusters(clusters(lengths))

    def run(self, changes: Sequence[Change]) -> None:
        """Measure what is not measured yet."""
        size = self._prepared.costs.streams
        while left := [change for change in changes if change.key not in self._state.kl]:
            self._wave(left[:size], left[size:])

    def _wave(self, changes: Sequence[Change], later: Sequence[Change]) -> None:
        named = {change.key for change in (*changes, *later)} | set(self._state.errors)
        errors_only = [single for single in self._prepared.singles if single.key not in named]
        keep_at = min((change.layer for change in later), default=None)
        errors, found = Wave(self._shared, changes, errors_only, keep_at=keep_at).run()
        self._state.wave_done(errors, {key: self.clusters.sums(kl) for key, kl in found.items()})


def _check_source(checkpoint: Checkpoint) -> None:
    if checkpoint.config.quantized:
        raise SourceError(
            f"{checkpoint.name} is quantized already",
            hint="measure the original checkpoint: its answers are the measure",
        )


def _check_out(out: Path) -> None:
    if out.is_dir() or not out.parent.is_dir():
        reason = "is a folder" if out.is_dir() else "lies in a folder that is not there"
        raise UsageError(f"--out {out} {reason}", hint="give the name of a file to write")


def _resolved(asked: Direct, checkpoint: Checkpoint, singles: Sequence[Single], tokens: int, length: int) -> Direct:
    """`auto` measures everything where that is cheap."""
    if asked is Direct.AUTO and _flop(checkpoint, singles, tokens, length) <= CHEAP_FLOP:
        return Direct.ALL
    return asked


def _flop(checkpoint: Checkpoint, changes: Iterable[Change], tokens: int, length: int) -> float:
    """Operations of running altered streams from where they begin."""
    text = checkpoint.config.text
    return flop_of(text, sum(text.num_hidden_layers - change.layer for change in changes), tokens, length)


def _direct(checkpoint: Checkpoint, options: MeasureOptions, singles: Iterable[Single], direct: Direct) -> list[Single]:
    """Single changes to measure at first: of anchors, all in the first, middle and last layer, to test predictions."""
    if direct is Direct.ALL:
        return list(singles)
    last = checkpoint.config.text.num_hidden_layers - 1
    probed = {0, last // 2, last}
    return [single for single in singles if single.layer in probed or single.option in anchors(options, single.role)]


def _tokens(texts: Texts) -> tuple[int, int]:
    calibration = texts.calibration
    return texts.measured.record["tokens"], 0 if calibration is None else calibration.record["tokens"]


def _shared(prepared: PreparedMeasurement, job: Identity, stack: ExitStack, progress: Progress) -> Shared:
    checkpoint, compute, texts = prepared.checkpoint, prepared.compute, prepared.texts
    weights = stack.enter_context(Weights(checkpoint, compute.device, compute.dtype))
    return Shared(
        model=Model("original", weights, Skeleton(checkpoint.config, compute.device, compute.dtype)),
        measured=Packed(texts.measured.sequences),
        calibration=None if texts.calibration is None else Packed(texts.calibration.sequences),
        options=prepared.options,
        blocks=Blocks.on(compute.device, checkpoint.config.text.hidden_size),
        work=prepared.settings.work,
        job=job,
        progress=progress,
        ahead=prepared.ahead,
        min_tokens=Calibration().min_tokens,
    )


def _record(prepared: PreparedMeasurement, state: State, cluster: Clusters) -> Sensitivity:
    checkpoint, options = prepared.checkpoint, prepared.options
    predictor = Predictor(prepared.singles, options, state, cluster)
    known = {single: predictor.estimate(single) for single in prepared.singles}
    changes = {single: _change(single, state, cluster, estimate) for single, estimate in known.items()}
    calibration = prepared.texts.calibration
    return Sensitivity(
        l4pack=__version__,
        model=ModelId(
            name=Path(checkpoint.name).name,
            fingerprint=model_fingerprint(checkpoint),
            weights=weights_digest(checkpoint),
            layers=checkpoint.config.text.num_hidden_layers,
        ),
        text=prepared.texts.measured.record,
        calibration={} if calibration is None else calibration.record,
        options=dict(options.schemes),
        changes=list(changes.values()),
        totals=_totals(options, cluster, known),
        joint=[_joint(mixture, prepared, state, cluster, known, changes) for mixture in prepared.mixtures],
        linearity=predictor.linearity(),
    )


def _change(single: Single, state: State, cluster: Clusters, estimate: Estimate) -> ChangeRecord:
    mean, error = cluster.mean_and_error(estimate.sums)
    return ChangeRecord(
        layer=single.layer,
        role=single.role,
        option=single.option,
        error=state.errors[single.key],
        kl=mean,
        kl_standard_error=math.hypot(error, mean * estimate.spread),
        measured=estimate.measured,
        rerouting=min(max(mean, 0.0), estimate.rerouting),
    )


def _totals(options: MeasureOptions, cluster: Clusters, known: dict[Single, Estimate]) -> list[Total]:
    totals = []
    for role, names in options.by_role.items():
        for option in names:
            found = [estimate for single, estimate in known.items() if (single.role, single.option) == (role, option)]
            mean, error = _sum(cluster, found)
            totals.append(Total(role=role, option=option, units=len(found), kl=mean, kl_standard_error=error))
    return totals


def _sum(cluster: Clusters, found: Sequence[Estimate]) -> tuple[float, float]:
    """KL of several changes added up; predictions are taken to be off independently of one another."""
    mean, error = cluster.mean_and_error(added(found))
    spread = [cluster.mean_and_error(estimate.sums)[0] * estimate.spread for estimate in found]
    return mean, math.hypot(error, *spread)


def _joint(
    mixture: Mixture,
    prepared: PreparedMeasurement,
    state: State,
    cluster: Clusters,
    known: dict[Single, Estimate],
    changes: dict[Single, ChangeRecord],
) -> Joint:
    singles = mixture.singles(prepared.checkpoint.config)
    parts = [known[single] for single in singles]
    sums = state.kl[mixture.key]
    measured, error = cluster.mean_and_error(sums)
    gap = [one - other for one, other in zip(sums, added(parts), strict=True)]
    return Joint(
        title=mixture.title,
        choice=dict(mixture.choice),
        predicted=_sum(cluster, parts)[0],
        measured=measured,
        standard_error=error,
        difference_standard_error=cluster.mean_and_error(gap)[1],
        combined=combined(changes[single] for single in singles),
    )
