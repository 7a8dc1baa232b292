"""What parts of data files were when a state vouched for them, and whether they still are.

Sealing reads the parts once more, as a rule out of the page cache, through buffers of 1 MiB, on up to `THREADS` threads:
about 1 GB/s each. 64 GB of hidden states take half a minute a layer on two threads, beside computing where a saver
thread seals. No more memory is kept than the buffers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from l4pack.errors import UsageError
from l4pack.work.files import open_own

THREADS = 4
_CHUNK = 1 << 20
_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file of a work folder, `nbytes` of them from `start`."""

    file: str
    start: int
    nbytes: int


class Seal(BaseModel):
    """A span and the hex SHA-256 of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: Annotated[str, Field(max_length=_LONGEST_NAME)]
    start: Annotated[int, Field(ge=0)]
    nbytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def seal(folder: Path, spans: Sequence[Span]) -> list[Seal]:
    """Seals of spans whose bytes are on disk. Raises OSError where one is not all there."""
    return [
        Seal(file=span.file, start=span.start, nbytes=span.nbytes, sha256=digest)
        for span, digest in zip(spans, _digests(folder, spans), strict=True)
    ]


def unbroken(folder: Path, spans: Sequence[Span], seals: Iterable[Seal]) -> bool:
    """Whether each of the spans is sealed, and is as it was. Files are read only if all are sealed."""
    known = {Span(one.file, one.start, one.nbytes): one.sha256 for one in seals}
    if any(span not in known for span in spans):
        return False
    try:
        return [known[span] for span in spans] == _digests(folder, spans)
    except (OSError, UsageError):  # not there, not long enough, not a file
        return False


def _digests(folder: Path, spans: Sequence[Span]) -> list[str]:
    with ThreadPoolExecutor(min(THREADS, max(1, len(spans))), thread_name_prefix="seal") as threads:
        return list(threads.map(lambda span: _digest(folder, span), spans))


def _digest(folder: Path, span: Span) -> str:
    descriptor = open_own(folder / span.file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        digest, place, end = hashlib.sha256(), span.start, span.start + span.nbytes
        while place < end:
            chunk = os.pread(descriptor, min(_CHUNK, end - place), place)
            if not chunk:
                raise OSError(f"{span.file} ends early")
            digest.update(chunk)
            place += len(chunk)
        return digest.hexdigest()
    finally:
        os.close(descriptor)
