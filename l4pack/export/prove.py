"""The proof of an export: every tensor is read back once it is written and compared with the artifact's, bit for bit.

The other format's own library decodes some rows of every matrix, and all of them where it is asked to; of the others,
codes and scales are compared as integers where a type's layout is known here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.shards import FilePlace
from l4pack.errors import L4packError
from l4pack.export.artifact import Piece, Rows, Source
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


class Proving:
    """Compares files with the artifact: matrix by matrix, while they are written or once they are."""

    def __init__(self, plan: ExportPlan, folder: Path, *, whole: bool = False) -> None:
        """`whole`: by the client's library to the last weight, which takes longer.

        Raises L4packError where a file's head is not the plan's, or that library finds other tensors in it.
        """
        _check_heads(plan, folder)
        self._plan = plan
        self._files = _Files(folder, plan.target.opened(folder, plan.layout))
        self._whole = whole
        self._lossy = {one.where for one in plan.rounded}
        self._tally = _Tally()

    def __enter__(self) -> Proving:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def proof(self) -> Proof:
        """What was read back so far."""
        found = self._tally
        by = self._plan.target.proved_by
        return Proof(by, found.matrices, found.weights, found.decoded, found.rounded, found.error)

    def constant(self, carried: Carried) -> None:
        """Read back what follows from the configuration. Raises L4packError."""
        assert carried.constant is not None
        _same(self._files.rows(carried.tensors[0], slice(0, 1))[0].view(np.float32), carried.constant, carried.name)

    def matrix(self, carried: Carried, number: int, pieces: Iterable[Piece]) -> None:
        """Read back source `number` of `carried`, each of its pieces once it is handed over. Raises L4packError."""
        source, decoded, error, squares = carried.sources[number], 0, 0.0, 0.0
        rounded = carried.rounded_to is not None or any(one.name in self._lossy for one in carried.sources)
        for piece in pieces:
            raw = self._written(carried, number, piece)
            if not (rounded or self._whole or piece.rows.start == 0) and self._by_integers(carried, raw, piece):
                continue
            found, wanted = self._plan.target.decode(carried, raw), piece.values
            decoded += wanted.size
            if not rounded:
                _same(found, wanted, source.name)
                continue
            error = max(error, float(np.abs(found - wanted).max()))
            squares += float(np.square(wanted, dtype=np.float64).sum())
        rms = max(np.sqrt(squares / (source.rows * source.columns)), 1e-30)
        self._tally.add(source, decoded, error / rms if rounded else None)

    def _written(self, carried: Carried, number: int, piece: Piece) -> list[NDArray[np.uint8]]:
        first = number * piece.source.rows
        rows = slice(first + piece.rows.start, first + piece.rows.stop)
        return [self._files.rows(one, rows) for one in carried.tensors]

    def _by_integers(self, carried: Carried, raw: list[NDArray[np.uint8]], piece: Piece) -> bool:
        """Whether some rows were compared without decoding them; raises L4packError where they differ."""
        if piece.floats is not None:
            # Floats that were widened are compared as numbers.
            return len(raw) == 1 and np.array_equal(raw[0].reshape(-1), piece.floats.reshape(-1).view(np.uint8))
        assert piece.solved is not None
        same = self._plan.target.same_codes(carried, raw, piece.solved)
        if same is False:
            raise _differs(piece.source.name)
        return same is True


def prove(plan: ExportPlan, folder: Path, rows: Rows, stop: threading.Event) -> Proof:
    """Read back all of a finished export by the client's library. Raises L4packError naming what differs, StoppedError."""
    with Proving(plan, folder, whole=True) as proving:
        for one in plan.carried:
            if one.constant is not None:
                proving.constant(one)

        def do(item: tuple[Carried, int]) -> None:
            carried, number = item
            proving.matrix(carried, number, rows.pieces(carried.sources[number]))

        items = [(one, number) for one in plan.carried for number in range(len(one.sources))]
        in_threads(items, do, plan.workers, lambda: None, stop)
        check_stop(stop)
        return proving.proof


def _check_heads(plan: ExportPlan, folder: Path) -> None:
    for shard in plan.layout.shards:
        with (folder / shard.file).open("rb") as stream:
            if stream.read(len(shard.prefix)) != shard.prefix:
                raise _differs(shard.file)


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

    def close(self) -> None:
        """Close every file."""
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
