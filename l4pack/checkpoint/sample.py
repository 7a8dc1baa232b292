"""A digest of a little of every tensor: whatever trains, merges or converts a model changes it, and hardly anything is read.

Headers tell another model from its like, not from a fine-tune of it. Of every tensor, and of every expert of a fused one,
the first, the middle and the last `SPAN` bytes are hashed: about 60 MB of Scout's 218 GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.source import Checkpoint, LocalStore

if TYPE_CHECKING:
    from l4pack.checkpoint.reader import Reader

SPAN = 4096
_READERS = 8  # scattered reads wait for the disk, not for a core


def local_sample(checkpoint: Checkpoint) -> str | None:
    """The digest of a checkpoint that lies in a folder; None when its files may have to be fetched. Raises SourceError."""
    return sample_digest(checkpoint) if isinstance(checkpoint.store, LocalStore) else None


def sample_digest(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 over names and samples of all tensors, as they are stored. Raises SourceError."""
    from l4pack.checkpoint.reader import Reader  # NumPy, which headers alone do without

    assert checkpoint.store is not None
    entries = sorted(checkpoint.entries.values(), key=lambda entry: (entry.file, entry.start))
    with Reader(checkpoint.entries, checkpoint.store.path) as reader, ThreadPoolExecutor(_READERS) as pool:
        samples = list(pool.map(lambda entry: f"{entry.name} {_sample(reader, entry)}", entries))
    return hashlib.sha256("\n".join(sorted(samples)).encode()).hexdigest()


def _sample(reader: Reader, entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    for start, nbytes in _spans(entry):
        digest.update(reader.span(entry.name, start, nbytes).data)
    return digest.hexdigest()


def _spans(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """First byte and size of each part that is read: all of what is small."""
    parts = entry.shape[0] if len(entry.shape) == 3 else 1
    size = entry.nbytes // parts
    for part in range(0, entry.nbytes, size or 1):
        if size <= 3 * SPAN:
            yield part, size
        else:
            yield from ((part + start, SPAN) for start in (0, (size - SPAN) // 2, size - SPAN))
