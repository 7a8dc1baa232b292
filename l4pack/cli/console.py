"""The one place that talks to the terminal: results on stdout, talk and progress on stderr, JSON on request.

Talk and progress bars appear only when stderr is a terminal, so a pipe or a CI log holds results and errors, and of a
long job a line now and then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from l4pack.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

PIPED_WIDTH = 120
LOG_SECONDS = 300.0  # between two lines of a log: a job takes minutes or days
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
    console = _console(stderr=False)
    for item in items:
        console.print(item)


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, and nothing else."""
    show_text(json.dumps(value, indent=2) + "\n")


def show_text(text: str) -> None:
    """Print a text on stdout just as it is."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_left()


def talk(*items: RenderableType) -> None:
    """Print on stderr, only when a person watches."""
    if sys.stderr.isatty():
        console = _console(stderr=True)
        for item in items:
            console.print(item)


def error(message: str, hint: str = "") -> None:
    """One line that says what and where, and a hint that says what to do."""
    sys.stderr.write(f"error: {_one_line(message)}\n")
    if hint:
        sys.stderr.write(f"hint: {_one_line(hint)}\n")


def warning(message: str) -> None:
    """One line on stderr, whoever watches."""
    sys.stderr.write(f"warning: {_one_line(message)}\n")


def _one_line(text: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text[: 2 * LINE_LIMIT])
    line = " ".join(printable.split())
    return line if len(line) <= LINE_LIMIT and len(text) <= 2 * LINE_LIMIT else f"{line[: LINE_LIMIT - 1]}…"


def table(*headings: str, title: str | None = None) -> Table:
    """A plain table; headings that start with '>' are right-aligned."""
    result = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0)
    )
    for heading in headings:
        right = heading.startswith(">")
        result.add_column(heading.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return result


def plain(text: object) -> str:
    """Text that comes from outside, with rich's markup and control characters taken out of force."""
    return escape(_one_line(str(text)))


class Log:
    """Progress counted in bytes as a line now and then, for who reads a log."""

    def __init__(self, total: int, label: str) -> None:
        self._total, self._label, self._done = total, label, 0
        self._started = self._written = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Count `nbytes` more as done, and say so when it is time."""
        self._done += nbytes
        now = time.monotonic()
        if now - self._written >= LOG_SECONDS:
            self._written = now
            amount = f"{human_bytes(self._done)} of {human_bytes(self._total)}"
            took = human_seconds(now - self._started)
            sys.stderr.write(f"{_one_line(self._label)}: {amount}, {self._done / max(1, self._total):.0%}, {took}\n")
            sys.stderr.flush()

    def label(self, text: str) -> None:
        """Change what the lines say is done."""
        self._label = text


class Bar:
    """A progress bar counted in bytes."""

    def __init__(self, progress: Progress, total: int, label: str) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total)

    def advance(self, nbytes: int) -> None:
        """Count `nbytes` more as done."""
        self._progress.advance(self._task, nbytes)

    def label(self, text: str) -> None:
        """Change what the bar says it is doing."""
        self._progress.update(self._task, description=text)


@contextmanager
def progress(label: str, total: int) -> Iterator[Bar | Log]:
    """A bar with throughput and time left on stderr when a person watches, and lines for a log else."""
    if not sys.stderr.isatty():
        yield Log(total, label)
        return
    from l4pack.cli.bar import progress_of_bytes

    with progress_of_bytes(_console(stderr=True)) as bars:
        yield Bar(bars, total, label)
