"""A small Llama 4 model of the project's own, with held-out and calibration text: everything offline can be tried on it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files(__name__)))


def model_path() -> Path:
    """The checkpoint's folder: BF16, fused experts, several shards, laid out as the published repositories."""
    return _FOLDER / "model"


def heldout_path() -> Path:
    """UTF-8 text that the model has not been trained on, for perplexity and KL divergence."""
    return _FOLDER / "heldout.txt"


def calibration_path() -> Path:
    """UTF-8 text from the training side, disjoint from the held-out text, for calibration."""
    return _FOLDER / "calibration.txt"
