"""Artifacts of one original beside each other: one pass over its weights and theirs, and what sets them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import Tensor

from l4pack.checkpoint.source import Checkpoint
from l4pack.evaluate.evaluate import Pass, PreparedEvaluation, prepare_evaluation
from l4pack.evaluate.inputs import EvaluationSettings
from l4pack.evaluate.outcome import Scored
from l4pack.evaluate.spread import Crew
from l4pack.evaluate.statistics import clusters, mean_and_error
from l4pack.stream.visitor import Progress
from l4pack.work.folder import owned

if TYPE_CHECKING:
    from l4pack.cluster.cluster import Cluster

WORK_KIND = "compare"


@dataclass(frozen=True)
class Difference:
    """By how much one artifact's mean lies above another's, numbers of `records`, on the same tokens.

    Both err on the same tokens, so the difference is known better than either mean: its standard error is taken of
    single tokens' differences. Nats of KL, and a share of tokens with the original's likeliest token.
    """

    artifact: int
    than: int
    kl_difference: float
    kl_difference_standard_error: float | None
    top1_agreement_difference: float
    top1_agreement_difference_standard_error: float | None


@dataclass(frozen=True)
class Comparison:
    """A record of `accuracy.json` for every artifact, as `evaluate` makes it, and all pairs' differences."""

    records: tuple[dict[str, Any], ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class PreparedComparison:
    """A comparison that is ready to run, as one evaluation for each artifact."""

    evaluations: tuple[PreparedEvaluation, ...]

    def run(self, cluster: Cluster | None = None) -> Comparison:
        """Walk, score and sum up, on the workers of a `cluster` if there is one, to the same numbers. Raises StoppedError
        when asked to stop; the same call goes on."""
        first = self.evaluations[0]
        settings, artifacts = first.settings, tuple(one.artifact for one in self.evaluations)
        with owned(settings.work, WORK_KIND, restart=settings.restart) as folder:
            found = Pass(
                artifacts,
                first.original,
                settings,
                first.progress,
                first.inputs,
                first.compute,
                first.ahead,
                crew=None if cluster is None else Crew(cluster, first.planned),
            ).run()
            folder.remove()
        records = (one.completed(record) for one, (record, _) in zip(self.evaluations, found, strict=True))
        lengths = [len(item.scored()) for item in first.inputs.sequences]
        return Comparison(tuple(records), differences([scored for _, scored in found], lengths))


def prepare_comparison(
    artifacts: Sequence[Checkpoint],
    original: Checkpoint,
    settings: EvaluationSettings,
    progress: Progress | None = None,
    measured: str | None = None,
) -> PreparedComparison:
    """Check every artifact as an evaluation would, and that all fit in memory beside each other.

    `settings` must ask for a text alone; `measured` stands for all digests where only the plan is wanted. Raises what
    `prepare_evaluation` raises.
    """
    found = [
        prepare_evaluation(
            one, original, settings, progress, measured, [other for other in artifacts if other is not one]
        )
        for one in artifacts
    ]
    return PreparedComparison(tuple(replace(one, started=found[0].started) for one in found))


def differences(scored: Sequence[Scored], lengths: Sequence[int]) -> tuple[Difference, ...]:
    """Those of all pairs, for sequences of `lengths` scored tokens."""
    cluster = clusters(lengths)
    return tuple(
        Difference(
            artifact,
            than,
            *mean_and_error(_kl(scored[artifact]) - _kl(scored[than]), cluster),
            *mean_and_error(_agrees(scored[artifact]) - _agrees(scored[than]), cluster),
        )
        for than, artifact in combinations(range(len(scored)), 2)
    )


def _kl(scored: Scored) -> Tensor:
    """float64 [tokens]."""
    assert scored.paired is not None
    return scored.paired.kl


def _agrees(scored: Scored) -> Tensor:
    """1 where the likeliest token is the original's, float64 [tokens]."""
    assert scored.reference is not None
    return (scored.artifact.likeliest == scored.reference.likeliest).double()
