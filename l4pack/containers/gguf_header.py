"""What a GGUF file says of itself, read with nothing but the standard library and believed only where it can be true.

Anybody may have written the file: counts, lengths, offsets and names are held against the file's size and against limits
before anything is made of them. Layout: ggml `docs/gguf.md` and `src/gguf.cpp`, versions 2 and 3.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from l4pack.errors import SourceError
from l4pack.units import human_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SPLIT_COUNT, ALIGNMENT, ARCHITECTURE_KEY = "split.count", "general.alignment", "general.architecture"
MAX_HEADER, MAX_STRINGS, MAX_TEXT = 256 * 1024**2, 2_000_000, 16 * 1024**2  # the released models': 12 MB, 700,000
MAX_KEYS, MAX_TENSORS, MAX_DIMENSIONS, MAX_PARTS = 4096, 65536, 4, 1000
MAX_NAME, MAX_KEY, MAX_ALIGNMENT, MAX_FEW = 127, 65535, 1 << 20, 4096
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# ggml's types: name, weights of a block, bytes of a block. `ggml.h`, `ggml-common.h`.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_HINT = "download the file again, or export again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor: its type, `shape` with the outermost dimension first, and where its bytes lie in which file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A file's keys and tensors. Of an array only short ones of numbers are kept, of others how many values there are."""

    path: Path
    nbytes: int
    values: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """Which model it is, in llama.cpp's words."""
        return str(self.values.get(ARCHITECTURE_KEY, ""))

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Many:
    """An array that is not kept."""

    count: int


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that is, or claims to be, GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC or path.suffix.lower() == ".gguf"


def read_gguf(path: Path) -> GgufFile:
    """The header of one file. Raises SourceError saying what in it can't be true."""
    try:
        with path.open("rb") as stream:
            return _Header(path, stream, os.fstat(stream.fileno()).st_size).read()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}", hint="give a GGUF file that can be read") from error


def parts_of(path: Path) -> list[Path]:
    """The files of the model that a file is of, itself or all its parts by their names. Raises SourceError."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= count <= MAX_PARTS:
        raise SourceError(f"{path.name}: a model of {count:,} files", hint=_HINT)
    files = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    lost = next((file for file in files if not file.is_file()), None)
    if lost is not None:
        raise SourceError(f"{lost.name} is missing: {path.name} is one of {count} files", hint=_HINT)
    return files


def read_model(path: Path) -> GgufFile:
    """The keys of the first file and the tensors of all parts. Raises SourceError."""
    files = [read_gguf(part) for part in parts_of(path)]
    first, count = files[0], files[0].values.get(SPLIT_COUNT, 1)
    if count not in (len(files), 0):
        raise SourceError(f"{path.name}: it says it has {count} parts, not {len(files)}", hint=_HINT)
    tensors = tuple(tensor for file in files for tensor in file.tensors)
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors):
        raise SourceError(f"{path.name}: a tensor is in two parts", hint=_HINT)
    return GgufFile(path, sum(file.nbytes for file in files), first.values, tensors)


class _Header:
    """Reads one header, front to back."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path, self._stream, self._size = path, stream, size
        self._at = self._strings = 0

    def read(self) -> GgufFile:
        if self._take(len(MAGIC)) != MAGIC:
            self._bad("it is not a GGUF file")
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            self._bad("its numbers are big-endian" if swapped else f"version {version:,} of GGUF is not one of 2 and 3")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            self._bad(f"it claims {tensors:,} tensors and {keys:,} keys")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text(MAX_KEY, "a key")
            if key in values:
                self._bad(f"key {key!r} stands there twice")
            values[key] = self._value(self._number("I"), key)
        infos = [self._tensor() for _ in range(tensors)]
        alignment = values.get(ALIGNMENT, 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._bad(f"{ALIGNMENT} is {alignment!r}, not a power of two")
        return GgufFile(self._path, self._size, values, tuple(self._placed(infos, alignment)))

    def _placed(self, infos: list[tuple[str, int, tuple[int, ...], int]], alignment: int) -> list[GgufTensor]:
        """The tensors where llama.cpp looks for them: one after another, each from a multiple of the alignment on."""
        base = place = -(-self._at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in infos:
            dtype, block, width = TYPES[kind]
            elements = 1
            for size in shape:
                elements *= size
            if shape[-1] % block:
                self._bad(f"{name} has rows of {shape[-1]:,}, which {dtype} can't have: its blocks hold {block}")
            nbytes = elements // block * width
            if base + offset != place:
                self._bad(f"{name} begins at byte {base + offset:,} of the file, not at {place:,}")
            if place + nbytes > self._size:
                self._bad(f"{name} ends at byte {place + nbytes:,}, the file has {self._size:,}: it is cut short")
            if name in found:
                self._bad(f"tensor {name!r} stands there twice")
            found[name] = GgufTensor(name, dtype, shape, self._path.name, place, nbytes)
            place = -(-(place + nbytes) // alignment) * alignment
        return list(found.values())

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._text(MAX_NAME, "a tensor's name")
        count = self._number("I")
        if not 1 <= count <= MAX_DIMENSIONS:
            self._bad(f"{name} has {count:,} dimensions")
        shape = tuple(self._number("Q") for _ in range(count))[::-1]
        elements = 1
        for size in shape:
            elements *= size
        if not 0 < elements < 1 << 62:
            self._bad(f"{name} has the shape {shape}")
        kind = self._number("I")
        if kind not in TYPES:
            self._bad(f"{name} is of type {kind:,}, which ggml does not have")
        return name, kind, shape, self._number("Q")

    def _value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text(MAX_TEXT, key)
        if kind != _ARRAY:
            self._bad(f"{key} is of type {kind:,}, which GGUF does not have")
        inner, count = self._number("I"), self._number("Q")
        if inner == _TEXT:
            return self._skip_texts(count, key)
        if inner not in _NUMBERS:
            self._bad(f"{key} is an array of type {inner:,}")
        if count > MAX_FEW:
            self._skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"), key)
            return Many(count)
        return [self._number(_NUMBERS[inner]) for _ in range(count)]

    def _skip_texts(self, count: int, key: str) -> Many:
        self._strings += min(count, MAX_STRINGS + 1)
        if self._strings > MAX_STRINGS or count * 8 > self._size - self._at:
            self._bad(f"{key} claims {count:,} texts")
        for _ in range(count):
            length = int.from_bytes(self._take(8), "little")
            self._room(length)
            self._stream.seek(length, os.SEEK_CUR)
        return Many(count)

    def _text(self, most: int, what: str) -> str:
        length = self._number("Q")
        if length > most:
            self._bad(f"{what} claims {length:,} bytes")
        try:
            text = self._take(length).decode()
        except UnicodeDecodeError:
            self._bad(f"{what} is not UTF-8")
        if not text.isprintable() and most <= MAX_KEY:
            self._bad(f"{what} holds characters that can't be shown")
        return text

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        self._room(count)
        raw = self._stream.read(count)
        if len(raw) != count:
            self._bad("it ends within its header")
        return raw

    def _skip(self, count: int, key: str) -> None:
        if count > self._size - self._at:
            self._bad(f"{key} claims {count:,} bytes")
        self._room(count)
        self._stream.seek(count, os.SEEK_CUR)

    def _room(self, count: int) -> None:
        self._at += count
        if self._at > self._size:
            self._bad("it ends within its header")
        if self._at > MAX_HEADER:
            self._bad(f"its header is over {human_bytes(MAX_HEADER)}")

    def _bad(self, what: str) -> NoReturn:
        raise SourceError(f"{self._path.name}: {what}", hint=_HINT)
