"""Tables of people's files: CSV by its header, Parquet and Arrow through pyarrow."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from l4pack.errors import UsageError
from l4pack.text.layouts import KNOWN_KEYS, MAX_ROW, has_layout

_DELIMITERS = (",", "\t", ";", "|")
_ROWS_AT_ONCE = 64


def header_delimiter(line: str) -> str | None:
    """What separates the names of a first line that names the columns of an understood layout, two or more."""
    for delimiter in _DELIMITERS:
        names = _names(line, delimiter)
        if len(names) > 1 and has_layout(names):
            return delimiter
    return None


def _names(line: str, delimiter: str) -> list[str]:
    try:
        found = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []
    return [name.strip() for name in found]


def table_rows(stream: TextIO, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV or TSV file by its header's names, with where they lie. Raises UsageError."""
    csv.field_size_limit(MAX_ROW)
    first = stream.readline(MAX_ROW)
    if not first:
        return
    usual = "\t" if ".tsv" in path.name.lower() else ","
    delimiter = header_delimiter(first) or usual
    names = _names(first, delimiter)
    _check_columns(names, path)
    reader = csv.reader(_lines(stream, path), delimiter=delimiter, strict=True)
    line = 2
    try:
        for values in reader:
            where, line = f"{path}, line {line}", reader.line_num + 2
            if values and len(values) != len(names):
                raise UsageError(
                    f"{where}: {len(values)} fields, the header has {len(names)}", hint="quote fields that hold commas"
                )
            if values:
                yield where, {name: value for name, value in zip(names, values, strict=True) if name in KNOWN_KEYS}
    except csv.Error as error:
        raise UsageError(f"{path}, line {line}: not CSV ({error})", hint="mend the quotes, or write JSONL") from error


def _check_columns(names: list[str], path: Path) -> None:
    known = [name for name in names if name in KNOWN_KEYS]
    if len(set(known)) < len(known):
        raise UsageError(f"{path} has two columns of one name", hint="rename one of them")
    if not has_layout(names):
        shown = ", ".join(name[:40] for name in names[:12])
        raise UsageError(
            f"{path}: the columns are {shown}; none of them is understood as text",
            hint="name them text, or instruction and output",
        )


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    while line := stream.readline(MAX_ROW):
        if len(line) == MAX_ROW:
            raise UsageError(f"{path} has a line of more than {MAX_ROW:,} characters", hint="is it a table at all?")
        yield line


def column_rows(path: Path, *, parquet: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet or Arrow file, as `datasets` saves them, with where they lie. Raises UsageError."""
    arrow = _pyarrow(path)
    number = 0
    try:
        for batch in _parquet(path) if parquet else _arrow(path, arrow):
            for value in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", value
    except (arrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).split("\n") or [""])[0][:120]
        raise UsageError(f"{path} can't be read after row {number} ({reason})", hint="download it again") from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"{path} needs pyarrow, which comes with datasets, to be read",
            hint="pip install 'l4pack[eval]', or write JSONL",
        ) from error
    return pyarrow


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        columns = _columns(file.schema_arrow.names, path)
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns)


def _arrow(path: Path, arrow: Any) -> Iterator[Any]:
    with arrow.memory_map(str(path)) as source:
        whole = source.read(6) == b"ARROW1"
        source.seek(0)
        with (arrow.ipc.open_file if whole else arrow.ipc.open_stream)(source) as reader:
            columns = _columns(reader.schema.names, path)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else iter(reader)
            for batch in batches:
                for first in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    yield batch.slice(first, _ROWS_AT_ONCE).select(columns)


def _columns(names: list[str], path: Path) -> list[str]:
    _check_columns(names, path)
    return [name for name in names if name in KNOWN_KEYS]
