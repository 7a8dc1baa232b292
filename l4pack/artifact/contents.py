"""One digest of what an artifact computes with: every tensor's bytes and the configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import read_manifest
from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.source import Checkpoint
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.errors import SourceError
from l4pack.model.config import load_config
from l4pack.work import machine

if TYPE_CHECKING:
    from l4pack.checkpoint.reader import Reader

MAX_WORKERS = 8
CHUNK = 8 * 1024**2


def recorded_digest(folder: Path) -> str | None:
    """The digest by the tensors' SHA-256 in the manifest; None without a manifest. Raises UsageError, SourceError."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    tensors = {name: tensor.sha256 for name, tensor in read_manifest(folder).tensors.items()}
    return contents_digest(tensors, load_config(folder / CONTAINER.config_name).raw)


def measured_digest(checkpoint: Checkpoint, check: Callable[[], None] = lambda: None) -> str:
    """The digest by reading every tensor; `check` is called between reads and may raise. Raises SourceError."""
    if checkpoint.store is None:
        raise SourceError(f"{checkpoint.name} is a configuration without weights", hint="give a checkpoint folder")
    from l4pack.checkpoint.reader import Reader  # brings numpy, which a recorded digest does without

    entries = sorted(checkpoint.entries.values(), key=lambda entry: (entry.file, entry.start))
    with Reader(checkpoint.entries, checkpoint.store.path) as reader, ThreadPoolExecutor(_workers()) as pool:
        found = pool.map(lambda entry: (entry.name, tensor_digest(reader, entry, check)), entries)
        return contents_digest(dict(found), checkpoint.config.raw)


def contents_digest(tensors: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Hex SHA-256 over tensor names with their hex SHA-256, and config.json's values."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, sha256 in sorted(tensors.items()):
        digest.update(f"\n{name} {sha256}".encode())
    return digest.hexdigest()


def tensor_digest(reader: Reader, entry: TensorEntry, check: Callable[[], None] = lambda: None) -> str:
    """Hex SHA-256 of a tensor's bytes; `check` is called between reads and may raise."""
    digest = hashlib.sha256()
    for start in range(0, entry.nbytes, CHUNK):
        check()
        digest.update(reader.span(entry.name, start, min(CHUNK, entry.nbytes - start)).data)
    return digest.hexdigest()


def _workers() -> int:
    return min(MAX_WORKERS, machine.cores())
