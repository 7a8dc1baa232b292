"""Comparing the bytes of what a checkpoint stores twice."""

from __future__ import annotations

from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.checkpoint.twice import Duplicate, by_files
from l4pack.errors import SourceError

_CHUNK = 8 * 1024**2  # bytes


def check_duplicates(checkpoint: Checkpoint) -> None:
    """Read all tensors that are stored twice, a piece at a time, and raise SourceError where the two differ.

    A store that fetches holds two files at a time.
    """
    store = checkpoint.store
    if store is None:
        return
    for pairs in by_files(checkpoint.duplicates):
        entries = {str(entry.start) + entry.file: entry for pair in pairs for entry in (pair.kept, pair.other)}
        with Reader(entries, store.path) as reader:
            for pair in pairs:
                _compare(reader, pair)
        for file in dict.fromkeys(pairs[0].files):
            store.release(file)


def _compare(reader: Reader, pair: Duplicate) -> None:
    kept, other = (str(entry.start) + entry.file for entry in (pair.kept, pair.other))
    for start in range(0, pair.kept.nbytes, _CHUNK):
        count = min(_CHUNK, pair.kept.nbytes - start)
        if (reader.span(kept, start, count) != reader.span(other, start, count)).any():
            raise SourceError(
                f"{pair} are one tensor stored twice, and hold different numbers",
                hint="keep the right one: remove the other from its file and from the index",
            )
