"""lm-evaluation-harness on a streamed model, or handed to an engine that can load the artifact.

Every log-likelihood request of all tasks goes through the layers in one pass. Answers are those of the harness's own
`HFLM` on the loaded model: same tokens, same cutting to the context, same sums.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4pack import __version__
from l4pack.checkpoint.parts import weight_parts
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.evaluate.answers import StreamAnswers
from l4pack.evaluate.scoring import score
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.modules import Skeleton
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.text.sequences import token_digest
from l4pack.work.identity import Identity

STREAMED = "streamed"
ENGINES = {"vllm": "vllm", "transformers": "hf"}
_MISSING = "the tasks of lm-evaluation-harness need it"


class StreamedScorer:
    """Log-likelihoods of token sequences by one checkpoint, layer by layer."""

    def __init__(
        self, checkpoint: Checkpoint, work: Path, compute: Compute, *,
        round_activations: bool = True, progress: Progress | None = None, ahead: bool = True,
    ) -> None:  # fmt: skip
        self._checkpoint, self._work, self._compute = checkpoint, work, compute
        self._round_activations, self._progress, self._ahead = round_activations, progress, ahead

    def __call__(self, sequences: Sequence[TokenSequence]) -> list[tuple[Tensor, Tensor]]:
        """For each sequence, log-probability of every scored token, and whether it was the likeliest."""
        packed = Packed(sequences)
        job = Identity(
            {
                "l4pack version": __version__,
                "--weights-only": not self._round_activations,
                "tokens of all tasks": token_digest([item.tokens for item in sequences]),
                **self._compute.parts(),
                **weight_parts(self._checkpoint, "model"),
            }
        )
        device, dtype = self._compute.device, self._compute.dtype
        with Weights(
            self._checkpoint, device, dtype, round_activations=self._round_activations, tiled=self._compute.tiles > 0
        ) as weights:
            model = Model("model", weights, Skeleton(self._checkpoint.config, device, dtype))
            lanes = [Lane(model.name, model, packed)]
            with Walk(lanes, self._work, job, progress=self._progress, ahead=self._ahead) as walk:
                walk.run()
                answers = StreamAnswers(model, walk.streams[model.name].current)
                targets = packed.targets()
                found = score(answers, packed.scored_rows(), targets)
        shutil.rmtree(self._work)
        lengths = packed.scored_lengths()
        likeliest = found.likeliest == targets
        return list(zip(torch.split(found.log_probability, lengths), torch.split(likeliest, lengths), strict=True))


def streamed_lm(checkpoint: Checkpoint, scorer: StreamedScorer) -> Any:
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


def run_tasks(
    model: Any, tasks: Sequence[str], limit: int | None, manager: Any, **options: Any
) -> dict[str, dict[str, float]]:
    """Numbers of each task by metric, standard errors under `NAME_stderr`, and `questions`."""
    import lm_eval

    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), limit=limit, task_manager=manager, **options)
    counts = found["n-samples"]
    return {
        task: {**_numbers(values), "questions": counts.get(task, {}).get("effective", 0)}
        for task, values in found["results"].items()
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` and `acc_stderr,none` as `acc` and `acc_stderr`; filters other than none stay in the name."""
    kept = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none").replace(",", " "): float(value) for key, value in kept.items()}


def run_engine(
    backend: str, folder: Path, tasks: Sequence[str], limit: int | None, manager: Any
) -> dict[str, dict[str, float]]:
    """The same by an engine that loads the artifact whole: `vllm` or `transformers`."""
    return run_tasks(ENGINES[backend], tasks, limit, manager, model_args={"pretrained": str(folder)})


def harness_record(
    artifact: Mapping[str, Mapping[str, float]], original: Mapping[str, Mapping[str, float]] | None
) -> dict[str, dict[str, Any]]:
    """Tasks in the shape of `tasks.task_record`; the accuracy is the task's first metric."""
    record: dict[str, dict[str, Any]] = {}
    for task, numbers in artifact.items():
        metric = next(key for key in numbers if "_stderr" not in key)
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
