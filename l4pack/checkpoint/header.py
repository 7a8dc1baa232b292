"""safetensors headers, bounded before they are believed.

A safetensors file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, "Format"). The safetensors library checks a file by mapping it; here the
same rules are checked on the header alone, so that a plan reads no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from l4pack.datafile import LFS_MARK, refuse_lfs_pointer
from l4pack.errors import SourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Five times what a whole unfused Maverick in one file takes. The safetensors library's own limit, 100 MB, lets a hostile
# header take 2 GB of memory before it is refused.
MAX_HEADER_BYTES = 32_000_000
LENGTH_BYTES = 8
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


Box = tuple[tuple[int, int], ...]
"""A part of a tensor: of each axis, the first index and the one after the last."""


class Numbers(Protocol):
    """Where a derivation gets numbers from; `reader.Reader` is one."""

    def strided(self, file: str, start: int, strides: Sequence[int], out: NDArray[Any], name: str) -> None:
        """Fill `out` with numbers that lie `strides` apart from byte `start` of a file on. Raises SourceError."""
        ...

    def part(self, entry: TensorEntry, box: Box) -> NDArray[Any]:
        """A part of another tensor. Raises SourceError."""
        ...


class Derivation(Protocol):
    """How a tensor comes to be that no file holds as it is: of pieces in several files, of codes and scales, merged.

    A frozen dataclass of plain values: it is compared, pickled, and its `repr` is part of what a source is.
    """

    @property
    def stored(self) -> Mapping[str, int]:
        """The bytes that are read of each file for the whole tensor."""
        ...

    def read(self, reader: Numbers, box: Box, out: NDArray[Any]) -> None:
        """Put a part of the tensor into `out`, an array of the part's shape and any strides, in the NumPy type of the
        entry's dtype. The same numbers however the tensor is cut; safe to use from several threads. Raises SourceError.
        """
        ...


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: the file it is in, and its bytes' place counted from the start of that file.

    A tensor with a `derived` is made as it is read: `dtype`, `shape` and `nbytes` are what it is made to be, `file` and
    `start` where reading it begins.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    derived: Derivation | None = field(default=None, repr=False)

    @property
    def stored(self) -> Mapping[str, int]:
        """Bytes that are read for it, by file."""
        return {self.file: self.nbytes} if self.derived is None else self.derived.stored

    @property
    def identity(self) -> str:
        """All that is said of it here; a change of it is a change of the source."""
        return repr(self) if self.derived is None else f"{self!r} {self.derived!r}"


class TypedTensor(Protocol):
    """Anything with a tensor's name, safetensors dtype and shape."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor with a safetensors dtype of DTYPE_BITS."""
    return DTYPE_BITS[dtype] // 8 * math.prod(shape)


def read_header(path: Path, file: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in file order. Raises SourceError when the header can't be true."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(len(LFS_MARK))
            refuse_lfs_pointer(start, file)
            stream.seek(LENGTH_BYTES)
            length = int.from_bytes(start[:LENGTH_BYTES], "little")
            if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                _bad(file, f"claims a header of {length:,} bytes in a file of {size:,}")
            raw = stream.read(length)
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}", hint="check the file, or download it again") from error
    return parse_header(raw, size - LENGTH_BYTES - length, file)


def parse_header(raw: bytes, data_bytes: int, file: str) -> dict[str, TensorEntry]:
    """Read the JSON part of a header of a file that holds `data_bytes` bytes of tensors. Raises SourceError."""
    try:
        # Decoded here: `json.loads` would take UTF-16 and UTF-32 too, which the safetensors library refuses.
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        _bad(file, f"has a header that is not valid JSON ({error})")
    if not isinstance(header, dict):
        _bad(file, "has a header that is not an object")
    if not _is_metadata(header.pop("__metadata__", None)):
        _bad(file, "has __metadata__ that is not a mapping of texts to texts")
    base = LENGTH_BYTES + len(raw)
    entries = [_entry(name, value, base, file) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_gapless(entries, base, data_bytes, file)
    return {entry.name: entry for entry in entries}


def _whole(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number")
    return int(text)


def _is_metadata(value: Any) -> bool:
    """Whether the library takes it: nothing, or texts by name."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        isinstance(text, str) and _is_text(name, text) for name, text in value.items()
    )


def _is_text(*values: str) -> bool:
    """Whether texts can be written as UTF-8; JSON's escapes can hold halves of a character."""
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name appears twice")
    return keys


def _entry(name: str, value: Any, base: int, file: str) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if (
            not rest and _counts(start, end) and _is_text(name)
        ):
            pass
        case _:
            _bad(file, f"describes tensor {ascii(name)[1:-1]:.120} wrongly")
    if dtype not in DTYPE_BITS:
        _bad(file, f"gives tensor {name} the unknown dtype {dtype!r}")
    if not _counts(*shape) or len(shape) > 8:
        _bad(file, f"gives tensor {name} an impossible shape")
    nbytes = tensor_bytes(dtype, shape)
    if end - start != nbytes:
        _bad(file, f"gives tensor {name} {end - start:,} bytes; {dtype} {shape} needs {nbytes:,}")
    return TensorEntry(name, file, dtype, tuple(shape), base + start, nbytes)


def _counts(*values: Any) -> bool:
    """Whether all are whole numbers that a file's sizes could be; true and false are none."""
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_gapless(entries: list[TensorEntry], base: int, data_bytes: int, file: str) -> None:
    place = base
    for entry in entries:
        if entry.start != place:
            what = "overlaps another tensor" if entry.start < place else "leaves a gap before it"
            _bad(file, f"places tensor {entry.name} so that it {what}")
        place += entry.nbytes
    if place - base != data_bytes:
        kind = "truncated" if place - base > data_bytes else "longer than its header says"
        _bad(
            file,
            f"is {kind}: its header describes {place - base:,} bytes of tensors, the file holds {data_bytes:,}",
        )


def _bad(file: str, what: str) -> NoReturn:
    raise SourceError(f"{file} {what}", hint="the file is damaged or incomplete: download it again")
