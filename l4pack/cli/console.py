"""The one place that talks to the terminal: results on stdout, talk and progress on stderr, JSON on request.

Talk appears only when stderr is a terminal. Progress is a bar there; elsewhere, in a log of CI or of a batch job, it is a
line for each step of a long job, a layer mostly.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from l4pack.errors import UsageError
from l4pack.units import human_bytes, human_seconds
from l4pack.work.progress import Shown

if TYPE_CHECKING:
    from rich.progress import Progress

PIPED_WIDTH = 120
NEXT = "next: "  # begins a line with a command to go on with
_GAP, _READABLE = 2, 14  # columns between those of a table, and what words of one are wrapped to at least
LINE_SHARE, LINE_SECONDS = 0.05, 20.0  # a job without steps says this often how far it is
LINE_LIMIT = 1000  # characters of an error: names and values in it come from files


class _Terminal(Console):
    """Rich's console, but a reader of a pipe who leaves, as `head` does, is no failure of the command."""

    def on_broken_pipe(self) -> None:
        reader_left()


def reader_left() -> None:
    """Let the rest of stdout go nowhere: the command goes on, and ends with its own exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return _Terminal(file=stream, width=None if stream.isatty() else PIPED_WIDTH, highlight=False, soft_wrap=False)


def show(*items: RenderableType) -> None:
    """Print a result for people on stdout."""
    _print(_console(stderr=False), items)


def _print(console: Console, items: Sequence[RenderableType]) -> None:
    """Print all; what is there to be copied is left to the terminal to wrap, or a copy would be broken."""
    for item in items:
        whole = item.startswith(NEXT) if isinstance(item, str) else isinstance(item, Text) and bool(item.no_wrap)
        console.print(item, soft_wrap=whole)


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, and nothing else."""
    manner.answered = True
    show_text(json.dumps(value, indent=2) + "\n")


def show_text(text: str) -> None:
    """Print a text on stdout just as it is."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_left()


@dataclass
class Manner:
    """How much is said beside results: `quiet` only errors, `verbose` every part of a step; all of it to `log` too."""

    quiet: bool = False
    verbose: bool = False
    log: Path | None = None
    answered: bool = False  # with a JSON object, which is alone on stdout


manner = Manner()


def set_quiet(wanted: bool) -> None:
    """Say errors only."""
    manner.quiet = wanted


def set_verbose(wanted: bool) -> None:
    """Say every part of a step."""
    manner.verbose = wanted


def set_log(path: Path | None) -> None:
    """Say it in a file too. Raises UsageError for one that can't be written."""
    if path is not None:
        try:
            path.open("a").close()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", hint="name a log file that can be written") from error
    manner.log = path


def talk(*items: RenderableType) -> None:
    """Print on stderr, only when a person watches."""
    if sys.stderr.isatty() and not manner.quiet:
        _print(_console(stderr=True), items)


def error(message: str, hint: str = "") -> None:
    """One line that says what and where, and a hint that says what to do."""
    _write(f"error: {_one_line(message)}")
    if hint:
        _write(f"hint: {_one_line(hint)}")


def tell(message: str) -> None:
    """One line on stderr of what is about to be done, whoever watches."""
    _write(_one_line(message), spoken=not manner.quiet)


def warning(message: str) -> None:
    """One line on stderr, whoever watches."""
    _write(f"warning: {_one_line(message)}", spoken=not manner.quiet)


def _write(line: str, *, spoken: bool = True) -> None:
    """A line on stderr, and in the log with the time."""
    if spoken:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    if manner.log is not None:
        with manner.log.open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}\n")


def _one_line(text: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text[: 2 * LINE_LIMIT])
    line = " ".join(printable.split())
    return line if len(line) <= LINE_LIMIT and len(text) <= 2 * LINE_LIMIT else f"{line[: LINE_LIMIT - 1]}…"


