"""What a job reads and what it writes must not be the same files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.work.folder import keep_apart


def refuse_overlap(checkpoints: Iterable[Checkpoint], *written: Path) -> None:
    """Raise UsageError when a checkpoint, or a file one of its names leads to, lies in a folder to be written, or the
    folder in the checkpoint."""
    for checkpoint in checkpoints:
        store = checkpoint.store
        if isinstance(store, LocalStore):
            files = map(store.path, (*checkpoint.shards, *checkpoint.companions, *store.elsewhere))
            keep_apart((store.folder, *files), written)
