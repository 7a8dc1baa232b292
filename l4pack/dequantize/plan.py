"""What becomes of every tensor of an artifact as a 16-bit checkpoint, before a weight is read.

Matrices are products of codes and scales, rounded once to the model's dtype; routed experts lie fused again, in x out, gate
columns before up columns. What was not quantized keeps its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from l4pack import __version__
from l4pack.artifact.codes import codes_of
from l4pack.artifact.manifest import source_record
from l4pack.checkpoint.header import TensorEntry, tensor_bytes
from l4pack.checkpoint.matrices import matrices_of
from l4pack.checkpoint.parts import source_parts
from l4pack.checkpoint.shards import FilePlace, Shard
from l4pack.checkpoint.source import Checkpoint
from l4pack.containers.safetensors_folder import CONTAINER, DEFAULT_SHARD_BYTES
from l4pack.errors import SourceError, UsageError
from l4pack.model.tensors import Catalogue, Linear, TensorSpec, canonical_naming, catalogue, rename
from l4pack.plan.assign import model_dtype
from l4pack.plan.memory import KERNELS_LOADED, check_room
from l4pack.units import MIB
from l4pack.work import machine
from l4pack.work.identity import Identity

RECORD_NAME = "l4pack-dequantized.json"
RECORD_VERSION = 1
WEIGHTS = 1 << 20  # numbers of a matrix that are decoded and turned at once
STEP_BYTES = 24  # of each of them: float32 twice, as they are rounded and turned, and what they are decoded from
COPY_BYTES = 16 * MIB  # of a tensor that is copied, at once
_COPIED = 3  # times it, where numbers are decoded and rounded on the way
_USUAL_RAM = 700 * MIB  # over what is loaded, unless more is needed or allowed
_ENTRY_BYTES = 2048  # what is known of a tensor of the artifact


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor of the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work: a tensor as it is (`source`), or one expert's slice of a fused one (`linears`, side by side)."""

    key: str
    tensor: OutTensor
    source: str | None
    linears: tuple[Linear, ...]
    start: int
    nbytes: int
    read_bytes: int
    ram_bytes: int
    place: tuple[str, int]  # where reading begins


@dataclass(frozen=True)
class DequantizePlan:
    """An artifact as a checkpoint; `checkpoint` has its matrices as products."""

    checkpoint: Checkpoint
    tensors: tuple[OutTensor, ...]
    tasks: tuple[Task, ...]
    shards: tuple[Shard, ...]
    places: Mapping[str, FilePlace]
    workers: int
    shard_bytes: int

    @cached_property
    def config_json(self) -> bytes:
        """The artifact's config.json without its quantization."""
        raw: dict[str, Any] = dict(self.checkpoint.config.raw)
        for section in (raw, raw.get("text_config")):
            if isinstance(section, dict) and section.get("for_llm_compressor"):
                section["for_llm_compressor"] = False  # it says that experts lie one by one
        return CONTAINER.configuration(raw)

    @cached_property
    def index_json(self) -> bytes | None:
        """The index, or None when there is one shard."""
        return CONTAINER.index(self.shards, sum(tensor.nbytes for tensor in self.tensors))

    @cached_property
    def record_json(self) -> bytes:
        """The record that lies beside the weights: what they were dequantized from."""
        record = {
            "schema_version": RECORD_VERSION,
            "l4pack_version": __version__,
            "artifact": source_record(self.checkpoint),
            "options": self.options,
            "files": {
                shard.file: {"bytes": shard.nbytes, "header_sha256": hashlib.sha256(shard.prefix).hexdigest()}
                for shard in self.shards
            },
        }
        return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()

    @property
    def options(self) -> dict[str, Any]:
        """Options that decide the bytes, as they are typed."""
        return {"--shard-size": str(self.shard_bytes)}

    @cached_property
    def beside(self) -> dict[str, bytes]:
        """The small files that are made anew."""
        made = {CONTAINER.config_name: self.config_json, RECORD_NAME: self.record_json}
        return made if self.index_json is None else {CONTAINER.index_name: self.index_json, **made}

    @cached_property
    def files(self) -> dict[str, int]:
        """Every file and its exact size."""
        sizes = {shard.file: shard.nbytes for shard in self.shards} | dict(self.checkpoint.companions)
        return sizes | {name: len(data) for name, data in self.beside.items()}

    @property
    def artifact_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def read_bytes(self) -> int:
        """Bytes of the artifact's tensors that are read."""
        return sum(task.read_bytes for task in self.tasks)

    @property
    def peak_ram_bytes(self) -> int:
        """Most resident memory of a run."""
        return _resident(self.checkpoint) + self.workers * max(task.ram_bytes for task in self.tasks)

    @property
    def dequantized(self) -> int:
        """Matrices that are products of codes and scales."""
        entries = self.checkpoint.entries
        return sum(codes_of(entries[linear.tensor]) is not None for linear in self.checkpoint.layout.linears)

    def identity(self) -> Identity:
        """Everything that decides the bytes."""
        store = self.checkpoint.store
        assert store is not None
        layout = hashlib.sha256(b"".join([self.config_json, *(shard.prefix for shard in self.shards)])).hexdigest()
        parts = source_parts(self.checkpoint, store)
        return Identity({"l4pack version": __version__, **self.options, **parts, "layout": layout})


