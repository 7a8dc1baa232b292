"""lm-evaluation-harness on the models of one evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4pack.checkpoint.source import Checkpoint
from l4pack.evaluate.harness import harness_record, run_engine, run_tasks, streamed_lm
from l4pack.evaluate.harness_suite import AskedTasks
from l4pack.evaluate.inputs import STREAMED, EvaluationSettings
from l4pack.evaluate.outcome import ARTIFACT, ORIGINAL
from l4pack.evaluate.spread import Crew
from l4pack.evaluate.streamed_scorer import StreamedScorer
from l4pack.stream.compute import Compute
from l4pack.stream.visitor import Progress


@dataclass(frozen=True)
class Harness:
    """What is asked of lm-evaluation-harness, and how its models are computed."""

    settings: EvaluationSettings
    asked: AskedTasks
    compute: Compute
    ahead: bool
    progress: Progress
    manager: Any
    crew: Crew | None = None

    def add(self, record: dict[str, Any], artifact: Checkpoint, original: Checkpoint | None) -> None:
        """Put every task's numbers, and each set's recovery, into a record; an engine runs the artifact alone."""
        record["tasks"] |= self._record(artifact, original)
        if self.asked.suites:
            record["suites"] = self.asked.record(record["tasks"])

    def _record(self, artifact: Checkpoint, original: Checkpoint | None) -> dict[str, dict[str, Any]]:
        chosen, tasks = self.settings, self.asked.tasks
        metrics = {one.task: one.metric for one in tasks}
        if chosen.backend != STREAMED:
            found = run_engine(chosen.backend, Path(artifact.name), tasks, chosen.limit, self.manager)
            return harness_record(self._named(found), None, metrics)
        before = None if original is None else self._streamed(ORIGINAL, original)
        return harness_record(self._named(self._streamed(ARTIFACT, artifact)), before, metrics)

    def _named(self, found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Without the dozens of parts of a set's groups, whose means are there."""
        names = {one.task for one in self.asked.tasks}
        return {task: numbers for task, numbers in found.items() if task in names or not self.asked.suites}

    def _streamed(self, name: str, checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
        chosen = self.settings
        scorer = StreamedScorer(
            checkpoint,
            chosen.work / f"harness-{name}",
            self.compute,
            round_activations=not chosen.weights_only,
            progress=self.progress,
            ahead=self.ahead,
            crew=self.crew,
        )
        return run_tasks(streamed_lm(checkpoint, scorer), self.asked.tasks, chosen.limit, self.manager)
