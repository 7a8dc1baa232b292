"""The directory of a zip file that torch.save wrote, bounded and checked before it is believed; nothing is unpacked.

Members are stored as they are, one after another, and the directory ends the file (APPNOTE.TXT of PKWARE, sections 4.3
and 4.5.3; PyTorch's `caffe2/serialize/inline_container.cc`). What a writer of tensors never does is refused: compression,
encryption, several disks, comments, members that share bytes, and two places that say different things of one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from l4pack.errors import SourceError

MAX_DIRECTORY_BYTES = 32_000_000  # Maverick's has some 100 kB
ALIGNMENT = 64  # of members' bytes, by torch.save
LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
END_BYTES = _END64.size + _LOCATOR.size + _END.size
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _STREAMED = 1, 8  # bits of the flags: the second says that sizes come after the bytes

ReadAt = Callable[[int, int], bytes]
"""Bytes of a file, from a place on; fewer where it ends."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member as the directory has it: where its own header is, and its bytes' number."""

    name: str
    header: int
    nbytes: int


def read_directory(read: ReadAt, size: int, file: str) -> list[Member]:
    """The members of a zip file of `size` bytes in the order of their places. Raises SourceError."""
    count, length, start = _end(read, size, file)
    raw = read(start, length)
    if len(raw) != length:
        _bad(file, "ends inside its directory")
    members = list(_members(raw, file))
    if len(members) != count:
        _bad(file, f"says that it has {count:,} members, its directory has {len(members):,}")
    if len({member.name for member in members}) != count:
        _bad(file, "has two members of one name")
    members.sort(key=lambda member: member.header)
    ends = [member.header for member in members[1:]] + [start]
    for member, end in zip(members, ends, strict=True):
        if member.header + LOCAL.size + len(member.name.encode()) + member.nbytes > end:
            _bad(file, f"places {member.name!a} over what comes after it")
    return members


def begins(read: ReadAt, member: Member, end: int, file: str) -> int:
    """Where a member's bytes begin; they must end before `end`. Raises SourceError where its own header disagrees."""
    raw = read(member.header, LOCAL.size + len(member.name.encode()))
    if len(raw) < LOCAL.size or raw[:4] != b"PK\3\4":
        _bad(file, f"has no member where its directory places {member.name!a}")
    _, _, flags, method, _, _, _, packed, unpacked, name, extra = LOCAL.unpack_from(raw)
    stated = {packed, unpacked} - {member.nbytes, _FULL32} - ({0} if flags & _STREAMED else set())
    if method or flags & _ENCRYPTED or stated or raw[LOCAL.size :] != member.name.encode():
        _bad(file, f"says something else of {member.name!a} than its directory")
    start: int = member.header + LOCAL.size + name + extra
    if start + member.nbytes > end:
        _bad(file, f"places {member.name!a} over what comes after it")
    return start


def aligned(member: Member) -> int:
    """Where torch.save puts a member's bytes, without reading its header."""
    start = member.header + LOCAL.size + len(member.name.encode()) + 4
    large, far = member.nbytes >= _FULL32, member.header >= _FULL32
    start += 4 * (large or far) + 16 * large + 8 * far
    return -(-start // ALIGNMENT) * ALIGNMENT


def _end(read: ReadAt, size: int, file: str) -> tuple[int, int, int]:
    """Members, bytes and place of the directory, as the last bytes of the file say."""
    tail = read(max(0, size - END_BYTES), END_BYTES)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        _bad(file, "is cut short, or no zip file: its last bytes are no directory's end")
    _, disk, first, here, count, length, start, comment = _END.unpack_from(tail, len(tail) - _END.size)
    end = size - _END.size
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\6\7":
        end = size - END_BYTES
        large = _end64(locator, tail, end, file)
        short = zip((count, length, start), (_FULL16, _FULL32, _FULL32), large, strict=True)
        if any(value not in (full, true) for value, full, true in short):
            _bad(file, "says two different things of its directory")
        count, length, start = large
    elif count == _FULL16 or _FULL32 in (length, start):
        _bad(file, "leaves out where its directory is")
    elif here != count:
        _bad(file, "says two different things of its directory")
    if disk or first or comment:
        _bad(file, "is one of several disks, or has a comment: torch.save writes neither")
    if length > min(MAX_DIRECTORY_BYTES, size) or start + length != end:
        _bad(file, f"claims a directory of {length:,} bytes at {start:,}, which is not where it ends")
    return count, length, start


def _end64(locator: bytes, tail: bytes, end: int, file: str) -> tuple[int, int, int]:
    _, disk, place, disks = _LOCATOR.unpack(locator)
    if len(tail) < END_BYTES or place != end or disk or disks > 1:
        _bad(file, "places its directory's end elsewhere than it is")
    mark, record, _, _, number, first, here, count, length, start = _END64.unpack_from(tail)
    if mark != b"PK\6\6" or record != _END64.size - 12 or number or first or here != count:
        _bad(file, "has a directory's end that can't be true")
    return count, length, start


def _members(raw: bytes, file: str) -> Iterator[Member]:
    place = 0
    while place < len(raw):
        if len(raw) - place < _CENTRAL.size or raw[place : place + 4] != b"PK\1\2":
            _bad(file, "has a directory that can't be read")
        fields = _CENTRAL.unpack_from(raw, place)
        flags, method, packed, unpacked, name, extra, comment, disk, header = (
            *(fields[3], fields[4]), *fields[8:13], fields[13], fields[16],
        )  # fmt: skip
        place += _CENTRAL.size
        text, more = raw[place : place + name], raw[place + name : place + name + extra]
        place += name + extra + comment
        if place > len(raw) or not text.isascii() or not text.decode().isprintable():
            _bad(file, "has a directory that can't be read")
        packed, unpacked, header = _whole([unpacked, packed, header], more, file)
        if method or packed != unpacked or flags & _ENCRYPTED or disk:
            _bad(file, f"has {text.decode()!a} compressed or encrypted: torch.save stores tensors as they are")
        yield Member(text.decode(), header, unpacked)


def _whole(short: list[int], extra: bytes, file: str) -> tuple[int, int, int]:
    """Packed and unpacked bytes and the header's place, those too large for 32 bits from the extra field."""
    large = _extra64(extra)
    found = [short[0], short[1], short[2]]
    for index, value in enumerate(short):
        if value == _FULL32:
            if not large:
                _bad(file, "leaves out the size of a member")
            found[index] = large.pop(0)
    return found[1], found[0], found[2]


def _extra64(extra: bytes) -> list[int]:
    """The numbers of 64 bits in a member's extra field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            content = extra[4 : 4 + length]
            return list(struct.unpack_from(f"<{len(content) // 8}Q", content))
        extra = extra[4 + length :]
    return []


def _bad(file: str, what: str) -> NoReturn:
    raise SourceError(f"{file} {what}", hint="the file is damaged, or not what torch.save writes: download it again")
