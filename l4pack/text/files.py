"""Which files a text is, what each of them holds by its content, and their decoded characters.

A file is read in pieces: its size decides nothing but time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Any, TextIO, cast

from l4pack.errors import UsageError
from l4pack.text.choice import DEMO_CALIBRATION, DEMO_TEXT, NAMED_SETS
from l4pack.text.tables import header_delimiter

HEAD_BYTES = 1 << 16
_BUFFER = 1 << 20

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv")
COLUMN_SUFFIXES = (".parquet", ".arrow")
PLAIN_SUFFIXES = (".txt", ".md", ".text")
_READ_IN_FOLDERS = (*PLAIN_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES, *COLUMN_SUFFIXES)
_ARROW_FOLDER_NOTES = ("state.json", "dataset_info.json", "dataset_dict.json")  # what `save_to_disk` writes beside rows
_OTHER_DATA = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".xml": "XML"}
UNDERSTOOD = "plain text, JSON, JSONL, CSV, Parquet or Arrow"

_GZIP = b"\x1f\x8b"
_BOMS = (
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
_MAGIC = (
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "decompress it: zstd -d FILE"),
    (b"\xfd7zXZ\x00", "is compressed with xz", "decompress it: xz -d FILE"),
    (b"BZh", "is compressed with bzip2", "decompress it: bzip2 -d FILE"),
    (b"PK\x03\x04", "is a ZIP archive or an office document", "unpack it, or save it as text"),
    (b"%PDF", "is a PDF", "save it as text: pdftotext FILE"),
    (b"SQLite format 3", "is a SQLite database", "export its rows as JSONL"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "run: git lfs pull"),
)
_MARKUP = re.compile(r"\s*<(!doctype|!--|\?xml|html|head|body|svg|rss|feed|mediawiki)\b", re.IGNORECASE)
# An object or a list that begins with a quote, a bracket or a number: the start of data, not of a sentence.
_DATA_LIKE = re.compile(r"""\s*(\{\s*["'}]|\[\s*(["'{\]]|\[\s*["'{\[\d-]))""")


class FileKind(Enum):
    """What a file holds."""

    PLAIN = "plain text"
    JSON = "JSON"
    TABLE = "a table"
    PARQUET = "Parquet"
    ARROW = "Arrow"


@dataclass(frozen=True)
class Listing:
    """The files of a text in order, and what else lies in its folder."""

    files: tuple[Path, ...]
    left: tuple[str, ...] = ()


@dataclass
class Meter:
    """SHA-256 of all bytes read, in order."""

    digest: Any = field(default_factory=hashlib.sha256)


class _Metered(io.RawIOBase):
    """A file whose bytes are digested as they are read."""

    def __init__(self, path: Path, meter: Meter) -> None:
        self._file, self._meter = path.open("rb", buffering=0), meter

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`."""
        count = self._file.readinto(buffer) or 0
        self._meter.digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def list_files(source: str) -> Listing:
    """The files of `source`: a file, a folder, or a text that ships. Raises UsageError."""
    path = Path(source)
    with readable(path):
        if not source or not path.exists():
            return Listing((_shipped(source),))
        if path.is_file():
            return Listing((path,))
        if not path.is_dir():
            raise UsageError(f"{source} is neither a file nor a folder", hint="save it as a file first")
        return _folder(path)


def _shipped(source: str) -> Path:
    from l4pack import demo

    if source not in (DEMO_TEXT, DEMO_CALIBRATION):
        raise UsageError(
            f"there is no text {source}" if source else "the text has no name",
            hint=f"give a file, a folder, or one of: {', '.join((DEMO_TEXT, *NAMED_SETS))}",
        )
    return demo.heldout_path() if source == DEMO_TEXT else demo.calibration_path()


def _folder(folder: Path) -> Listing:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    saved = any(path.suffix == ".arrow" for path in found)

    def taken(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        note = saved and path.name in _ARROW_FOLDER_NOTES
        return not hidden and not note and _suffix(path) in _READ_IN_FOLDERS

    files = tuple(path for path in found if taken(path))
    if not files:
        raise UsageError(f"{folder} holds no {', '.join(_READ_IN_FOLDERS)} files", hint="give a folder with text")
    return Listing(files, tuple(str(path.relative_to(folder)) for path in found if not taken(path)))


def _suffix(path: Path) -> str:
    """The ending in small letters, without `.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read, as a UsageError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not {error.encoding.upper()} text (byte 0x{error.object[error.start]:02x})",
            hint=f"convert it first, for example: iconv -f latin1 -t utf-8 {path.name}",
        ) from error
    except UnicodeError as error:
        raise UsageError(f"{path} is not whole text ({error})", hint="convert it to UTF-8 first") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is damaged: it does not unpack", hint="download it again, or unpack it") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", hint="check the file's name") from error


def kind_of(path: Path) -> FileKind:
    """What a file holds, by its content first. Raises UsageError for what is neither text nor rows."""
    with readable(path):
        raw = _head(path)
        for magic, kind in (
            (b"PAR1", FileKind.PARQUET),
            (b"ARROW1", FileKind.ARROW),
            (b"\xff\xff\xff\xff", FileKind.ARROW),
        ):
            if raw.startswith(magic):
                return kind
        for magic, what, hint in _MAGIC:
            if raw.startswith(magic):
                raise UsageError(f"{path} {what}", hint=hint.replace("FILE", path.name))
        encoding = _encoding(raw)
        if b"\0" in raw and encoding.startswith("utf-8"):
            raise UsageError(
                f"{path} is binary, or UTF-16 without a byte order mark", hint=f"what is read: {UNDERSTOOD}"
            )
        return _text_kind(path, _decoded(raw, encoding))


def _decoded(raw: bytes, encoding: str) -> str:
    import codecs

    return codecs.getincrementaldecoder(encoding)().decode(raw)


def _text_kind(path: Path, head: str) -> FileKind:
    suffix = _suffix(path)
    if _MARKUP.match(head) or suffix in _OTHER_DATA:
        raise UsageError(
            f"{path} is {_OTHER_DATA.get(suffix, 'HTML or XML')}, not text", hint=f"what is read: {UNDERSTOOD}"
        )
    if suffix in COLUMN_SUFFIXES:
        raise UsageError(f"{path} is no {suffix[1:]} file", hint="download it again")
    if suffix in JSON_SUFFIXES or _DATA_LIKE.match(head):
        return FileKind.JSON
    if suffix in TABLE_SUFFIXES or header_delimiter(head.partition("\n")[0]):
        return FileKind.TABLE
    _refuse_hidden_data(path, head)
    return FileKind.PLAIN


def _refuse_hidden_data(path: Path, head: str) -> None:
    """Rows after some first line that is none."""
    lines = [line.strip() for line in head.split("\n") if line.strip()]
    objects = [line for line in lines if line.startswith(('{"', "{'")) and line.endswith("}")]
    if len(objects) >= 2 and 2 * len(objects) >= len(lines):
        raise UsageError(f"{path} holds objects, but begins with something else", hint="remove what is no JSON")


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        raw = stream.read(HEAD_BYTES)
        if not raw.startswith(_GZIP):
            return raw
        stream.seek(0)
        with gzip.GzipFile(fileobj=stream) as unpacked:
            return unpacked.read(HEAD_BYTES)


def _encoding(raw: bytes) -> str:
    return next((encoding for bom, encoding in _BOMS if raw.startswith(bom)), "utf-8")


@contextmanager
def opened(path: Path, meter: Meter) -> Iterator[TextIO]:
    """A file's characters, line ends as they are. Errors are told as `readable` does."""
    with readable(path):
        encoding = _encoding(_head(path))
        with io.BufferedReader(_Metered(path, meter), _BUFFER) as binary:
            packed = binary.peek(2).startswith(_GZIP)
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=binary)) if packed else binary
            with io.TextIOWrapper(stream, encoding, newline="") as text:
                yield text


def digest_file(path: Path, meter: Meter) -> None:
    """Count a file that something else reads."""
    with readable(path), io.BufferedReader(_Metered(path, meter), _BUFFER) as stream:
        while stream.read(_BUFFER):
            pass
