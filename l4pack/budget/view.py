"""A budget for people: the verdict first, then the lines, a bar of the device, and what would fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from l4pack.budget.devices import Device
from l4pack.budget.lines import Line, LineGroup
from l4pack.budget.load import Load, degrees, longest_context
from l4pack.budget.matrix import Row
from l4pack.budget.measure import Measured
from l4pack.budget.model import Budget, Verdict
from l4pack.budget.runtimes import load_runtime
from l4pack.budget.serve import on_lines
from l4pack.budget.solve import LargestLoads, Suggestion
from l4pack.units import GIB, human_gib

BAR_WIDTH = 72  # columns, of a terminal that has them
STYLES = {
    LineGroup.WEIGHTS: "blue",
    LineGroup.KV_CACHE: "green",
    LineGroup.ACTIVATIONS: "magenta",
    LineGroup.RUNTIME: "cyan",
}
GLYPHS = {LineGroup.WEIGHTS: "█", LineGroup.KV_CACHE: "▓", LineGroup.ACTIVATIONS: "▒", LineGroup.RUNTIME: "░"}
TITLES = {
    LineGroup.WEIGHTS: "weights",
    LineGroup.KV_CACHE: "KV cache",
    LineGroup.ACTIVATIONS: "activations",
    LineGroup.RUNTIME: "runtime",
}
VERDICTS = {
    Verdict.FITS: ("bold green", "fits"),
    Verdict.UNSURE: ("bold yellow", "may not fit"),
    Verdict.TOO_LARGE: ("bold red", "does not fit"),
}
KV_NAMES = {"fp8": "FP8", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
SPARE, MAYBE = "·", "?"


def budget_view(
    found: Budget,
    limits: LargestLoads,
    changes: Sequence[Suggestion] = (),
    promised_by: str | None = None,
    serve: str | None = None,
) -> list[RenderableType]:
    """All that `l4pack budget` shows; `serve` is the command that would."""
    promise = [f"what recipe {promised_by} promises, but for what was said"] if promised_by else []
    asked = [Text(line, "dim") for line in (question(found), *promise, *_idle(found))]
    shown: list[RenderableType] = [
        verdict_line(found, limits),
        *asked,
        "",
        _table(found),
        "",
        _Bar(found),
        *_outside(found),
        "",
    ]
    shown.append(_limits(found, limits))
    if serve:
        shown += ["", "[bold]serve it[/bold]", Text(f"  {on_lines(serve)}", no_wrap=True)]
    if changes:
        shown += ["", "[bold]nearest changes that fit[/bold]", _changes(changes)]
    elif not found.fits:
        shown += ["", "no single change tried makes it fit"]
    return shown


def verdict_line(found: Budget, limits: LargestLoads) -> Text:
    """One line: the verdict, by how much, and when the context is what is too much, the one that fits."""
    style, word = VERDICTS[found.verdict]
    line = Text.assemble((f"{word} on {found.host.name}", style), f": {spare(found)}")
    if not found.fits and limits.max_context:
        line.append(f"; {limits.max_context:,} tokens would fit")
    return line


def question(found: Budget) -> str:
    """What was asked, in one phrase."""
    subject, setting = found.subject, found.setting
    recipe = f" {subject.recipe}" if subject.recipe else ""
    return (
        f"{subject.name}{recipe}, {_sequences(setting.sequences)} of {setting.context:,} tokens, "
        f"{KV_NAMES[setting.kv_dtype]} KV, {found.runtime.title}"
    )


def _idle(found: Budget) -> list[str]:
    """That not all GPUs are used, and which numbers could be."""
    setting, count = found.setting, found.host.count
    if not setting.idle_gpus:
        return []
    possible = ", ".join(map(str, degrees(found.subject.config.text, count)))
    return [f"one copy takes {setting.gpus} of the {count} GPUs, the rest idle; tp may be {possible}"]


def _sequences(count: int) -> str:
    return "1 sequence" if count == 1 else f"{count:,} sequences"


def spare(found: Budget) -> str:
    """Headroom per GPU as a range."""
    low, high = found.headroom_bytes, found.headroom_high_bytes
    match found.verdict:
        case Verdict.FITS:
            return f"{_span(low, high)} to spare"
        case Verdict.UNSURE:
            return f"{human_gib(-low)} short to {human_gib(high)} to spare"
        case Verdict.TOO_LARGE:
            return f"{_span(-high, -low)} short"


def _span(low: int, high: int) -> str:
    first, last = f"{low / GIB:.2f}", f"{high / GIB:.2f}"
    return f"{first} GiB" if first == last else f"{first} to {last} GiB"


def _table(found: Budget) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    parts = " x ".join(
        f"{name} {size}" for name, size in (("tp", found.setting.tp), ("pp", found.setting.pp)) if size > 1
    )
    table.add_column(f"Per GPU{f' ({parts})' if parts else ''}", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("How", overflow="fold")
    for line in found.lines:
        table.add_row(Text(line.name, STYLES[line.group]), _amount(line), Text(line.formula, "dim"))
    table.add_section()
    low, high = sum(line.low for line in found.lines), sum(line.high for line in found.lines)
    table.add_row("sum", Text(_range(low, high), "bold"), "")
    stage = found.tightest
    share = f"{100 * found.setting.utilization:.3g} % of {human_gib(found.host.device.memory_bytes)}"
    table.add_row("the runtime plans with", f"{stage.planned_bytes / GIB:.2f}", Text(share, "dim"))
    return table


def _outside(found: Budget) -> list[RenderableType]:
    """What the machine's own memory must hold beside the GPU."""
    if not found.outside:
        return []
    low, high = (sum(getattr(line, end) for line in found.outside) for end in ("low", "high"))
    parts = ", ".join(f"{line.name} {_amount(line)}" for line in found.outside)
    return ["", Text.assemble("in the machine's own memory: ", (f"{_range(low, high)} GiB", "bold"), f" ({parts})")]


