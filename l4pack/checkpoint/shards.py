"""The files that a container lays tensors out in, before a byte is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from l4pack.checkpoint.header import TypedTensor


class Sized(TypedTensor, Protocol):
    """A tensor to be written."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FilePlace:
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