def plan_dequantize(
    checkpoint: Checkpoint, *, shard_bytes: int | None = None, max_ram: int | None = None
) -> DequantizePlan:
    """Plan the checkpoint of an artifact that was opened by `open_original`; reads headers alone.

    Raises SourceError for one without weights, UsageError for one that is not quantized, BudgetError.
    """
    if checkpoint.bare or checkpoint.store is None:
        raise SourceError(f"{checkpoint.name} is a configuration without weights", hint="give an artifact's folder")
    if checkpoint.dequantized is None:
        raise UsageError(f"{checkpoint.name} is not quantized: nothing is to be undone", hint="give an artifact")
    layout = catalogue(checkpoint.config, canonical_naming(checkpoint.config), fused=True)
    made = [_made(checkpoint, layout, spec, experts) for spec, experts in _specs(checkpoint, layout)]
    tensors = tuple(tensor for tensor, _ in made)
    tasks = tuple(sorted((task for _, some in made for task in some), key=lambda task: task.place))
    limit = shard_bytes or DEFAULT_SHARD_BYTES
    shards, places = CONTAINER.lay_out([[tensor] for tensor in tensors], limit)
    room = machine.memory(max_ram)
    largest, loaded = max(task.ram_bytes for task in tasks), _resident(checkpoint)
    allowed = room.nbytes - loaded if max_ram is not None else min(_USUAL_RAM, room.nbytes - loaded)
    workers = max(1, min(machine.cores() + 1, allowed // largest))
    if max_ram is not None:
        check_room(loaded + workers * largest, room)
    return DequantizePlan(checkpoint, tensors, tasks, tuple(shards), places, workers, limit)


def _resident(checkpoint: Checkpoint) -> int:
    return KERNELS_LOADED + _ENTRY_BYTES * len(checkpoint.entries)


def _specs(checkpoint: Checkpoint, layout: Catalogue) -> Iterator[tuple[TensorSpec, list[tuple[Linear, ...]]]]:
    """Every tensor of the released layout, with the artifact's matrices of each expert where it fuses them."""
    experts: defaultdict[str, defaultdict[int, list[Linear]]] = defaultdict(lambda: defaultdict(list))
    for old, new in zip(checkpoint.layout.linears, layout.linears, strict=True):
        if new.expert is not None:
            experts[new.tensor][new.expert].append(old)
    for spec in layout.tensors:
        fused = experts.get(spec.name)
        yield spec, [tuple(fused[expert]) for expert in sorted(fused)] if fused else []


def _made(
    checkpoint: Checkpoint, layout: Catalogue, spec: TensorSpec, experts: list[tuple[Linear, ...]]
) -> tuple[OutTensor, list[Task]]:
    name = rename(spec.name, layout.naming, checkpoint.layout.naming)
    held = [checkpoint.entries[name]] if name in checkpoint.entries else []
    entries = held or [checkpoint.entries[linear.tensor] for linears in experts for linear in linears]
    tensor = OutTensor(spec.name, _dtype(checkpoint, entries), spec.shape)
    if held:
        return tensor, [_copied(held[0], tensor)]
    return tensor, [_fused(checkpoint, tensor, expert, linears) for expert, linears in enumerate(experts)]


def _dtype(checkpoint: Checkpoint, entries: Iterable[TensorEntry]) -> str:
    """The widest of what is kept, where products count as the model's own dtype."""
    found = {model_dtype(checkpoint) if codes_of(entry) else entry.dtype for entry in entries}
    return "F32" if len(found) > 1 or "F32" in found else found.pop()


def _copied(entry: TensorEntry, tensor: OutTensor) -> Task:
    held = min(COPY_BYTES, entry.nbytes) * (1 if entry.dtype == tensor.dtype else _COPIED)
    read = sum(entry.stored.values())
    return Task(tensor.name, tensor, entry.name, (), 0, tensor.nbytes, read, held, (entry.file, entry.start))


def _fused(checkpoint: Checkpoint, tensor: OutTensor, expert: int, linears: tuple[Linear, ...]) -> Task:
    nbytes, matrices = tensor.nbytes // tensor.shape[0], matrices_of(checkpoint)
    entries = [checkpoint.entries[linear.tensor] for linear in linears]
    read = sum(size for entry in entries for size in entry.stored.values())
    ram = nbytes + STEP_BYTES * max(WEIGHTS, 128 * linears[0].in_features)
    place = min(matrices.begins(linear) for linear in linears)
    key = f"{tensor.name} {expert}"
    return Task(key, tensor, None, linears, expert * nbytes, nbytes, read, ram, place)


def is_this(plan: DequantizePlan, out: Path) -> bool:
    """Whether `out` holds this checkpoint, by its record and sizes. Raises UsageError when it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    there = out.is_dir() and all((out / name).is_file() for name in plan.files)
    same = there and all((out / name).stat().st_size == size for name, size in plan.files.items())
    if same and (out / RECORD_NAME).read_bytes() == plan.record_json:
        return True
    raise UsageError(f"{out} exists and is not this checkpoint", hint="choose another --out, or remove it yourself")
