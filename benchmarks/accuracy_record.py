"""The record of `accuracy.py`: cells that are done, and what they say together. Pure functions of what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4pack.evaluate.statistics import percentile
from l4pack.work.files import write_atomic

BASELINE = ("llm-compressor", "W4A16")
RESAMPLES = 200
Cell = dict[str, Any]


@dataclass
class Record:
    """`settings` decide what cells mean and are the same for all of them; `models` are those measured."""

    settings: dict[str, Any]
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def find(self, model: str, tool: str, method: str, seed: int) -> Cell | None:
        """The cell, if it is done."""
        wanted = {"model": model, "tool": tool, "method": method, "seed": seed}
        return next((cell for cell in self.cells if wanted.items() <= cell.items()), None)

    def write(self, path: Path) -> None:
        """Whole or not at all, cells in a fixed order."""
        self.cells.sort(key=lambda cell: (cell["model"], cell["tool"], cell["method"], cell["seed"]))
        cells = ",\n".join(json.dumps(cell) for cell in self.cells)
        head = json.dumps({"settings": self.settings, "models": self.models}, indent=1).removesuffix("\n}")
        write_atomic(path, f'{head},\n "cells": [\n{cells}\n]\n}}\n'.encode())


def read_record(path: Path, settings: dict[str, Any]) -> Record:
    """The record so far. Leaves the program where it was made with other settings."""
    if not path.exists():
        return Record(settings)
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise SystemExit(f"{path} holds cells of {found['settings']}, not of {settings}: name another --record")
    return Record(found["settings"], found["models"], found["cells"])


def by_sequence(kl: Tensor, lengths: Sequence[int]) -> list[float]:
    """Sums of KL [tokens], nats, over each sequence, to five digits."""
    return [float(f"{float(part.sum()):.5g}") for part in kl.split(list(lengths))]


def percentile_error(kl: Tensor, lengths: Sequence[int], share: float) -> float:
    """Standard error of a percentile of KL [tokens]: sequences drawn anew with replacement."""
    parts, generator = kl.split(list(lengths)), torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(parts), (len(parts),), generator=generator) for _ in range(RESAMPLES)]
    found = [percentile(torch.cat([parts[place] for place in places]), share) for places in drawn]
    return float(torch.tensor(found, dtype=torch.float64).std())


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Ratio of two means on the same sequences, and its standard error, from sums of KL by sequence.

    Both err on the same text, so the residuals ours - ratio * theirs are what scatters (Cochran, "Sampling techniques",
    1977, 6.4).
    """
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    value = float(a.sum() / b.sum())
    count = len(a)
    scatter = float((a - value * b).square().sum()) * count / (count - 1)
    return value, math.sqrt(scatter) / float(b.sum())


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over calibration seeds and the standard deviation of one seed, None for one alone."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) if len(values) > 1 else None
