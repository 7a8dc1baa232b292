"""Named sets of lm-evaluation-harness's tasks, each with its number of shots and the metric it is known by.

How close an artifact comes to its original on a set is its recovery: the mean over the tasks of the artifact's figure
over the original's, in per cent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict

from l4pack.datafile import parse_yaml
from l4pack.resources import data_text

HARNESS_SUITES = ("openllm", "leaderboard")


class HarnessTask(BaseModel):
    """One task; settings left None are the task's own, and without a metric its first one counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: str
    num_fewshot: int | None = None
    metric: str | None = None
    generates: bool = False


class HarnessSuite(BaseModel):
    """A set of tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    suite: str
    title: str
    tasks: tuple[HarnessTask, ...]


@dataclass(frozen=True)
class AskedTasks:
    """What lm-eval is asked for: single tasks, and sets of them."""

    single: tuple[HarnessTask, ...] = ()
    suites: tuple[HarnessSuite, ...] = ()
    streamed: bool = True  # a streamed model gives log-likelihoods and writes no text

    @property
    def tasks(self) -> tuple[HarnessTask, ...]:
        """All that are run, each once; settings of a set count before those of a task by itself."""
        found = {one.task: one for one in self.single}
        found |= {one.task: one for suite in self.suites for one in suite.tasks if self.runs(one)}
        return tuple(found.values())

    def runs(self, task: HarnessTask) -> bool:
        """Whether a task of a set is run."""
        return not (self.streamed and task.generates)

    def parts(self) -> dict[str, Any]:
        """What of it decides the figures."""
        return {f"--suite {suite.suite}": suite_digest(suite.suite) for suite in self.suites}

    def record(self, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Every set's means and recovery, from the tasks' records."""
        return {suite.suite: self._of(suite, tasks) for suite in self.suites}

    def _of(self, suite: HarnessSuite, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        run = [tasks[one.task] for one in suite.tasks if self.runs(one)]
        record: dict[str, Any] = {
            "title": suite.title,
            "tasks": [one.task for one in suite.tasks if self.runs(one)],
            "left_out": [one.task for one in suite.tasks if not self.runs(one)],
            "mean": _mean(one["accuracy"]["value"] for one in run),
        }
        if all("accuracy_reference" in one for one in run):
            shares = [one["recovery"] for one in run]
            record["mean_reference"] = _mean(one["accuracy_reference"]["value"] for one in run)
            record["recovery_percent"] = None if None in shares else 100 * _mean(shares)
        return record


def asked_tasks(single: Sequence[str], suites: Sequence[str], *, streamed: bool) -> AskedTasks:
    """Tasks by name, and those of the sets among `suites`."""
    found = tuple(harness_suite(name) for name in suites if name in HARNESS_SUITES)
    return AskedTasks(tuple(HarnessTask(task=name) for name in single), found, streamed)


@cache
def harness_suite(name: str) -> HarnessSuite:
    """A shipped set."""
    return HarnessSuite.model_validate(parse_yaml(_text(name)))


def suite_digest(name: str) -> str:
    """Hex SHA-256 of a shipped set's file."""
    return hashlib.sha256(_text(name).encode()).hexdigest()


def _text(name: str) -> str:
    return data_text("evaluate", "suites", f"{name}.yaml")


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
