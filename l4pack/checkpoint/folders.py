"""Opening a folder of whatever layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from l4pack.checkpoint.consolidated import is_consolidated, open_consolidated
from l4pack.checkpoint.given import Given, beside
from l4pack.checkpoint.source import Checkpoint, open_folder, snapshot_of


def open_any_folder(folder: Path, include: Sequence[str] = (), given: Given | None = None) -> Checkpoint:
    """Open a checkpoint folder, transformers' or Meta's; `given` are companions from elsewhere.

    Raises SourceError, UsageError for an `include` that is wrong.
    """
    if folder.is_dir():
        folder = snapshot_of(folder)
        if is_consolidated([path.name for path in folder.iterdir()]):
            return open_consolidated(folder, include, given)
    opened = open_folder(folder, include)
    return opened if given is None else beside(opened, given)