def _amount(line: Line) -> str:
    return _range(line.low, line.high)


def _range(low: int, high: int) -> str:
    first, last = f"{low / GIB:.2f}", f"{high / GIB:.2f}"
    return first if first == last else f"{first} – {last}"


@dataclass(frozen=True)
class _Bar:
    """A device drawn as wide as the terminal is, or less."""

    found: Budget

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console
        yield from _bar(self.found, min(BAR_WIDTH, options.max_width))


def _bar(found: Budget, width: int) -> list[Text]:
    """The device as a bar: each group at its low end, what the ranges may add, what is left, and where the limit is."""
    device, planned = found.host.device.memory_bytes, found.tightest.planned_bytes
    low, high = sum(line.low for line in found.lines), sum(line.high for line in found.lines)
    scale = max(device, high) / width
    bar, used = Text(), 0
    for group in LineGroup:
        before = round(used / scale)
        used += sum(line.low for line in found.lines if line.group is group)
        bar.append(GLYPHS[group] * (round(used / scale) - before), STYLES[group])
    bar.append(MAYBE * (round(high / scale) - round(low / scale)), "yellow")
    bar.append(SPARE * (width - len(bar)), "dim")
    limit = min(round(planned / scale), width - 1)
    legend = Text()
    for group in LineGroup:
        legend.append(f"{GLYPHS[group]} {TITLES[group]}  ", STYLES[group])
    legend.append(f"{MAYBE} not known  ", "yellow").append(f"{SPARE} free", "dim")
    told = human_gib(planned)
    mark = f"{' ' * limit}^ {told}" if limit + len(told) + 2 <= width else f"{told} ^".rjust(limit + 1)
    return [bar, Text(mark, "dim"), legend]


