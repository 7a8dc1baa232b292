"""Measuring what every unit costs under every option: changes in waves, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from l4pack import __version__
from l4pack.artifact.original import weights_digest
from l4pack.checkpoint.apart import refuse_overlap
from l4pack.evaluate.statistics import clusters
from l4pack.measure.changes import Change, Mixture, Single
from l4pack.measure.desk import shared
from l4pack.measure.identity import model_fingerprint
from l4pack.measure.options import MeasureOptions, family
from l4pack.measure.predict import Clusters, Estimate, Predictor, added
from l4pack.measure.prepare import Direct, PreparedMeasurement
from l4pack.measure.record import ChangeRecord, Joint, ModelId, Sensitivity, Total, combined
from l4pack.measure.slopes import SlopePredictor
from l4pack.measure.spread import SpreadWaves, spread_waves
from l4pack.measure.state import State
from l4pack.measure.walk_back import walk_back
from l4pack.measure.wave import Shared, Wave, WaveFound
from l4pack.stream.compute import calibrating
from l4pack.stream.visitor import Progress
from l4pack.work.folder import check_writable, owned

if TYPE_CHECKING:
    from l4pack.cluster.cluster import Cluster

WORK_KIND = "measure"


def measure(
    prepared: PreparedMeasurement, progress: Progress | None = None, cluster: Cluster | None = None
) -> Sensitivity:
    """Run a measurement and write its file; with a `cluster`, its workers run it, to the same bytes.

    Raises StoppedError; an interrupted one goes on when called again. With a cluster UsageError, BudgetError and
    ClusterError too.
    """
    settings, work = prepared.settings, prepared.settings.work
    refuse_overlap([prepared.checkpoint], work, settings.out)
    check_writable(settings.out.parent)
    with ExitStack() as stack:
        folder = stack.enter_context(owned(work, WORK_KIND, restart=settings.restart))
        stack.enter_context(calibrating())
        state = State(work, prepared.job())
        if prepared.direct is Direct.FEW:
            walk_back(prepared, progress or Progress())
        runner = _runner(prepared, state, stack, progress or Progress(), cluster)
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

    def __init__(self, prepared: PreparedMeasurement, state: State) -> None:
        self._prepared, self._state = prepared, state
        lengths = [len(item.scored()) for item in prepared.texts.measured.sequences]
        self.clusters = Clusters(clusters(lengths))

    def run(self, changes: Sequence[Change]) -> None:
        """Measure what is not measured yet."""
        raise NotImplementedError

    def left(self, changes: Sequence[Change]) -> list[Change]:
        """What is not measured yet."""
        return [change for change in changes if change.key not in self._state.kl]

    def errors_only(self, changes: Sequence[Change]) -> list[Single]:
        """Changes beside these whose error is not known yet."""
        named = {change.key for change in changes} | set(self._state.errors)
        return [single for single in self._prepared.singles if single.key not in named]

    def note(self, found: WaveFound) -> None:
        """Keep what came of a wave."""
        kl = {key: self.clusters.sums(one) for key, one in found.kl.items()}
        self._state.wave_done(found.errors, kl, found.terms)


class _Here(_Runner):
    """One wave after another in this process."""

    def __init__(self, prepared: PreparedMeasurement, state: State, shared: Shared) -> None:
        super().__init__(prepared, state)
        self._shared = shared

    def run(self, changes: Sequence[Change]) -> None:
        """Each wave keeps for the next one what that begins with."""
        size = self._prepared.costs.streams
        while left := self.left(changes):
            keep_at = min((change.layer for change in left[size:]), default=None)
            self.note(Wave(self._shared, left[:size], self.errors_only(left), keep_at=keep_at).run())


class _Elsewhere(_Runner):
    """Waves beside one another on a cluster's workers."""

    def __init__(self, prepared: PreparedMeasurement, state: State, waves: SpreadWaves) -> None:
        super().__init__(prepared, state)
        self._waves = waves

    def run(self, changes: Sequence[Change]) -> None:
        """Waves are those of all changes, whatever is measured already: what is left of an earlier run is gone on with."""
        waves = self._prepared.waves(changes)
        left = [some for wave in waves if (some := self.left(wave))]
        if left:
            self._waves.run(left, self.errors_only(changes), self.note)


def _runner(
    prepared: PreparedMeasurement, state: State, stack: ExitStack, progress: Progress, cluster: Cluster | None
) -> _Runner:
    if cluster is None:
        return _Here(prepared, state, shared(prepared, prepared.settings.work, stack, progress))
    return _Elsewhere(prepared, state, spread_waves(prepared, cluster, progress))


def _record(prepared: PreparedMeasurement, state: State, cluster: Clusters) -> Sensitivity:
    checkpoint, options = prepared.checkpoint, prepared.options
    predictor: Predictor | SlopePredictor = (
        SlopePredictor(prepared.singles, state, cluster)
        if prepared.direct is Direct.FEW
        else Predictor(prepared.singles, options, state, cluster)
    )
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
        linearity=predictor.linearity() if isinstance(predictor, Predictor) else None,
        gradients=predictor.fit() if isinstance(predictor, SlopePredictor) else None,
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
