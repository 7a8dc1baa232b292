"""The safetensors files to be written: which tensor goes where, and every header, before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from l4pack.checkpoint.exports import SINGLE_NAME
from l4pack.checkpoint.header import DTYPE_BITS, LENGTH_BYTES, TypedTensor
from l4pack.checkpoint.source import INDEX_NAME

DEFAULT_SHARD_BYTES = 5_000_000_000
_METADATA = {"format": "pt"}  # transformers refuses files without it


class Sized(TypedTensor, Protocol):
    """A tensor to be written."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes go: file name and offset from the start of that file."""

    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file to be written: its first bytes, and its whole size."""

    file: str
    prefix: bytes
    nbytes: int
    tensors: tuple[str, ...]


def lay_out(groups: Iterable[Sequence[Sized]], limit: int) -> tuple[list[Shard], dict[str, Place]]:
    """Fill shards of at most `limit` bytes of tensors; a group (one module's tensors) is never split.

    Within a shard tensors are ordered by element size, largest first, as the safetensors library writes them, so that
    every tensor stays aligned to its elements.
    """
    filled: list[list[Sized]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if filled[-1] and size + nbytes > limit:
            filled.append([])
            size = 0
        filled[-1] += group
        size += nbytes
    shards, places = [], {}
    for number, tensors in enumerate(filled, start=1):
        file = SINGLE_NAME if len(filled) == 1 else f"model-{number:05d}-of-{len(filled):05d}.safetensors"
        shard, placed = _shard(file, tensors)
        shards.append(shard)
        places.update(placed)
    return shards, places


def _shard(file: str, tensors: list[Sized]) -> tuple[Shard, dict[str, Place]]:
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": _METADATA}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        offsets[tensor.name] = (start, tensor.nbytes)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % LENGTH_BYTES)
    prefix = len(raw).to_bytes(LENGTH_BYTES, "little") + raw
    places = {name: Place(file, len(prefix) + start, nbytes) for name, (start, nbytes) in offsets.items()}
    return Shard(file, prefix, len(prefix) + end, tuple(offsets)), places


def index_json(shards: Sequence[Shard], total_bytes: int) -> bytes | None:
    """The bytes of the index, or None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    value = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(value, indent=2) + "\n").encode()


__all__ = ["DEFAULT_SHARD_BYTES", "INDEX_NAME", "Place", "Shard", "index_json", "lay_out"]