def _limits(found: Budget, limits: LargestLoads) -> Table:
    longest = longest_context(found.subject.config.text)
    whole = " (the model's whole context)" if limits.max_context == longest else ""
    rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    context = _counts(limits.max_context, limits.max_context_high, "tokens")
    rows.add_row(f"largest context for {_sequences(found.setting.sequences)}", context.append(whole))
    sequences = _counts(limits.max_sequences, limits.max_sequences_high, "")
    rows.add_row(f"most sequences of {found.setting.context:,} tokens", sequences)
    return rows


def _counts(low: int, high: int, unit: str) -> Text:
    text = Text.assemble((f"{low:,} {unit}".strip(), "bold"))
    return text if low == high else text.append(f", {high:,} at best", "dim")


def _changes(changes: Sequence[Suggestion]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for change in changes:
        table.add_row(
            f"  {escape(change.what)}",
            Text(change.option, "bold"),
            Text(f"{human_gib(change.headroom_bytes)} to spare, {change.max_context:,} tokens", "dim"),
        )
    return table


def matrix_view(rows: Sequence[Row], load: Load, runtime: str) -> list[RenderableType]:
    """Largest contexts, a table a model: one row a host, one column a recipe."""
    sequences = "one sequence" if load.sequences == 1 else f"{load.sequences} sequences"
    kv = "FP8" if load.kv_dtype == "fp8" else "BF16"
    head = Text.assemble(("largest context", "bold"), f" of {sequences}, {kv} KV, {load_runtime(runtime).title}")
    models = [list(group) for _, group in groupby(rows, key=lambda row: row.model)]
    return [head, *(part for group in models for part in ("", _contexts(group))), *_legend(rows)]


def _contexts(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(f"{escape(rows[0].model)}\nin all", no_wrap=True)
    for row in rows:
        table.add_column(f"{row.recipe or 'BF16'}\n{row.weight_bytes / 1e9:.1f} GB", justify="right", no_wrap=True)
    for number, cell in enumerate(rows[0].cells):
        found = [(row.cells[number], row.longest) for row in rows]
        table.add_row(cell.host, *(_cell(one.max_context, one.max_context_high, longest) for one, longest in found))
    return table


def _legend(rows: Sequence[Row]) -> list[RenderableType]:
    """What the marks in the table mean, those that are there."""
    cells = [(cell, row) for row in rows for cell in row.cells]
    marks = {
        "K: 1,024 tokens": any(0 < cell.max_context < row.longest for cell, row in cells),
        "all: the model's whole context": any(cell.max_context == row.longest for cell, row in cells),
        "a: at best, may not fit": any(cell.max_context == 0 < cell.max_context_high for cell, _ in cells),
        "-: weights don't fit": any(cell.max_context_high == 0 for cell, _ in cells),
    }
    return ["", Text("; ".join(mark for mark, there in marks.items() if there), "dim")]


def _cell(low: int, high: int, longest: int) -> Text:
    if low == longest:
        return Text("all", "bold green")
    if low:
        return Text(_short(low), "green")
    return Text(f"{_short(high)}a", "yellow") if high else Text("-", "dim")


def _short(tokens: int) -> str:
    return f"{tokens / 1024**2:.1f}M" if tokens >= 1024**2 else f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def measured_view(lines: Sequence[Measured], device: str) -> Table:
    """Predicted against measured, line by line."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(f"On {escape(device)}")
    for heading in ("Predicted, GiB", "Measured, GiB"):
        table.add_column(heading, justify="right")
    for line in lines:
        measured = Text("not on one GPU alone", "dim") if line.measured is None else Text(f"{line.measured / GIB:.2f}")
        table.add_row(line.name, _range(line.low, line.high), measured)
    return table


def devices_view(devices: Iterable[Device]) -> Table:
    """All devices by memory."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("Name", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("Device, and where its figure is from", overflow="fold")
    for device in sorted(devices, key=lambda device: (device.memory_bytes, device.name)):
        what = Text.assemble(device.title, "\n", (device.source, "dim"))
        table.add_row(device.name, f"{device.memory_bytes / GIB:.2f}", what)
    return table
