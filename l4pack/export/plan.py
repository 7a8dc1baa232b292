"""What becomes of every tensor of an artifact in another container, before anything is written.

Two stages: headers say which type carries a matrix; then the scales, a hundredth of the artifact, say whether that type
has every one of them. What would be rounded is refused, or told where the user allows it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from l4pack import __version__
from l4pack.artifact.contents import recorded_digest
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import read_manifest
from l4pack.checkpoint.companions import is_licence
from l4pack.checkpoint.parts import source_parts
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.errors import SourceError, UsageError
from l4pack.export.artifact import STEP, Artifact, Own, Rows, Source
from l4pack.export.record import RECORD_NAME, RECORD_VERSION
from l4pack.export.target import Carried, Layout, OutTensor, Target
from l4pack.formats.carrier import Carrier, RowPart
from l4pack.model.tensors import Linear, Role
from l4pack.plan.memory import KERNELS_LOADED, MODEL_LOADED
from l4pack.quant.scheme import Scheme
from l4pack.work import machine
from l4pack.work.identity import Identity

EXACT_RECIPE = "int4-g32"
EMBEDDINGS = (Role.EMBEDDING, Role.LM_HEAD)
_NEAREST = f"--recipe {EXACT_RECIPE} makes an artifact that can be carried exactly; --lossy rounds what can't"
_STEP_BYTES = (
    24  # a weight's, while it is carried or proved: the artifact's, float32 twice, and the client's own copies
)
_TOKEN_FACTOR = 24  # a header's bytes while the client's library reads them: every word of a tokenizer is an object


@dataclass(frozen=True)
class Rounded:
    """Where a value would not be kept: the artifact's module, or the tensor of a whole layer, and why."""

    where: str
    why: str
    matrices: int
    to: str


