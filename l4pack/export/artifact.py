"""The artifact that is exported, as rows of numbers: integers with their scales where it was solved, floats elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.artifact.quantized import Quantization
from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.matrices import matrices_of
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError, UsageError
from l4pack.formats.carrier import SolvedRows
from l4pack.formats.format import NUMBERS, Format, Holds
from l4pack.model.names import detect_layout
from l4pack.model.tensors import Linear, TensorSpec
from l4pack.quant.dequantize import Dequantizer
from l4pack.quant.floats import HELD_AS, Float32Array, widen
from l4pack.quant.layout import Layout
from l4pack.quant.packing import unpack_zero_points
from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Scheme
from l4pack.quant.suffixes import Suffix

STEP = 1 << 20  # weights that are carried at once: a few megabytes of them as float32 stay in the cache
ROWS = 128  # a step is a multiple of this many output rows: whole words of zero points, whole blocks of FP8

Own = tuple[Format, Scheme]
"""How a matrix that is read here is stored."""


@dataclass(frozen=True)
class Source:
    """A matrix, or another tensor as rows: name, size, dtype (of the scales where it is quantized), scheme and layer."""

    name: str
    rows: int
    columns: int
    dtype: str
    linear: Linear | None = None
    own: Own | None = None
    layer: int | None = None

    @property
    def integers(self) -> bool:
        """Whether it is quantized to integers, whose scales are floats."""
        return self.own is not None and self.own[1].grid.even and not self.own[1].super_blocked

    def steps(self) -> list[slice]:
        """Its rows in pieces; an expert of a fused tensor is read at once."""
        fused = self.linear is not None and self.linear.layout is Layout.IN_OUT
        step = self.rows if fused else max(ROWS, STEP // self.columns // ROWS * ROWS)
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]


def _stated(checkpoint: Checkpoint, linears: Sequence[Linear]) -> Callable[[str], Own | None]:
    """What the configuration says of a module."""
    quantization = Quantization(checkpoint.config.stanza, [linear.module for linear in linears])
    return lambda module: quantization.scheme(module).own


class Artifact:
    """An opened artifact or plain checkpoint: what is in it, and how each matrix was quantized."""

    def __init__(self, checkpoint: Checkpoint, to_come: Mapping[str, Own] | None = None) -> None:
        """`to_come`: how each quantized module will be stored, of an artifact that is planned only.

        Raises SourceError for a configuration without weights, L4packError for a stanza that can't be read.
        """
        if checkpoint.bare or checkpoint.store is None:
            raise SourceError(f"{checkpoint.name} is a configuration without weights", hint="give an artifact's folder")
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.layout = detect_layout(checkpoint.config, checkpoint.entries)
        self._own = _stated(checkpoint, self.layout.linears) if to_come is None else to_come.get
        self.others = self._others()

    def matrix(self, linear: Linear) -> Source:
        """A matrix. Raises UsageError for one in a format that is not read here, SourceError for one that is missing."""
        values = [suffix for suffix in (Suffix.PACKED, Suffix.SCALE) if f"{linear.module}.{suffix}" in self._entries]
        plain = Source(linear.module, linear.out_features, linear.in_features, "", linear, layer=linear.layer)
        if not values:
            return replace(plain, dtype=self._float(linear.tensor))
        own = self._own(linear.module)
        if own is None or f"{linear.module}.{Suffix.ORDER}" in self._entries:
            raise UsageError(
                f"{linear.module} is in a format whose numbers l4pack hands to its own library only",
                hint="export an artifact that l4pack quantize made",
            )
        scale = f"{linear.module}.{Suffix.SCALE}"
        found = replace(plain, dtype=self._entries[scale].dtype, own=own)
        return replace(found, dtype=self._float(scale)) if found.integers else found

    def tensor(self, spec: TensorSpec) -> Source:
        """Another tensor; what has one dimension is one row."""
        columns = spec.shape[-1]
        return Source(spec.name, spec.numel // columns, columns, self._float(spec.name), layer=spec.layer)

    def nbytes(self, source: Source) -> int:
        """Bytes of it in the artifact."""
        if source.own is not None:
            names = (f"{source.name}.{suffix}" for suffix in Suffix)
            return sum(self._entries[name].nbytes for name in names if name in self._entries)
        if source.linear is not None:
            return matrices_of(self.checkpoint).nbytes(source.linear)
        return self._entries[source.name].nbytes

    @property
    def _entries(self) -> Mapping[str, TensorEntry]:
        return self.checkpoint.entries

    def _float(self, name: str) -> str:
        entry = self._entries.get(name)
        if entry is None:
            raise SourceError(f"{name} is missing from {self.checkpoint.name}", hint="is the artifact complete?")
        if entry.dtype not in HELD_AS:
            raise SourceError(f"{name} is {entry.dtype}, not one of {', '.join(HELD_AS)}", hint="quantize again")
        return entry.dtype

    def _others(self) -> tuple[TensorSpec, ...]:
        matrices = {linear.tensor for linear in self.layout.linears}
        return tuple(spec for spec in self.layout.tensors if spec.name not in matrices)


@dataclass(frozen=True)
class Piece:
    """Some rows of a source as the artifact has them: quantized, or `floats` [rows, columns] (BF16 as bit patterns)."""

    source: Source
    rows: slice
    floats: NDArray[Any] | None = None
    quantized: Quantized | None = None

    @property
    def solved(self) -> SolvedRows | None:
        """What is quantized, as it was solved."""
        if self.quantized is None:
            return None
        assert self.source.own is not None
        return SolvedRows(self.quantized, self.source.own[1], self.source.columns)

    @property
    def values(self) -> Float32Array:
        """The weights, float32 [rows, columns]: exact products of integer and scale, or the floats themselves."""
        if self.floats is not None:
            return widen(self.floats)
        assert self.quantized is not None
        assert self.source.own is not None
        count = self.rows.stop - self.rows.start
        return Dequantizer(self.quantized, self.source.own[1], count, self.source.columns).whole()


class Rows:
    """Reads rows of an artifact; safe to use from several threads at once."""

    def __init__(self, artifact: Artifact, reader: Reader) -> None:
        self._entries = artifact.checkpoint.entries
        self._reader = reader
        self._matrices = matrices_of(artifact.checkpoint, reader)

    def pieces(self, source: Source) -> Iterator[Piece]:
        """A matrix or another tensor, some rows at a time. Raises SourceError."""
        for step in source.steps():
            if source.own is None:
                yield Piece(source, step, floats=self._floats(source, step))
            else:
                yield Piece(source, step, quantized=self._quantized(source, step))

    def scales(self, source: Source) -> tuple[Float32Array, Float32Array | None]:
        """float32 [rows, groups] scales of a whole integer matrix, and its zero points (levels), without its values."""
        assert source.own is not None
        form, scheme = source.own
        arrays = self._arrays(source, slice(0, source.rows), (Holds.SCALE, Holds.ZERO_POINT))
        held = {piece.holds: arrays[piece.suffix] for piece in form.pieces if piece.suffix in arrays}
        words = held.get(Holds.ZERO_POINT)
        zero_point = None
        if words is not None:
            zero_point = unpack_zero_points(words, scheme.num_bits, source.rows).astype(np.float32)
        return widen(held[Holds.SCALE]), zero_point

    def _floats(self, source: Source, rows: slice) -> NDArray[Any]:
        if source.linear is not None:
            block = self._matrices.slab([source.linear], rows).blocks()[0]
            return np.ascontiguousarray(block.out_in)
        if len(self._entries[source.name].shape) == 1:
            return self._reader.tensor(source.name)[None]
        return self._reader.matrix(source.name, None, rows)

    def _quantized(self, source: Source, rows: slice) -> Quantized:
        assert source.own is not None
        form, scheme = source.own
        arrays = self._arrays(source, rows, NUMBERS)
        return form.decode(arrays, scheme, rows.stop - rows.start, source.columns, source.name)

    def _arrays(self, source: Source, rows: slice, holds: tuple[Holds, ...]) -> dict[str, NDArray[Any]]:
        assert source.own is not None
        form, scheme = source.own
        found = {}
        for piece in form.pieces:
            name = f"{source.name}.{piece.suffix}"
            if piece.holds in holds and name in self._entries:
                found[str(piece.suffix)] = self._piece(name, piece.rows_in_one(scheme), rows)
        return found

    def _piece(self, name: str, rows_in_one: int, rows: slice) -> NDArray[Any]:
        """What belongs to some output rows, of which `rows_in_one` share a row; 0: all of them."""
        if not rows_in_one or len(self._entries[name].shape) < 2:
            return self._reader.tensor(name)
        return self._reader.matrix(name, None, slice(rows.start // rows_in_one, -(-rows.stop // rows_in_one)))
