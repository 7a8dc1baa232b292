"""Reading slices of tensors by `pread` into plain buffers.

Mapping a file would count its pages as resident memory and push out what matters, so bytes are read into buffers and
the page cache is told to let go of what was read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.header import DTYPE_BITS, TensorEntry
from l4pack.checkpoint.open_files import allow_open_files
from l4pack.errors import SourceError
from l4pack.quant.floats import HELD_AS

NUMPY_TYPES: dict[str, type[np.generic]] = {
    **HELD_AS, "F64": np.float64, "BOOL": np.bool_,
    "U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8,
    "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64,
}  # fmt: skip
_DROP_FROM = 1 << 20


class Reader:
    """Reads tensors of one checkpoint; safe to use from several threads at once."""

    def __init__(self, entries: Mapping[str, TensorEntry], path_of: Callable[[str], Path]) -> None:
        self._entries = entries
        self._path_of = path_of
        self._files: dict[str, int] = {}
        self._opened: dict[str, tuple[Path, tuple[int, ...]]] = {}  # what the open files were when they were opened
        allow_open_files(2 * len({entry.file for entry in entries.values()}))  # two checkpoints may be compared
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def forget(self, file: str) -> None:
        """Close one file, so that it can be deleted."""
        with self._lock:
            descriptor = self._files.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)

    def changed(self) -> str | None:
        """An open file that was written to or replaced since it was opened, if there is one."""
        with self._lock:
            for file, descriptor in self._files.items():
                path, before = self._opened[file]
                there = path.exists() and _state(path.stat()) == before
                if not there or _state(os.fstat(descriptor)) != before:
                    return file
        return None

    def tensor(self, name: str) -> NDArray[Any]:
        """A whole tensor [*shape] in the NumPy type of its dtype (BF16 and FP8 as bit patterns). Raises SourceError."""
        entry = self._entries[name]
        return self._array(entry, entry.start, entry.shape)

    def span(self, name: str, start: int, nbytes: int) -> NDArray[np.uint8]:
        """uint8 [nbytes] of a tensor, from its byte `start`. Raises SourceError when the file is cut short."""
        buffer = np.empty(nbytes, np.uint8)
        self._fill(self._entries[name], self._entries[name].start + start, buffer)
        return buffer

    def matrix(self, name: str, index: int | None, rows: slice | None = None) -> NDArray[Any]:
        """Rows [rows, columns] of a 2-D tensor, or of matrix `index` of a 3-D one (contiguous in the file). Raises
        SourceError."""
        entry = self._entries[name]
        count, width = entry.shape[-2:]
        start, stop, _ = (rows or slice(None)).indices(count)
        first = ((index or 0) * count + start) * width
        return self._array(entry, entry.start + first * DTYPE_BITS[entry.dtype] // 8, (stop - start, width))

    def columns(self, name: str, index: int | None, columns: Sequence[slice]) -> NDArray[Any]:
        """Ranges of columns [rows, sum of their widths] of a 2-D tensor, or of matrix `index` of a 3-D one, read row
        by row."""
        entry = self._entries[name]
        count, width = entry.shape[-2:]
        item = DTYPE_BITS[entry.dtype] // 8
        first = entry.start + (index or 0) * count * width * item
        ranges = [piece.indices(width)[:2] for piece in columns]
        block = np.empty((count, sum(stop - start for start, stop in ranges)), NUMPY_TYPES[entry.dtype])
        for row in range(count):
            place = 0
            for start, stop in ranges:
                piece = block[row, place : place + stop - start]
                self._fill(entry, first + (row * width + start) * item, piece.view(np.uint8))
                place += stop - start
        return block

    def _array(self, entry: TensorEntry, start: int, shape: tuple[int, ...]) -> NDArray[Any]:
        array = np.empty(shape, NUMPY_TYPES[entry.dtype])
        self._fill(entry, start, array.reshape(-1).view(np.uint8))
        return array

    def _fill(self, entry: TensorEntry, start: int, buffer: NDArray[np.uint8]) -> None:
        descriptor = self._descriptor(entry.file)
        done = 0
        while done < buffer.nbytes:
            try:
                count = os.preadv(descriptor, [buffer[done:].data], start + done)
            except OSError as error:
                raise SourceError(f"{entry.file}: {error.strerror}", hint="check the disk") from error
            if count == 0:
                raise SourceError(
                    f"{entry.file} ends inside {entry.name}", hint="the file is truncated: download it again"
                )
            done += count
        if buffer.nbytes >= _DROP_FROM:
            os.posix_fadvise(descriptor, start, buffer.nbytes, os.POSIX_FADV_DONTNEED)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            known = self._files.get(file)
        if known is not None:
            return known
        path = self._path_of(file)  # may download, so other threads must not wait for it
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._opened[file] = path, _state(os.fstat(self._files[file]))
            return self._files[file]


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to, and which file it is."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
