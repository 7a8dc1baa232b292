"""The proof of an export: every tensor is read back and compared with the artifact's, bit for bit.

The other format's own library decodes some rows of every matrix, and all of them where it is asked to; of the others,
codes and scales are compared as integers where a type's layout is known here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.shards import FilePlace
from l4pack.errors import L4packError
from l4pack.export.artifact import Rows, Source
from l4pack.export.plan import ExportPlan
from l4pack.export.target import Carried, OutTensor
from l4pack.quant.floats import Float32Array
from l4pack.work.signals import check_stop
from l4pack.work.threads import in_threads


@dataclass(frozen=True)
class Proof:
    """What was read back: matrices and weights that are the artifact's to the bit, and those that were rounded.

    `decoded`: weights among them that the client's library itself decoded. `largest_error` is the most that rounding changed a weight, over the root mean square of its matrix; 0 where nothing was.
    """

    by: str
    matrices: int
    weights: int
    decoded: int
    rounded: int
    largest_error: float


class _Tally:
    """Counts of several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.matrices = self.weights = self.decoded = self.rounded = 0
        self.error = 0.0

    def add(self, source: Source, decoded: int, error: float | None) -> None:
        """One matrix that is the same (None), or was rounded with a largest error; `decoded` weights by the library."""
        with self._lock:
            self.decoded += decoded
            if error is None:
                self.matrices += 1
                self.weights += source.rows * source.columns
            else:
                self.rounded += 1
                self.error = max(self.error, error)


def prove(plan: ExportPlan, folder: Path, rows: Rows, stop: threading.Event, *, whole: bool = False) -> Proof:
    """Read back all that was written in `folder`. Raises L4packError naming what differs, StoppedError.

    `whole`: by the client's library to the last weight, which takes longer.
    """
    _check_heads(plan, folder)
    places = plan.target.opened(folder, plan.layout)
    lossy = {one.where for one in plan.rounded}
    tally = _Tally()
    items = [(one, number) for one in plan.carried for number in range(len(one.sources))]
    with _Files(folder, places) as files:
        compare = _Comparison(plan, files, rows, whole)
        for one in plan.carried:
            if one.constant is not None:
                _same(files.rows(one.tensors[0], slice(0, 1))[0].view(np.float32), one.constant, one.name)

        def do(item: tuple[Carried, int]) -> None:
            carried, number = item
            rounded = carried.rounded_to is not None or any(source.name in lossy for source in carried.sources)
            tally.add(carried.sources[number], *compare.matrix(carried, number, rounded=rounded))

        in_threads(items, do, plan.workers, lambda: None, stop)
    check_stop(stop)
    return Proof(plan.target.proved_by, tally.matrices, tally.weights, tally.decoded, tally.rounded, tally.error)


def _check_heads(plan: ExportPlan, folder: Path) -> None:
    for shard in plan.layout.shards:
        with (folder / shard.file).open("rb") as stream:
            if stream.read(len(shard.prefix)) != shard.prefix:
                raise _differs(shard.file)


@dataclass(frozen=True)
class _Comparison:
    plan: ExportPlan
    files: _Files
    rows: Rows
    whole: bool

    def matrix(self, carried: Carried, number: int, *, rounded: bool) -> tuple[int, float | None]:
        """Weights that the library decoded; None where a matrix is the artifact's, else the largest error over its rms."""
        source, decoded, error, squares = carried.sources[number], 0, 0.0, 0.0
        for step in source.steps():
            raw = self._written(carried, number, step)
            if not (rounded or self.whole or step.start == 0) and self._by_integers(carried, raw, source, step):
                continue
            found, wanted = self.plan.target.decode(carried, raw), self.rows.values(source, step)
            decoded += wanted.size
            if not rounded:
                _same(found, wanted, source.name)
                continue
            error = max(error, float(np.abs(found - wanted).max()))
            squares += float(np.square(wanted, dtype=np.float64).sum())
        return decoded, error / max(np.sqrt(squares / (source.rows * source.columns)), 1e-30) if rounded else None

    def _written(self, carried: Carried, number: int, step: slice) -> list[NDArray[np.uint8]]:
        first = number * carried.sources[number].rows
        return [self.files.rows(one, slice(first + step.start, first + step.stop)) for one in carried.tensors]

    def _by_integers(self, carried: Carried, raw: list[NDArray[np.uint8]], source: Source, step: slice) -> bool:
        """Whether some rows were compared without decoding them; raises L4packError where they differ."""
        if source.own is None:
            stored = self.rows.floats(source, step)
            # Floats that were widened are compared as numbers.
            return len(raw) == 1 and np.array_equal(raw[0].reshape(-1), stored.reshape(-1).view(np.uint8))
        same = self.plan.target.same_codes(carried, raw, self.rows.solved(source, step))
        if same is False:
            raise _differs(source.name)
        return same is True


def _same(found: Float32Array, wanted: Float32Array, name: str) -> None:
    same = np.array_equal(found.reshape(-1).view(np.uint32), wanted.reshape(-1).view(np.uint32))
    if not same and not np.array_equal(found, wanted):  # ggml's E2M1 has one zero, the artifact's has two
        raise _differs(name)


def _differs(name: str) -> L4packError:
    return L4packError(
        f"{name} is not in the export as it is in the artifact", hint="something changed the files: add --restart"
    )


class _Files:
    """Rows of tensors from the files written, at the places that the client's library sees."""

    def __init__(self, folder: Path, places: Mapping[str, FilePlace]) -> None:
        self._places = places
        self._files = {file: os.open(folder / file, os.O_RDONLY) for file in {one.file for one in places.values()}}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def rows(self, tensor: OutTensor, rows: slice) -> NDArray[np.uint8]:
        """uint8 [rows, row_bytes]. Raises L4packError where the file is too short."""
        place = self._places[tensor.name]
        raw = np.empty((rows.stop - rows.start, tensor.row_bytes), np.uint8)
        done = os.preadv(self._files[place.file], [raw.reshape(-1).data], place.start + rows.start * tensor.row_bytes)
        if done != raw.nbytes:
            raise _differs(tensor.name)
        return raw