def table(*headings: str, title: str | None = None) -> Table:
    """A plain table; headings that start with '>' are right-aligned."""
    result = _Fitting(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0)
    )
    for heading in headings:
        right = heading.startswith(">")
        result.add_column(heading.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return result


class _Fitting(Table):
    """A table whose words and numbers stay whole: where they don't fit beside each other, each row is lines of its own.

    Rich alone would cut what does not fit, and take the width from words that need it.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [[_text(console, cell) for cell in (column.header, *column.cells)] for column in self.columns]
        most = [max(cell.cell_len for cell in texts) for texts in cells]
        least = [
            max(map(_of_numbers if column.justify == "right" else _of_words, texts[1:]), default=0)
            for column, texts in zip(self.columns, cells, strict=True)
        ]
        least = [max(width, _longest_word(texts[0])) for width, texts in zip(least, cells, strict=True)]
        spare = options.max_width - sum(width + _GAP for width in least)
        if spare < 0:
            yield from self._apart(cells)
            return
        wanted = sum(most) - sum(least)
        for column, low, high in zip(self.columns, least, most, strict=True):
            column.width = low + min(high - low, spare * (high - low) // max(wanted, 1))
        yield from super().__rich_console__(console, options)

    def _apart(self, cells: Sequence[Sequence[Text]]) -> Iterator[RenderableType]:
        """Each row as its first cell, and the others below it with their headings."""
        first, *others = cells
        for number in range(1, len(first)):
            grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, _GAP, 0, 0))
            grid.add_column(no_wrap=True, style="dim")
            grid.add_column(overflow="fold")
            for texts in others:
                if texts[number].plain:
                    grid.add_row(texts[0], texts[number])
            yield Text.assemble(first[number], style="bold")
            yield Padding(grid, (0, 0, 0, _GAP))


def _text(console: Console, cell: RenderableType) -> Text:
    return console.render_str(cell) if isinstance(cell, str) else cast("Text", cell)


def _longest_word(cell: Text) -> int:
    return max(map(cell_len, cell.plain.split()), default=0)


def _of_words(cell: Text) -> int:
    """Columns that words take at least: those of the longest, and enough to be read."""
    return min(cell.cell_len, max(_longest_word(cell), _READABLE))


def _of_numbers(cell: Text) -> int:
    """Columns that a number takes with its unit or its error."""
    return cell.cell_len


def plain(text: object) -> str:
    """Text that comes from outside, with rich's markup and control characters taken out of force."""
    return escape(_one_line(str(text)))


class Bar:
    """The progress of a job counted in bytes: a bar where a person watches, else a line for each step."""

    def __init__(self, progress: Progress | None, total: int, label: str) -> None:
        self._progress, self._name, self._total, self._done = progress, label, total, 0
        self._task = progress.add_task(label, total=total) if progress else None
        self._started = self._said_at = time.monotonic()
        self._said = 0

    @property
    def shown(self) -> Shown:
        """Itself, as jobs know it."""
        return Shown(self.advance, self.label, self.step)

    def advance(self, nbytes: int) -> None:
        """Count `nbytes` more as done."""
        self._done += nbytes
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, nbytes)
        far = self._done - self._said >= LINE_SHARE * self._total
        if far and time.monotonic() - self._said_at >= LINE_SECONDS:
            self._say("")

    def label(self, text: str) -> None:
        """Change what the bar says it is doing."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)
        if manner.verbose:
            self._say(text)

    def step(self, text: str) -> None:
        """A step is done, of which a job has some dozens: a line of its own where there is no bar, and in the log."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)
        self._say(text)

    def _say(self, text: str) -> None:
        now = time.monotonic()
        rate = self._done / max(now - self._started, 1e-9)
        left = f", {human_seconds((self._total - self._done) / rate)} left" if 0 < self._done < self._total else ""
        share = f"{100 * self._done / self._total:.0f} %, " if self._total else ""
        line = f"{self._name}: {text}{', ' if text else ''}{share}{human_bytes(rate)}/s{left}"
        _write(line, spoken=self._progress is None and not manner.quiet)
        self._said_at, self._said = now, self._done


@contextmanager
def progress(label: str, total: int) -> Iterator[Bar]:
    """A bar with throughput and time left on stderr when a person watches, lines of the same elsewhere."""
    if not sys.stderr.isatty() or manner.quiet:
        yield Bar(None, total, label)
        return
    from l4pack.cli.bar import progress_of_bytes

    with progress_of_bytes(_console(stderr=True)) as bars:
        yield Bar(bars, total, label)


def without_types(command: Any) -> None:
    """Let a command's help show no type beside flags, those that Typer and Click add among them: they take no value."""
    listed = command.get_params

    def bare(context: Any) -> list[Any]:
        params: list[Any] = listed(context)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params

    command.get_params = bare
