"""Writing the planned shards: every byte has its place, so order and interruptions don't matter."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.open_files import allow_open_files
from l4pack.checkpoint.shards import FilePlace, Shard
from l4pack.units import MIB
from l4pack.work.files import open_own, sync_folder

_HASH_CHUNK = 8 * MIB


@dataclass(frozen=True, slots=True)
class Extent:
    """Some bytes of a tensor."""

    tensor: str
    start: int
    nbytes: int


class Written:
    """What a thread wrote: its extents, and the SHA-256 of each, so that whole tensors need not be read to be
    hashed."""

    def __init__(self) -> None:
        self._extents: list[Extent] = []
        self._digests: list[hashlib._Hash] = []

    def add(self, tensor: str, start: int, raw: memoryview) -> None:
        """Count bytes from `start` of a tensor as written; those that follow the last ones go on with their extent."""
        last = self._extents[-1] if self._extents else Extent("", 0, 0)
        if (last.tensor, last.start + last.nbytes) == (tensor, start):
            self._extents[-1] = replace(last, nbytes=last.nbytes + raw.nbytes)
        else:
            self._extents.append(Extent(tensor, start, raw.nbytes))
            self._digests.append(hashlib.sha256())
        self._digests[-1].update(raw)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the extents' digests."""
        return _combined(digest.hexdigest() for digest in self._digests)

    def tensors(self, places: Mapping[str, FilePlace]) -> dict[str, str]:
        """Hex SHA-256 of the tensors that were written whole."""
        pairs = zip(self._extents, self._digests, strict=True)
        return {
            extent.tensor: digest.hexdigest()
            for extent, digest in pairs
            if (extent.start, extent.nbytes) == (0, places[extent.tensor].nbytes)
        }


class ShardWriter:
    """Writes pieces of tensors into a folder of shards; safe to use from several threads at once."""

    def __init__(
        self, folder: Path, shards: Sequence[Shard], places: Mapping[str, FilePlace], *, begun: bool = False
    ) -> None:
        """Makes the files, or opens them as they are where another process has `begun` them. Raises OSError."""
        self.places = places
        self._lock = threading.Lock()
        self._watched = threading.local()
        self._dirty: set[str] = set()
        self._files: dict[str, int] = {}
        allow_open_files(2 * len(shards))  # the reader of as many source shards has its own
        for shard in shards:
            self._files[shard.file] = open_own(folder / shard.file, os.O_RDWR | (0 if begun else os.O_CREAT))
        if not begun:
            self._begin(shards)
            sync_folder(folder)  # a journalled task must not outlive the name of its file

    def _begin(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            descriptor = self._files[shard.file]
            os.ftruncate(descriptor, shard.nbytes)
            _write_all(descriptor, memoryview(shard.prefix), 0)
            self._dirty.add(shard.file)

    def write(self, name: str, offset: int, data: NDArray[np.generic]) -> None:
        """Put an array's bytes (any dtype and shape [...], as they lie in memory) at byte `offset` of a tensor.
        Raises ValueError
        for bytes beyond its end."""
        place = self.places[name]
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if offset < 0 or offset + raw.nbytes > place.nbytes:
            raise ValueError(f"{name}: {raw.nbytes} bytes at {offset} of a tensor of {place.nbytes}")
        if (written := getattr(self._watched, "written", None)) is not None:
            written.add(name, offset, raw)
        _write_all(self._files[place.file], raw, place.start + offset)
        with self._lock:
            self._dirty.add(place.file)

    @contextmanager
    def watched(self) -> Iterator[Written]:
        """What this thread writes meanwhile."""
        self._watched.written = Written()
        try:
            yield self._watched.written
        finally:
            self._watched.written = None

    def read(self, name: str) -> NDArray[np.uint8]:
        """uint8 [nbytes] of a tensor as written so far. Raises OSError when the file is shorter."""
        place = self.places[name]
        raw = np.empty(place.nbytes, np.uint8)
        done = 0
        while done < place.nbytes:
            count = os.preadv(self._files[place.file], [raw[done:].data], place.start + done)
            if count == 0:
                raise OSError(f"{place.file} is shorter than it was written")
            done += count
        return raw

    def sync(self) -> None:
        """Return once every byte written so far is safely on disk."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        for file in dirty:
            os.fdatasync(self._files[file])

    def digests(self, shard: Shard, known: Container[str] = ()) -> dict[str, str]:
        """Hex SHA-256 of every tensor of a complete shard that is not `known`, read back from the file."""
        names = [name for name in shard.tensors if name not in known]
        result = {name: self._digest(Extent(name, 0, self.places[name].nbytes)) for name in names}
        os.posix_fadvise(self._files[shard.file], 0, 0, os.POSIX_FADV_DONTNEED)
        return result

    def digest(self, extents: Iterable[Extent]) -> str:
        """What `Written.digest` was of these extents if the files still hold what was written."""
        return _combined(map(self._digest, extents))

    def _digest(self, extent: Extent) -> str:
        digest, place, done = hashlib.sha256(), self.places[extent.tensor], 0
        buffer = bytearray(min(_HASH_CHUNK, extent.nbytes))
        while done < extent.nbytes:
            view = memoryview(buffer)[: extent.nbytes - done]
            count = os.preadv(self._files[place.file], [view], place.start + extent.start + done)
            if count == 0:
                raise OSError(f"{place.file} is shorter than it was written")
            digest.update(view[:count])
            done += count
        return digest.hexdigest()

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _combined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _write_all(descriptor: int, raw: memoryview, start: int) -> None:
    done = 0
    while done < raw.nbytes:
        done += os.pwrite(descriptor, raw[done:], start + done)
