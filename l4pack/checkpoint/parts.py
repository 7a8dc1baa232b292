"""What a checkpoint is, file by file, as parts of a job's identity."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from l4pack.checkpoint.source import Checkpoint, LocalStore, Store
from l4pack.datafile import digest_of
from l4pack.errors import SourceError
from l4pack.model.config import CONFIG_NAME
from l4pack.work.identity import Identity


def source_part(file: str, name: str = "source") -> str:
    """The name of the part that a file of the checkpoint called `name` is."""
    return f"{name} {file}"


def source_parts(checkpoint: Checkpoint, store: Store) -> dict[str, str]:
    """Hex SHA-256 by file: of a weight file's header and of what changes when the file does, of others' contents.

    Files that are not on this machine, and are no weights, are fetched.
    """
    companions = {source_part(file): file_digest(store.path(file)) for file in checkpoint.companions}
    return weight_parts(checkpoint) | companions


def weight_parts(checkpoint: Checkpoint, name: str = "source") -> dict[str, str]:
    """The same of configuration and weight files alone, all that a walk through the layers reads."""
    store = checkpoint.store
    assert store is not None
    adapters = {f"adapter {number}": adapter.sha256 for number, adapter in enumerate(checkpoint.adapters, 1)}
    digests = {CONFIG_NAME: _config(checkpoint, store), **_shards(checkpoint, store), **adapters}
    return {source_part(file, name): digest for file, digest in digests.items()}


def seen_digest(checkpoint: Checkpoint) -> str | None:
    """Hex SHA-256 over `weight_parts`; None where the files can't be seen."""
    try:
        return Identity(weight_parts(checkpoint)).digest
    except (OSError, SourceError):
        return None


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def as_opened(checkpoint: Checkpoint) -> bool:
    """Whether the files still say what the checkpoint was opened with: configuration and headers."""
    if checkpoint.reopen is None:
        return True  # the Hub lists digests, and headers are compared when a file arrives
    try:
        now = checkpoint.reopen()
    except SourceError:
        return False
    return now.config.raw == checkpoint.config.raw and now.entries == checkpoint.entries


def _config(checkpoint: Checkpoint, store: Store) -> str:
    if isinstance(store, LocalStore) and store.path(CONFIG_NAME).is_file():
        return file_digest(store.path(CONFIG_NAME))
    return digest_of(checkpoint.config.raw)


def _shards(checkpoint: Checkpoint, store: Store) -> dict[str, str]:
    described: defaultdict[str, list[str]] = defaultdict(list)
    for entry in sorted(checkpoint.entries.values(), key=lambda entry: entry.name):
        identity = entry.identity
        for file in entry.stored:
            described[file].append(identity)
    return {
        file: hashlib.sha256("\n".join([store.identity(file), *described[file]]).encode()).hexdigest()
        for file in sorted(described)
    }
