"""What the rows of files say, one passage after another: a row's text, or the pieces of a long plain text."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from l4pack.errors import UsageError
from l4pack.text.files import FileKind, Meter, digest_file, kind_of, opened
from l4pack.text.images import ImageReader, Seen, inside
from l4pack.text.json_rows import json_rows
from l4pack.text.layouts import IMAGE_TOKENS, Chat, Left, read_row
from l4pack.text.tables import column_rows, table_rows
from l4pack.text.tokenizer import Template

PIECE = 1 << 18  # characters of a text tokenized at once


@dataclass(frozen=True, slots=True)
class Passage:
    """Text of row number `row`, or why the row is left; passages of one row follow each other. A row with images is one,
    and has its tokens already."""

    row: int
    text: str = ""
    left: Left | None = None
    seen: Seen | None = None


def rows_of(path: Path, meter: Meter) -> Iterator[tuple[str, object]]:
    """The rows of a file that is no plain text, with where they lie. Raises UsageError."""
    kind = kind_of(path)
    if kind in (FileKind.PARQUET, FileKind.ARROW):
        digest_file(path, meter)
        yield from column_rows(path, parquet=kind is FileKind.PARQUET)
        return
    with opened(path, meter) as stream:
        if kind is FileKind.PLAIN:
            raise UsageError(f"{path} holds words, not rows", hint="write JSONL, one object a line")
        yield from (json_rows if kind is FileKind.JSON else table_rows)(stream, path)


def passages(
    files: Sequence[Path], template: Template, meter: Meter, reader: ImageReader | None = None
) -> Iterator[Passage]:
    """All passages of all files, rows numbered from 0; without a `reader`, rows with images are left. Raises UsageError."""
    row = -1
    for path in files:
        if kind_of(path) is FileKind.PLAIN:
            row += 1
            with opened(path, meter) as stream:
                yield from _plain(stream, path, row)
            continue
        for where, value in rows_of(path, meter):
            row += 1
            said = read_row(value, where)
            if isinstance(said, Chat) and said.images:
                yield _with_images(row, said, where, path.parent, template, meter, reader)
                continue
            text = template.render(said, where) if isinstance(said, Chat) else said
            yield from [Passage(row, left=text)] if isinstance(text, Left) else _passages(row, text, where)


def _with_images(
    row: int, chat: Chat, where: str, folder: Path, template: Template, meter: Meter, reader: ImageReader | None
) -> Passage:
    """A conversation with images in files of `folder`, whose digests are counted as the rows' own bytes are."""
    if reader is None or any(map(has_images, chat.texts)):
        return Passage(row, left=Left.IMAGES)
    files = [inside(folder, named, where) for named in chat.images]
    seen = reader.see(check_characters(template.render(chat, where), where), files, where)
    for file in seen.pictures.files:
        meter.digest.update(bytes.fromhex(file.sha256))
    return Passage(row, seen=seen)


def _passages(row: int, text: str, where: str) -> Iterator[Passage]:
    whole = _passage(row, text, where)
    if whole.left or len(text) <= PIECE:
        yield whole
    else:
        yield from (Passage(row, piece) for piece in pieces(io.StringIO(text, newline="")))


def _plain(stream: TextIO, path: Path, row: int) -> Iterator[Passage]:
    empty = True
    for text in pieces(stream):
        passage = _passage(row, text, str(path))
        empty = empty and not text.strip()
        yield passage
        if passage.left:
            return
    if empty:
        yield Passage(row, left=Left.EMPTY)


def _passage(row: int, text: str, where: str) -> Passage:
    return Passage(row, left=Left.IMAGES) if has_images(text) else Passage(row, check_characters(text, where))


def has_images(text: str) -> bool:
    """Whether a text holds tokens that stand for pixels."""
    return any(token in text for token in IMAGE_TOKENS)


def check_characters(text: str, where: str) -> str:
    """The text as it is. Raises UsageError for characters that no tokenizer takes."""
    if "\0" in text:
        raise UsageError(f"{where}: holds a NUL character", hint="remove it; is the file text?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: holds half a surrogate pair, \\u{ord(text[error.start]):04x}", hint="remove it, or the row"
        ) from error
    return text


def pieces(stream: TextIO) -> Iterator[str]:
    """A text in pieces of about `PIECE` characters.

    A piece ends after a word, before the end of a line (or a space, where no line ends): no tokenizer of Llama's kind
    joins those, so the tokens are those of the whole text.
    """
    held = ""
    while more := stream.read(PIECE):
        held += more
        if len(held) > PIECE:
            cut = _last_boundary(held)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _last_boundary(text: str) -> int:
    for end in ("\r", "\n", " "):
        at = len(text)
        while (at := text.rfind(end, 1, at)) > 0:
            if text[at - 1].isalpha():
                return at
    return len(text)
