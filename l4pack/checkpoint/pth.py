"""One file that torch.save wrote: which tensors it holds and where their numbers lie, from its directory and its pickle.

No weight is read and nothing is unpickled (`pickled.py`); the same code judges a file on this machine and, by its parts,
one on the Hub.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.checkpoint.pickled import MAX_PICKLE_BYTES, Described, described
from l4pack.checkpoint.zipped import LOCAL, Member, ReadAt, aligned, begins, read_directory
from l4pack.datafile import LFS_MARK, refuse_lfs_pointer
from l4pack.errors import SourceError

PICKLE, ORDER = "data.pkl", "byteorder"
_LONGEST_EXTRA = 65_535
_SAVE_AGAIN = "torch.save(torch.load(FILE, weights_only=True), FILE), where you trust the file, writes it as zip"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of one file: its first number is at byte `start`, neighbours along each axis are `strides` numbers apart."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class PthHeader:
    """What a file holds by name: its tensors, and the names of what is none."""

    tensors: dict[str, StoredTensor]
    others: tuple[str, ...]


def read_pth(path: Path, file: str) -> PthHeader:
    """What a file on this machine holds. Raises SourceError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            return parse_pth(lambda start, nbytes: os.pread(descriptor, nbytes, start), size, file)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}", hint="check the file, or download it again") from error


def parse_pth(read: ReadAt, size: int, file: str, *, trusting: bool = False) -> PthHeader:
    """What a file of `size` bytes holds, whose parts `read` gives.

    With `trusting`, members' own headers are not read but for the pickle's: their bytes are taken to begin where
    torch.save puts them. Raises SourceError.
    """
    mark = read(0, len(LFS_MARK))
    refuse_lfs_pointer(mark, file)
    if mark[:2] != b"PK":
        kind = "a pickle of the kind before torch 1.6" if mark[:1] == b"\x80" else "no file that torch.save wrote"
        raise SourceError(f"{file} is {kind}, not a zip file of tensors", hint=_SAVE_AGAIN)
    members = read_directory(read, size, file)
    ends = dict(zip(members, [*(member.header for member in members[1:]), size], strict=True))
    root, pickle = _pickle(members, file)
    raw = _content(read, pickle, ends[pickle], file)
    by_name = {member.name: member for member in members}
    order = by_name.get(f"{root}{ORDER}")
    if order is not None and not trusting and _content(read, order, ends[order], file).strip() != b"little":
        raise SourceError(f"{file} was written on a big-endian machine", hint="save it again on another")
    starts: dict[str, int] = {}
    tensors, others = {}, []
    for name, value in described(raw, file).items():
        if not isinstance(value, Described):
            others.append(name)
            continue
        storage = by_name.get(f"{root}data/{value.key}")
        if storage is None:
            raise SourceError(f"{file} has no storage {value.key!a} for {name!a}", hint="download it again")
        if value.key not in starts:
            starts[value.key] = aligned(storage) if trusting else begins(read, storage, ends[storage], file)
        tensors[name] = _stored(name, value, storage, starts[value.key], file)
    return PthHeader(tensors, tuple(others))


def _pickle(members: list[Member], file: str) -> tuple[str, Member]:
    """What all names begin with, and the member that describes the tensors."""
    found = [member for member in members if member.name.count("/") == 1 and member.name.endswith(f"/{PICKLE}")]
    if len(found) != 1:
        raise SourceError(f"{file} is a zip file without one {PICKLE}", hint="it is not what torch.save writes")
    if found[0].nbytes > MAX_PICKLE_BYTES:
        raise SourceError(f"{file} has a {PICKLE} of {found[0].nbytes:,} bytes, which is implausible", hint=_SAVE_AGAIN)
    return found[0].name.removesuffix(PICKLE), found[0]


def _content(read: ReadAt, member: Member, end: int, file: str) -> bytes:
    """All bytes of a small member, in one read: there may be a network between."""
    ahead = LOCAL.size + len(member.name) + _LONGEST_EXTRA + min(member.nbytes, MAX_PICKLE_BYTES)
    raw = read(member.header, min(ahead, end - member.header))
    start = begins(lambda _, nbytes: raw[:nbytes], member, end, file) - member.header
    content = raw[start : start + member.nbytes]
    if len(content) != member.nbytes:
        raise SourceError(f"{file} ends inside {member.name!a}", hint="download it again")
    return content


def _stored(name: str, value: Described, storage: Member, start: int, file: str) -> StoredTensor:
    """A tensor within its storage. Raises SourceError for one that leaves it, or whose numbers lie on one another."""
    bits = DTYPE_BITS[value.dtype]
    if storage.nbytes != value.held:
        raise SourceError(
            f"{file} says that the storage of {name!a} has {value.held:,} bytes, it has {storage.nbytes:,}",
            hint="the file is damaged: download it again",
        )
    last = value.offset + sum((size - 1) * step for size, step in zip(value.shape, value.strides, strict=True))
    if math.prod(value.shape) and (last + 1) * bits > 8 * storage.nbytes:
        raise SourceError(f"{file} places {name!a} beyond its storage", hint="the file is damaged: download it again")
    reach = 0
    for size, step in sorted(zip(value.shape, value.strides, strict=True), key=lambda axis: axis[1]):
        if size > 1 and step <= reach:
            raise SourceError(
                f"{file} has {name!a} expanded: several of its numbers are one in the file",
                hint="save it again with .contiguous()",
            )
        reach += (size - 1) * step if size > 1 else 0
    return StoredTensor(name, file, value.dtype, value.shape, value.strides, start + value.offset * bits // 8)
