"""Artifacts evaluated as `l4pack evaluate` does it, in one pass with their original, with every token's KL kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from l4pack.checkpoint.source import Checkpoint, open_folder
from l4pack.evaluate.compare import WORK_KIND, prepare_comparison
from l4pack.evaluate.evaluate import Pass
from l4pack.evaluate.inputs import EvaluationSettings
from l4pack.text.choice import TextChoice
from l4pack.work.folder import owned


@dataclass(frozen=True)
class Measured:
    """The record of `accuracy.json`, float64 [tokens] KL in nats, and the scored tokens of each sequence."""

    record: dict[str, Any]
    kl: Tensor
    lengths: list[int]


def measure(folders: Sequence[Path], original: Checkpoint, text: TextChoice, work: Path) -> list[Measured]:
    """Evaluate artifacts, or float32 checkpoints of what they hold, beside the original; `work` holds hidden states."""
    settings = EvaluationSettings(work=work, text=text, compute="cpu", restart=True)
    ready = prepare_comparison([open_folder(folder) for folder in folders], original, settings).evaluations
    first = ready[0]
    artifacts = tuple(one.artifact for one in ready)
    with owned(work, WORK_KIND, restart=True) as folder:
        found = Pass(
            artifacts, original, settings, first.progress, first.inputs, first.compute, first.ahead, crew=None
        ).run()
        folder.remove()
    lengths = [len(sequence.scored()) for sequence in first.inputs.sequences]
    return [Measured(record, scored.paired.kl, lengths) for record, scored in found if scored.paired is not None]
