"""The look of a progress bar; apart from the console because rich's part for it is slow to import."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from l4pack.units import human_bytes


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{human_bytes(task.speed)}/s" if task.speed else "", style="cyan")


class _Amount(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{human_bytes(task.completed)} of {human_bytes(task.total or 0)}")


def progress_of_bytes(console: Console) -> Progress:
    """A display of tasks counted in bytes, with throughput and time left, which goes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Amount(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
