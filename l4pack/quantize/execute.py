"""Carrying out one task of a plan: read a slab, make the artifact's bytes of it, write them where they belong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from l4pack.artifact.codes import codes_of
from l4pack.checkpoint.matrices import MatrixBlock, matrices_of
from l4pack.checkpoint.reader import NUMPY_TYPES, Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.checkpoint.writer import ShardWriter
from l4pack.errors import SourceError
from l4pack.formats.known import load_format
from l4pack.model.parts import merged_with
from l4pack.model.tensors import Linear, Role
from l4pack.plan.assign import COPY_CHUNK, ROW_STEP, Action, PlannedTensor, Target, Task
from l4pack.plan.extents import made_by_rows
from l4pack.quant.dtypes import FloatName
from l4pack.quant.floats import narrowed, not_finite
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import NonFiniteError, absmax, quantize_block
from l4pack.quant.quantized import Quantized
from l4pack.quant.scales import global_scale
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.recipe import Recipe

_E4M3_NAN = 0x7F  # of either sign


@dataclass(frozen=True)
class Made:
    """Hex SHA-256 of what a task wrote, and of the tensors that it wrote whole."""

    digest: str
    tensors: Mapping[str, str]


class Quantizer(Protocol):
    """Turns a block of weights into an artifact's arrays; CPU and CUDA give the same bytes."""

    def __call__(
        self,
        source: NDArray[Any],
        layout: Layout,
        dtype: FloatName,
        scheme: Scheme,
        *,
        amax: float | None = None,
        global_scale: float | None = None,
    ) -> Quantized: ...


