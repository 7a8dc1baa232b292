"""lm-evaluation-harness on a streamed model, or handed to an engine that can load the artifact.

Every log-likelihood request of all tasks goes through the layers in one pass. Answers are those of the harness's own
`HFLM` on the loaded model: same tokens, same cutting to the context, same sums.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.evaluate.answers import StreamAnswers
from l4pack.evaluate.scoring import score
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.memory import blocks_for
from l4pack.stream.modules import Skeleton
from l4pack.stream.text import token_digest
from l4pack.stream.walk import Model, Progress, Walk
from l4pack.stream.weights import Weights

STREAMED = "streamed"
ENGINES = {"vllm": "vllm", "transformers": "hf"}
_MISSING = "the tasks of lm-evaluation-harness need it"


class StreamedScorer:
    """Log-likelihoods of token sequences by one checkpoint, layer by layer."""

    def __init__(
        self, checkpoint: Checkpoint, work: Path, compute: Compute, *, max_bytes: int | None = None,
        round_activations: bool = True, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._checkpoint, self._work, self._compute = checkpoint, work, compute
        self._blocks = blocks_for(checkpoint.config.text, compute.dtype, max_bytes)
        self._round_activations, self._progress = round_activations, progress

    def __call__(self, sequences: Sequence[TokenSequence]) -> list[tuple[Tensor, Tensor]]:
        """For each sequence, log-probability of every scored token, and whether it was the likeliest."""
        packed = Packed(sequences)
        digest = f"{self._checkpoint.fingerprint()} {token_digest([item.tokens for item in sequences])} {self._blocks}"
        device, dtype = self._compute.device, self._compute.dtype
        with Weights(self._checkpoint, device, dtype, round_activations=self._round_activations) as weights:
            model = Model("model", weights, Skeleton(self._checkpoint.config, device, dtype))
            with Walk([model], packed, self._work, digest, blocks=self._blocks, progress=self._progress) as walk:
                walk.run()
                answers = StreamAnswers(model, walk.streams[0].current)
                targets = packed.targets()
                found = score(answers, packed.scored_rows(), targets)
        shutil.rmtree(self._work)
        lengths = [len(item.tokens) - item.score_from for item in sequences]
        likeliest = found.likeliest == targets
        return list(zip(torch.split(found.log_probability, lengths), torch.split(likeliest, lengths), strict=True))


def streamed_lm(checkpoint: Checkpoint, scorer: StreamedScorer) -> Any:
    """A `lm_eval.api.model.LM` on a streamed checkpoint. Raises UsageError when lm-eval is not installed."""
    try:
        from l4pack.evaluate.harness_model import StreamedLM
    except ImportError as error:
        raise UsageError(f"lm-eval is not installed; {_MISSING}", hint="pip install 'l4pack[eval]'") from error
    return StreamedLM(checkpoint, scorer)


def run_tasks(model: Any, tasks: Sequence[str], limit: int | None, **options: Any) -> dict[str, dict[str, float]]:
    """Numbers of each task by metric, standard errors under `NAME_stderr`. Raises UsageError."""
    try:
        import lm_eval
    except ImportError as error:
        raise UsageError(f"lm-eval is not installed; {_MISSING}", hint="pip install 'l4pack[eval]'") from error
    manager = options.pop("task_manager", None) or lm_eval.tasks.TaskManager()
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-eval knows no task {unknown[0]}", hint="see `lm-eval ls tasks`")
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), limit=limit, task_manager=manager, **options)
    return {
        task: {
            key.removesuffix(",none"): float(value) for key, value in values.items() if isinstance(value, int | float)
        }
        for task, values in found["results"].items()
    }


def run_engine(backend: str, folder: Path, tasks: Sequence[str], limit: int | None) -> dict[str, dict[str, float]]:
    """The same by an engine that loads the artifact whole: `vllm` or `transformers`."""
    return run_tasks(ENGINES[backend], tasks, limit, model_args={"pretrained": str(folder)})
