"""What an export must know of a container: which type carries a matrix, what tensors are called, which files there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.shards import FilePlace, Shard
from l4pack.export.artifact import Artifact, Source
from l4pack.formats.carrier import Carrier, SolvedRows
from l4pack.model.config import Llama4Config
from l4pack.model.tensors import Role
from l4pack.quant.floats import Float32Array
from l4pack.quant.scheme import Scheme

TOWER = (Role.VISION, Role.PROJECTOR)


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor of the container, in its own words for types; `row_bytes` of each output row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class Carried:
    """Matrices that one set of tensors holds one after another: all experts', or a single one.

    `carrier` is None where floats stay floats. `rounded_to`: rounded again to a scheme that it carries. `constant`: not
    the artifact's, but what its configuration says.
    """

    role: Role
    sources: tuple[Source, ...]
    tensors: tuple[OutTensor, ...]
    carrier: Carrier | None = None
    rounded_to: Scheme | None = None
    constant: NDArray[np.float32] | None = None

    @property
    def name(self) -> str:
        """Its first tensor's name, which is its own."""
        return self.tensors[0].name

    @property
    def layer(self) -> int | None:
        """The layer it belongs to."""
        return self.sources[0].layer if self.sources else None


@dataclass(frozen=True)
class Layout:
    """The files of an export: those with tensors, each tensor's place, and the bytes of the small ones beside them."""

    shards: tuple[Shard, ...]
    places: Mapping[str, FilePlace]
    beside: Mapping[str, bytes] = field(default_factory=dict)


class Target(Protocol):
    """A container that artifacts are exported to."""

    name: str
    clients: str  # who loads it, in words
    rounded_to: Scheme
    alignment: int  # bytes that a tensor's place in a file is a multiple of

    def check_model(self, config: Llama4Config) -> None:
        """Raise UsageError for a model that its runtime would answer wrongly with, or not load."""
        ...

    def as_run(self, config: Llama4Config) -> Llama4Config:
        """The configuration as its runtime runs it."""
        ...

    def check(self, artifact: Artifact) -> list[str]:
        """What a user should know of a model that it takes, as warnings."""
        ...

    def carrier(self, scheme: Scheme, columns: int, dtype: str) -> Carrier | str:
        """What carries such a matrix as it was solved, or why there is nothing."""
        ...

    def holds(self, role: Role) -> bool:
        """Whether tensors of a role go into it."""
        ...

    def tensor_name(self, artifact: Artifact, source: str, role: Role, layer: int | None, suffix: str) -> str:
        """The name of a tensor, from the name that one of its matrices has in the artifact."""
        ...

    def carries(self, file: str) -> bool:
        """Whether a file beside the artifact's weights goes along, beyond licences."""
        ...

    def float_type(self, artifact: Artifact, role: Role, source: Source, shape: tuple[int, ...]) -> str:
        """The type that floats of a shape get, which has every number of theirs."""
        ...

    def constants(self, artifact: Artifact) -> list[Carried]:
        """Tensors that follow from the configuration."""
        ...

    def lay_out(self, artifact: Artifact, carried: Sequence[Carried], limit: int | None) -> Layout:
        """The files, of at most `limit` bytes of tensors each (None: as the container's clients expect)."""
        ...

    @property
    def proved_by(self) -> str:
        """The library that reads it back, and its version."""
        ...

    def opened(self, folder: Path, layout: Layout) -> Mapping[str, FilePlace]:
        """Where that library finds each tensor in the files written. Raises L4packError for one of another type or shape."""
        ...

    def same_codes(self, carried: Carried, rows: Sequence[NDArray[np.uint8]], solved: SolvedRows) -> bool | None:
        """Whether the bytes of some rows hold what was solved, by their integers; None where only `decode` can tell."""
        ...

    def decode(self, carried: Carried, rows: Sequence[NDArray[np.uint8]]) -> Float32Array:
        """The weights of some rows by that library: bytes [rows, row_bytes] of each tensor in, float32 [rows, columns] out."""
        ...
