"""Reading slices of tensors by `pread` into plain buffers.

Mapping a file would count its pages as resident memory and push out what matters, so bytes are read into buffers and
the page cache is told to let go of what was read.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.header import DTYPE_BITS, Box, TensorEntry
from l4pack.checkpoint.open_files import allow_open_files
from l4pack.errors import SourceError
from l4pack.quant.floats import HELD_AS

NUMPY_TYPES: dict[str, type[np.generic]] = {
    **HELD_AS, "F64": np.float64, "BOOL": np.bool_,
    "U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8,
    "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64,
}  # fmt: skip
_DROP_FROM = 1 << 20
_SCRATCH = 1 << 20  # bytes at most that are read aside, to be spread over rows that do not follow one another


class Reader:
    """Reads tensors of one checkpoint; safe to use from several threads at once."""

    def __init__(self, entries: Mapping[str, TensorEntry], path_of: Callable[[str], Path]) -> None:
        self._entries = entries
        self._path_of = path_of
        self._files: dict[str, int] = {}
        self._opened: dict[str, tuple[Path, tuple[int, ...]]] = {}  # what the open files were when they were opened
        allow_open_files(
            2 * len({file for entry in entries.values() for file in entry.stored})
        )  # two checkpoints may be compared
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
        return self.part(entry, whole(entry.shape))

    def span(self, name: str, start: int, nbytes: int) -> NDArray[np.uint8]:
        """uint8 [nbytes] of a tensor, from its byte `start`. Raises SourceError when the file is cut short."""
        entry = self._entries[name]
        if entry.derived is None:
            buffer = np.empty(nbytes, np.uint8)
            self._fill(entry.file, entry.start + start, buffer, name)
            return buffer
        item = DTYPE_BITS[entry.dtype] // 8
        first, last = start // item, -(-(start + nbytes) // item)
        parts = [self.part(entry, box).reshape(-1) for box in boxes(entry.shape, first, last)]
        numbers = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, NUMPY_TYPES[entry.dtype]), *parts])
        return numbers.view(np.uint8)[start - first * item :][:nbytes]

    def matrix(self, name: str, index: int | None, rows: slice | None = None) -> NDArray[Any]:
        """Rows [rows, columns] of a 2-D tensor, or of matrix `index` of a 3-D one (contiguous in the file). Raises
        SourceError."""
        return self.columns(name, index, [slice(None)], rows)

    def columns(
        self, name: str, index: int | None, columns: Sequence[slice], rows: slice | None = None
    ) -> NDArray[Any]:
        """Ranges of columns [rows, sum of their widths] of a 2-D tensor, or of matrix `index` of a 3-D one."""
        entry = self._entries[name]
        count, width = entry.shape[-2:]
        above = ((index or 0, (index or 0) + 1),) * (len(entry.shape) - 2)
        height = (rows or slice(None)).indices(count)[:2]
        ranges = [piece.indices(width)[:2] for piece in columns]
        ends = [0, *accumulate(stop - start for start, stop in ranges)]
        block = np.empty((height[1] - height[0], ends[-1]), NUMPY_TYPES[entry.dtype])
        for (begin, end), piece in zip(pairwise(ends), ranges, strict=True):
            out = block[(*(None,) * len(above), slice(None), slice(begin, end))]
            self.read(entry, (*above, height, piece), out)
        return block

    def part(self, entry: TensorEntry, box: Box) -> NDArray[Any]:
        """A part of any tensor whose files this reader finds, as an array of the part's shape. Raises SourceError."""
        array = np.empty([stop - start for start, stop in box], NUMPY_TYPES[entry.dtype])
        self.read(entry, box, array)
        return array

    def read(self, entry: TensorEntry, box: Box, out: NDArray[Any]) -> None:
        """Put a part of a tensor into an array of the part's shape, whatever its strides. Raises SourceError."""
        if entry.derived is not None:
            entry.derived.read(self, box, out)
            return
        strides = row_major(entry.shape)
        first = sum(start * step for (start, _), step in zip(box, strides, strict=True))
        self.strided(entry.file, entry.start + first * out.itemsize, strides, out, entry.name)

    def strided(self, file: str, start: int, strides: Sequence[int], out: NDArray[Any], name: str) -> None:
        """Fill `out` with numbers that lie `strides` (in numbers, of each axis) apart from byte `start` of a file on.

        Nothing that lies between them is read. `name` is the tensor, for what is said of a file cut short. Raises
        SourceError.
        """
        steps = [step for step, size in zip(strides, out.shape, strict=True) if size != 1]
        order = sorted(range(len(steps)), key=lambda axis: -steps[axis])
        self._strided(file, start, sorted(steps, reverse=True), out.squeeze().transpose(order), name)

    def _strided(self, file: str, start: int, strides: Sequence[int], out: NDArray[Any], name: str) -> None:
        """The same with the greatest stride first, and no axis of one number."""
        if out.size == 0:
            return
        if list(strides) != row_major(out.shape):
            for index in range(out.shape[0]):
                self._strided(file, start + index * strides[0] * out.itemsize, strides[1:], out[index, ...], name)
        elif out.flags.c_contiguous:
            self._fill(file, start, out.reshape(-1).view(np.uint8), name)
        elif out.nbytes > _SCRATCH and len(out) > 1:
            half = len(out) // 2
            self._strided(file, start, strides, out[:half], name)
            self._strided(file, start + half * strides[0] * out.itemsize, strides, out[half:], name)
        else:
            scratch = np.empty(out.shape, out.dtype)
            self._fill(file, start, scratch.reshape(-1).view(np.uint8), name)
            out[...] = scratch

    def _fill(self, file: str, start: int, buffer: NDArray[np.uint8], name: str) -> None:
        descriptor = self._descriptor(file)
        done = 0
        while done < buffer.nbytes:
            try:
                count = os.preadv(descriptor, [buffer[done:].data], start + done)
            except OSError as error:
                raise SourceError(f"{file}: {error.strerror}", hint="check the disk") from error
            if count == 0:
                raise SourceError(f"{file} ends inside {name}", hint="the file is truncated: download it again")
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


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def row_major(shape: Sequence[int]) -> list[int]:
    """Numbers between neighbours along each axis of a tensor that lies in one piece, the last axis closest."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The parts that numbers `start` to `stop` of a tensor make up, counted row by row; in order, at most two an axis."""
    if len(shape) < 2:
        yield ((start, stop),) * len(shape)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:  # within one row
        yield from (((last, last + 1), *box) for box in boxes(shape[1:], start - last * inner, stop - last * inner))
        return
    if start < first * inner:
        yield from (((first - 1, first), *box) for box in boxes(shape[1:], start - (first - 1) * inner, inner))
    if first < last:
        yield ((first, last), *whole(shape[1:]))
    if last * inner < stop:
        yield from (((last, last + 1), *box) for box in boxes(shape[1:], 0, stop - last * inner))


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to, and which file it is."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
