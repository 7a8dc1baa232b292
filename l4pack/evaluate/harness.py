"""lm-evaluation-harness on a streamed model, or handed to an engine that can load the artifact.

Log-likelihood requests of all tasks go through the layers together, in blocks of bounded size. Answers are those of the harness's own
`HFLM` on the loaded model: same tokens, same cutting to the context, same sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import HubError, UsageError
from l4pack.evaluate.harness_suite import AskedTasks, HarnessTask
from l4pack.evaluate.inputs import STREAMED
from l4pack.evaluate.streamed_scorer import BLOCK_TOKENS, Scorer, blocks, shared
from l4pack.stream.hidden import Packed, TokenSequence

ENGINES = {"vllm": "vllm", "transformers": "hf"}
_MISSING = "the tasks of lm-evaluation-harness need it"


@dataclass
class CountingScorer:
    """Counts what a scorer would be asked, and answers with zeros: what tasks cost, before a weight is read."""

    requests: int = 0
    tokens: int = 0
    scored: int = 0
    longest: int = 0
    passes: int = 0

    def __call__(self, sequences: Sequence[TokenSequence]) -> list[tuple[Tensor, Tensor]]:
        """As `StreamedScorer`."""
        self.requests += len(sequences)
        for block in blocks(sequences, BLOCK_TOKENS):
            packed, rows, _ = shared(block)
            self.passes, self.tokens, self.scored = self.passes + 1, self.tokens + packed.rows, self.scored + len(rows)
            self.longest = max(self.longest, *(len(item.tokens) for item in block))
        return [
            (torch.zeros(length), torch.zeros(length, dtype=torch.bool))
            for length in Packed(sequences).scored_lengths()
        ]


def streamed_lm(checkpoint: Checkpoint, scorer: Scorer) -> Any:
    """A `lm_eval.api.model.LM` on a streamed checkpoint. Raises UsageError when lm-eval is not installed."""
    try:
        from l4pack.evaluate.harness_model import StreamedLM
    except ImportError as error:
        raise UsageError(f"lm-eval is not installed; {_MISSING}", hint="pip install 'l4pack[eval]'") from error
    return StreamedLM(checkpoint, scorer)


def task_manager(tasks: Sequence[str], backend: str, folder: str | None = None) -> Any:
    """lm-evaluation-harness's task manager, once it knows all tasks. Raises UsageError before anything runs."""
    if backend not in (STREAMED, *ENGINES):
        raise UsageError(f"there is no backend {backend}", hint=f"choose {STREAMED}, {' or '.join(ENGINES)}")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"lm-eval is not installed; {_MISSING}", hint="pip install 'l4pack[eval]'") from error
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-eval knows no task {unknown[0]}", hint="see `lm-eval ls tasks`, or give a .jsonl file")
    return manager


def counted(checkpoint: Checkpoint, tasks: AskedTasks, limit: int | None, manager: Any) -> CountingScorer:
    """What tasks would ask of a checkpoint; their data are read for it. Raises UsageError."""
    scorer = CountingScorer()
    run_tasks(streamed_lm(checkpoint, scorer), tasks.tasks, limit, manager, bootstrap_iters=0, log_samples=False)
    return scorer


def run_tasks(
    model: Any, tasks: Sequence[HarnessTask], limit: int | None, manager: Any, **options: Any
) -> dict[str, dict[str, float]]:
    """Numbers of each task by metric, standard errors under `NAME_stderr`, and `questions`. Raises HubError for data that
    can't be fetched."""
    import lm_eval

    found: dict[str, dict[str, float]] = {}
    for shots in dict.fromkeys(one.num_fewshot for one in tasks):
        names = [one.task for one in tasks if one.num_fewshot == shots]
        with _fetching(names):
            part = lm_eval.simple_evaluate(
                model=model, tasks=names, num_fewshot=shots, limit=limit, task_manager=manager, **options
            )
        found |= {
            task: {**_numbers(values), "questions": _questions(task, part)} for task, values in part["results"].items()
        }
    return found


@contextmanager
def _fetching(tasks: Sequence[str]) -> Iterator[None]:
    """Data that can't be fetched, in one line: the client says every try of its own."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    except ConnectionError as error:
        raise HubError(
            f"the data of {', '.join(tasks)} can't be fetched: {error}",
            hint="check the network; questions of your own go in a file: --task FILE.jsonl",
        ) from error
    finally:
        logging.set_verbosity(before)


def _questions(task: str, found: Mapping[str, Any]) -> int:
    """Questions of a task, or of all tasks of a group."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_questions(one, found) for one in found.get("group_subtasks", {}).get(task, ()) if one != task)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` and `acc_stderr,none` as `acc` and `acc_stderr`; filters other than none stay in the name."""
    kept = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none").replace(",", " "): float(value) for key, value in kept.items()}


def run_engine(
    backend: str, folder: Path, tasks: Sequence[HarnessTask], limit: int | None, manager: Any
) -> dict[str, dict[str, float]]:
    """The same by an engine that loads the artifact whole: `vllm` or `transformers`."""
    return run_tasks(ENGINES[backend], tasks, limit, manager, model_args={"pretrained": str(folder)})


def harness_record(
    artifact: Mapping[str, Mapping[str, float]],
    original: Mapping[str, Mapping[str, float]] | None,
    metrics: Mapping[str, str | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Tasks in the shape of `tasks.task_record`; the accuracy is the metric named for the task, else its first."""
    record: dict[str, dict[str, Any]] = {}
    for task, numbers in artifact.items():
        metric = (metrics or {}).get(task) or next(key for key in numbers if "_stderr" not in key)
        one: dict[str, Any] = {"questions": int(numbers["questions"]), "metric": metric}
        one["accuracy"], one["metrics"] = _value(numbers, metric), dict(numbers)
        if original is not None:
            before = _value(original[task], metric)
            one |= {"accuracy_reference": before, "metrics_reference": dict(original[task])}
            one["recovery"] = numbers[metric] / before["value"] if before["value"] else None
        record[task] = one
    return record


def _value(numbers: Mapping[str, float], metric: str) -> dict[str, Any]:
    name, _, filtered = metric.partition(" ")
    error = numbers.get(f"{name}_stderr {filtered}".strip())
    return {"value": numbers[metric], "standard_error": error}