@dataclass(frozen=True)
class ExportPlan:
    """An artifact in another container."""

    artifact: Artifact
    target: Target
    carried: tuple[Carried, ...]
    layout: Layout
    rounded: tuple[Rounded, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    workers: int
    options: dict[str, Any]

    @cached_property
    def record_json(self) -> bytes:
        """The record that lies beside the files: what was exported, and which library proved that it is the same."""
        folder = _folder(self.artifact.checkpoint)
        made_from = read_manifest(folder).source.model_dump() if (folder / MANIFEST_NAME).is_file() else None
        record = {
            "schema_version": RECORD_VERSION,
            "l4pack_version": __version__,
            "container": self.target.name,
            "options": {
                "split": self.options["--split"],
                "lossy": self.options["--lossy"],
                "round_embeddings": self.options["--round-embeddings"],
            },
            "proved_by": self.target.proved_by,
            "artifact": {"contents_sha256": recorded_digest(folder), "source": made_from},
            "exact": not self.rounded,
            "rounded": [vars(one) for one in self.rounded],
            "matrices": self.matrices,
            "weights": self.weights,
            "files": {
                shard.file: {"bytes": shard.nbytes, "header_sha256": hashlib.sha256(shard.prefix).hexdigest()}
                for shard in self.layout.shards
            },
        }
        return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()

    @cached_property
    def copied(self) -> dict[str, int]:
        """Files that are copied as they are, and their bytes."""
        companions = self.artifact.checkpoint.companions
        return {name: size for name, size in companions.items() if self.target.carries(name) or is_licence(name)}

    @cached_property
    def files(self) -> dict[str, int]:
        """Every file and its exact size."""
        sizes = {shard.file: shard.nbytes for shard in self.layout.shards}
        sizes |= {name: len(data) for name, data in self.layout.beside.items()}
        return sizes | self.copied | {RECORD_NAME: len(self.record_json)}

    @property
    def artifact_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def read_bytes(self) -> int:
        """Bytes of the artifact that are carried; what is written is read back as well."""
        return sum(self.artifact.nbytes(source) for one in self.carried for source in one.sources)

    @property
    def matrices(self) -> int:
        """Matrices and other tensors of the artifact that are carried."""
        return sum(len(one.sources) for one in self.carried)

    @property
    def weights(self) -> int:
        """Numbers in them."""
        return sum(source.rows * source.columns for one in self.carried for source in one.sources)

    @cached_property
    def peak_ram_bytes(self) -> int:
        """Most resident memory of a run."""
        largest = max(_step_weights(source) for one in self.carried for source in one.sources)
        headers = sum(len(shard.prefix) for shard in self.layout.shards)
        return _loaded() + self.workers * largest * _STEP_BYTES + headers * _TOKEN_FACTOR

    def identity(self) -> Identity:
        """Everything that decides the bytes."""
        store = self.artifact.checkpoint.store
        assert store is not None
        layout = hashlib.sha256(b"".join(shard.prefix for shard in self.layout.shards))
        parts = source_parts(self.artifact.checkpoint, store)
        return Identity({"l4pack version": __version__, **self.options, **parts, "layout": layout.hexdigest()})


def plan_export(
    checkpoint: Checkpoint,
    target: Target,
    *,
    split: int | None = None,
    lossy: bool = False,
    round_embeddings: bool = False,
    max_ram: int | None = None,
    to_come: Mapping[str, Own] | None = None,
) -> ExportPlan:
    """Plan the export of an artifact, or of a plain checkpoint, to a container; reads headers and scales.

    `split`: most bytes of tensors in a file. `round_embeddings`: the embedding and the head are rounded to the nearest of
    eight bits. `to_come`: how each quantized module of an artifact that
    is planned only will be stored; whether its scales are kept is not known then. Raises SourceError, and UsageError for a model that the container's runtime
    can't run, or a value that it can't carry where `lossy` does not allow that.
    """
    _folder(checkpoint)
    artifact = Artifact(checkpoint, to_come)
    target.check_model(artifact.config)
    warnings = target.check(artifact)
    carried, rounded = _assign(artifact, target)
    rounded += _inexact(artifact, carried) if to_come is None else []
    if rounded and not lossy:
        raise _refusal(target, rounded)
    if round_embeddings:
        carried = [_embedding(artifact, target, one) for one in carried]
        rounded += [_as_asked(one) for one in carried if one.role in EMBEDDINGS]
    left_out = [spec.name for spec in artifact.others if not target.holds(spec.role)]
    whole = (*carried, *target.constants(artifact))
    return ExportPlan(
        artifact=artifact,
        target=target,
        carried=whole,
        layout=target.lay_out(artifact, whole, split),
        rounded=tuple(rounded),
        left_out=tuple(left_out),
        warnings=tuple(warnings),
        workers=_workers(whole, max_ram),
        options={"--to": target.name, "--split": split, "--lossy": lossy, "--round-embeddings": round_embeddings},
    )


def _folder(checkpoint: Checkpoint) -> Path:
    store = checkpoint.store
    if not isinstance(store, LocalStore):
        raise SourceError(f"{checkpoint.name} is not a folder on this machine", hint="give an artifact's folder")
    return store.folder


def _assign(artifact: Artifact, target: Target) -> tuple[list[Carried], list[Rounded]]:
    """What carries each tensor, in the order of the model."""
    carried, rounded = [], []
    for sources in _together(artifact.layout.linears):
        one, lost = _matrices(artifact, target, [artifact.matrix(linear) for linear in sources])
        carried.append(one)
        rounded += lost
    for spec in artifact.others:
        if target.holds(spec.role):
            source = artifact.tensor(spec)
            carried.append(_floats(artifact, target, spec.role, spec.layer, [source], spec.shape))
    order = {spec.name: number for number, spec in enumerate(artifact.layout.tensors)}
    return sorted(carried, key=lambda one: _first(order, one)), rounded


def _first(order: dict[str, int], one: Carried) -> int:
    source = one.sources[0]
    return order[source.linear.tensor if source.linear is not None else source.name]


def _together(linears: Iterable[Linear]) -> list[list[Linear]]:
    """Matrices that one tensor holds: those of a layer's experts, each other one alone."""

    def key(linear: Linear) -> tuple[int, str, str]:
        return linear.layer, linear.role, linear.projection

    return [list(group) for _, group in groupby(sorted(linears, key=lambda one: (*key(one), one.expert or 0)), key)]


def _matrices(artifact: Artifact, target: Target, sources: list[Source]) -> tuple[Carried, list[Rounded]]:
    first, linear = sources[0], sources[0].linear
    assert linear is not None
    kinds = {(one.own[1] if one.own else None, one.dtype) for one in sources}
    if len(kinds) > 1:
        raise UsageError(
            f"the experts of layer {linear.layer} differ in scheme, and one tensor of {target.name} holds them all",
            hint="quantize them alike",
        )
    if first.own is None:
        return _floats(artifact, target, linear.role, linear.layer, sources, _stacked(linear, len(sources))), []
    found = target.carrier(first.own[1], first.columns, first.dtype)
    if not isinstance(found, str):
        return _integers(artifact, target, sources, found, None), []
    carrier = target.carrier(target.rounded_to, first.columns, first.dtype)
    if isinstance(carrier, str):
        raise UsageError(f"{first.name}: {carrier}", hint="quantize in groups of 32")
    lost = Rounded(first.name, found, len(sources), carrier.name)
    return _integers(artifact, target, sources, carrier, target.rounded_to), [lost]


def _stacked(linear: Linear, count: int) -> tuple[int, ...]:
    shape = linear.out_features, linear.in_features
    return shape if linear.expert is None else (count, *shape)


def _integers(
    artifact: Artifact, target: Target, sources: list[Source], carrier: Carrier, rounded_to: Scheme | None
) -> Carried:
    linear = sources[0].linear
    assert linear is not None
    tensors = tuple(
        _out(artifact, target, linear.role, linear.layer, sources, part, _stacked(linear, len(sources)))
        for part in carrier.parts(linear.in_features)
    )
    return Carried(linear.role, tuple(sources), tensors, carrier, rounded_to)


def _embedding(artifact: Artifact, target: Target, one: Carried) -> Carried:
    """The embedding or the head in eight bits, anything else as it is. Raises UsageError for a width that has no groups."""
    if one.role not in EMBEDDINGS:
        return one
    (source,) = one.sources
    carrier = target.carrier(target.rounded_to, source.columns, source.dtype)
    if isinstance(carrier, str):
        raise UsageError(f"{source.name} can't be rounded: {carrier}", hint="leave --round-embeddings out")
    parts = carrier.parts(source.columns)
    shape = (source.rows, source.columns)
    tensors = tuple(_out(artifact, target, one.role, None, one.sources, part, shape) for part in parts)
    return Carried(one.role, one.sources, tensors, carrier, target.rounded_to)


def _as_asked(one: Carried) -> Rounded:
    assert one.carrier is not None
    return Rounded(one.sources[0].name, "asked for", 1, one.carrier.name)


def _floats(
    artifact: Artifact, target: Target, role: Role, layer: int | None, sources: list[Source], shape: tuple[int, ...]
) -> Carried:
    dtype, columns = target.float_type(artifact, role, sources[0], shape), sources[0].columns
    part = RowPart("", dtype, columns, columns * (4 if dtype == "F32" else 2))
    return Carried(role, tuple(sources), (_out(artifact, target, role, layer, sources, part, shape),))


def _out(
    artifact: Artifact,
    target: Target,
    role: Role,
    layer: int | None,
    sources: Sequence[Source],
    part: RowPart,
    shape: tuple[int, ...],
) -> OutTensor:
    name = target.tensor_name(artifact, sources[0].name, role, layer, part.suffix)
    nbytes = sum(source.rows for source in sources) * part.nbytes
    return OutTensor(name, part.dtype, (*shape[:-1], part.elements), nbytes, part.nbytes)


def _inexact(artifact: Artifact, carried: Sequence[Carried]) -> list[Rounded]:
    """Where a scale is not one that its type has; reads the scales of every integer matrix."""
    store = artifact.checkpoint.store
    assert store is not None
    with Reader(artifact.checkpoint.entries, store.path) as reader, ThreadPoolExecutor(machine.cores()) as pool:
        rows = Rows(artifact, reader)
        found = pool.map(lambda one: _lost(one, rows), carried)
        return [one for one in found if one is not None]


def _lost(one: Carried, rows: Rows) -> Rounded | None:
    if one.carrier is None or one.rounded_to is not None:
        return None
    solved = (source for source in one.sources if source.integers)
    lost = [source.name for source in solved if one.carrier.inexact(*rows.scales(source)).any()]
    if not lost:
        return None
    return Rounded(lost[0], f"{one.carrier.name} does not have all its scales", len(lost), one.carrier.name)


def _refusal(target: Target, rounded: Sequence[Rounded]) -> UsageError:
    first, count = rounded[0], sum(one.matrices for one in rounded)
    others = f"; {count} matrices in all" if count > 1 else ""
    return UsageError(f"{target.name} can't carry {first.where} exactly: {first.why}{others}", hint=_NEAREST)


def _loaded() -> int:
    """Memory before the first buffer: compressed-tensors brings torch, where it had to be asked what a stanza means."""
    return MODEL_LOADED if "torch" in sys.modules else KERNELS_LOADED


def _step_weights(source: Source) -> int:
    longest: int = max(step.stop - step.start for step in source.steps())
    return longest * source.columns


def _workers(carried: Sequence[Carried], max_ram: int | None) -> int:
    """A thread a core and one for the disk, as far as memory goes."""
    largest = max(_step_weights(source) for one in carried for source in one.sources)
    room = machine.memory(max_ram).nbytes - _loaded()
    return max(1, min(machine.cores() + 1, room // (max(largest, STEP) * _STEP_BYTES)))
