"""A checkpoint as every node of a cluster opens it."""

from __future__ import annotations

from dataclasses import replace

from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.errors import UsageError


def everywhere(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint by a path that means the same wherever it is. Raises UsageError where it is fetched as it is read."""
    store = checkpoint.store
    if not isinstance(store, LocalStore):
        raise UsageError(
            "--ray needs a source that every node can read, and this one is fetched as it is read",
            hint="download it to a folder that all nodes share, without --fetch-as-you-go",
        )
    elsewhere = {file: path.absolute() for file, path in store.elsewhere.items()}
    return replace(checkpoint, store=LocalStore(store.folder.absolute(), elsewhere))