class Executor:
    """Carries out tasks; one instance serves all worker threads."""

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        reader: Reader,
        writer: ShardWriter,
        quantize: Quantizer = quantize_block,
    ) -> None:
        self._recipe = recipe
        self._reader = reader
        self._writer = writer
        self._entries = checkpoint.entries
        self._matrices = matrices_of(checkpoint, reader)
        self._linears = checkpoint.layout.linears
        self._dtypes = checkpoint.float_names
        self._quantize = quantize

    def make(self, task: Task) -> Made:
        """Do a task and say what it wrote. Raises SourceError as `run` does."""
        with self._writer.watched() as written:
            self.run(task)
        return Made(written.digest, written.tensors(self._writer.places))

    def run(self, task: Task) -> None:
        """Do a task. Raises SourceError naming a tensor with an infinite or NaN weight."""
        if task.copied is not None:
            self._copy(task, task.copied)
            return
        if task.action is Action.CARRY:
            for target in task.targets:
                self._carry(target, slice(*task.rows))
            return
        slab = self._matrices.slab([target.linear for target in task.targets], slice(*task.rows))
        over = self._global_scale(task, slab.blocks())
        for target, block in zip(task.targets, slab.blocks(), strict=True):
            if task.action is Action.UNFUSE:
                _refuse_non_finite(block.values, block.dtype, target.module)
                self._write_from(target.tensors[0], task.rows[0], self._as_kept(task, block.out_in, target.tensors[0]))
            else:
                self._quantize_block(task, target, block, over)

    def _carry(self, target: Target, rows: slice) -> None:
        """Place the source's own codes and scales. Raises SourceError for one that is no number."""
        codes = codes_of(self._entries[target.linear.tensor])
        assert codes is not None
        quantized = codes.quantized(self._reader, target.linear, rows)
        if ((quantized.values & _E4M3_NAN) == _E4M3_NAN).any():
            raise _non_finite(target.module)
        self.write_quantized(target, rows.start, quantized)

    def _copy(self, task: Task, tensor: PlannedTensor) -> None:
        dtype = self._dtypes[task.tensor]
        for start in range(0, task.read_bytes, COPY_CHUNK):
            chunk = self._reader.span(task.tensor, start, min(COPY_CHUNK, task.read_bytes - start))
            values = chunk.view(NUMPY_TYPES[dtype])
            _refuse_non_finite(values, dtype, task.tensor)
            place = start * tensor.nbytes // max(1, task.read_bytes)
            self._writer.write(tensor.name, place, self._as_kept(task, values, tensor))

    def _as_kept(self, task: Task, values: NDArray[Any], tensor: PlannedTensor) -> NDArray[Any]:
        """Source numbers as they are kept. Raises SourceError for one that the kept dtype can't hold."""
        if tensor.dtype == self._dtypes[task.tensor]:
            return np.ascontiguousarray(values)
        kept: FloatName = "F16" if tensor.dtype == "F16" else "BF16"
        rounded = narrowed(values, kept)
        if not_finite(rounded, kept).any():
            raise SourceError(
                f"{task.tensor} holds a weight too large for {kept}", hint="add --keep-float32 to keep it as it is"
            )
        return rounded

    def _global_scale(self, task: Task, blocks: Sequence[MatrixBlock]) -> float | None:
        """The global scale of a task's matrices, where they have one: runtimes take one for all that they merge."""
        scheme = self._recipe.schemes.get(task.targets[0].scheme)
        if scheme is None or not scheme.globally_scaled:
            return None
        own = {target.linear for target in task.targets}
        first = task.targets[0].linear
        others = [linear for linear in self._merged(first) if linear not in own]
        try:
            amax = [absmax(block.values, block.layout, block.dtype) for block in (*blocks, *self._read(others))]
        except NonFiniteError as error:
            raise _non_finite(f"{task.tensor}, or what is merged with it,") from error
        return global_scale(max(amax))

    def _merged(self, linear: Linear) -> Iterator[Linear]:
        place, merged = (linear.role, linear.layer, linear.expert), merged_with(linear.projection)
        return (
            other
            for other in self._linears
            if other.projection in merged and (other.role, other.layer, other.expert) == place
        )

    def _read(self, linears: Iterable[Linear]) -> Iterator[MatrixBlock]:
        """Matrices, a few rows at a time."""
        for linear in linears:
            for start in range(0, linear.out_features, ROW_STEP):
                yield from self._matrices.slab([linear], slice(start, start + ROW_STEP)).blocks()

    def _quantize_block(self, task: Task, target: Target, block: MatrixBlock, over: float | None) -> None:
        scheme = self._recipe.schemes[target.scheme]
        stored = block.values, block.layout, block.dtype
        try:
            amax = absmax(*stored) if scheme.strategy is Strategy.TENSOR else None
            quantized = self._quantize(*stored, scheme, amax=amax, global_scale=over)
        except NonFiniteError as error:
            where = f"output {task.rows[0] + error.row}, input {error.column}"
            raise _non_finite(f"{task.tensor} ({target.module}, {where})") from error
        self.write_quantized(target, task.rows[0], quantized)

    def write_quantized(self, target: Target, row: int, quantized: Quantized) -> None:
        """Place a slice whose first output row is `row`; slices are cut at whole blocks and whole words."""
        linear, scheme = target.linear, self._recipe.schemes[target.scheme]
        size, expert = (linear.out_features, linear.in_features), linear.role is Role.ROUTED_EXPERT
        arrays = load_format(scheme.format).encode(quantized, *size, expert=expert)
        for tensor, rows in made_by_rows(target, scheme):
            self._write_from(tensor, row // rows if rows else 0, arrays[target.suffix(tensor)])

    def _write_from(self, tensor: PlannedTensor, row: int, array: NDArray[Any]) -> None:
        self._writer.write(tensor.name, row * (tensor.nbytes // tensor.shape[0]), array)


def _refuse_non_finite(block: NDArray[Any], dtype: FloatName, name: str) -> None:
    if not_finite(block, dtype).any():
        raise _non_finite(name)


def _non_finite(where: str) -> SourceError:
    return SourceError(f"{where} holds an infinite or NaN weight", hint="the checkpoint is damaged: download it again")
