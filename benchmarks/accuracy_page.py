"""Tables and drawing of the study, from its record alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from accuracy_record import BASELINE, Cell, Record, over_seeds, ratio

BEGIN, END = "<!-- tables: benchmarks/accuracy.py writes them -->", "<!-- end of tables -->"
COLOURS = {"llm-compressor": "#eb6834", "l4pack": "#2a78d6", "llama.cpp": "#2e9e5b", "auto-round": "#9a5bd0"}
HEAD = (
    "| tool | method | MB | draws | mean KL, 1e-3 nats | ± text | ± draw | 99th percentile, 1e-3 | ± text | ± draw | "
    "same token | KL, of llm-compressor's |"
)


@dataclass(frozen=True)
class Row:
    """One method on one model: its cells, one a calibration seed, and its KL over that of llm-compressor's GPTQ."""

    cells: Sequence[Cell]
    ratio: tuple[float, float] | None

    @property
    def tool(self) -> str:
        """Who made it."""
        return str(self.cells[0]["tool"])

    @property
    def method(self) -> str:
        """How."""
        return str(self.cells[0]["method"])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; of several seeds, the most."""
        return max(cell["bytes"] for cell in self.cells)

    def mean(self, key: str) -> float:
        """Over seeds."""
        return over_seeds([cell[key] for cell in self.cells])[0]


def rows(record: Record, model: str) -> list[Row]:
    """All methods of a model, by size."""
    cells = sorted((cell for cell in record.cells if cell["model"] == model), key=_method)
    found = [Row(list(group), None) for _, group in groupby(cells, key=_method)]
    theirs = next((row for row in found if (row.tool, row.method) == BASELINE), None)
    found = [Row(row.cells, _over(row, theirs)) for row in found]
    return sorted(found, key=lambda row: (row.nbytes, row.mean("kl_mean")))


def _method(cell: Cell) -> tuple[str, str]:
    return cell["tool"], cell["method"]


def _over(ours: Row, theirs: Row | None) -> tuple[float, float] | None:
    """Ratio of mean KL over the seeds that both have, with the text's standard error."""
    if theirs is None or ours.cells is theirs.cells:
        return None
    other = {cell["seed"]: cell["kl_by_sequence"] for cell in theirs.cells}
    both = [(cell["kl_by_sequence"], other[cell["seed"]]) for cell in ours.cells if cell["seed"] in other]
    if not both:
        return None
    a, b = ([sum(values) for values in zip(*side, strict=True)] for side in zip(*both, strict=True))
    return ratio(a, b)


def tables(record: Record) -> str:
    """A table a model and one of the models themselves, as Markdown."""
    results = [line for model in record.models for line in _table(record, model)]
    return "\n".join([*results, *_models(record)])


def _models(record: Record) -> Iterator[str]:
    """How the originals predict the held-out text, and how far their activations stick out, in the worst layer."""
    yield "### The originals"
    yield ""
    yield "| model | bits per byte | in | largest over median | largest over its channel's rms | loudest channel over median |"
    yield "|---|---|---|---|---|---|"
    for name, about in record.models.items():
        for place, found in about["activations"].items():
            numbers = (found[key] for key in ("max_over_median", "max_over_channel_rms", "channel_rms_over_median"))
            yield f"| {name} | {about['bits_per_byte']:.2f} | {place} | {' | '.join(map(str, numbers))} |"
    yield ""


def _table(record: Record, model: str) -> Iterator[str]:
    about = record.models[model]
    yield f"### {model}: {_shape(about)}"
    yield ""
    yield HEAD
    yield "|" + "---|" * HEAD.count(" | ") + "---|"
    yield from map(_line, rows(record, model))
    yield ""


def _shape(about: dict[str, Any]) -> str:
    every = "" if about["moe_every"] == 1 else f" in every {about['moe_every']}nd layer"
    return f"{about['layers']} layers, {about['experts']} experts{every}, {about['bytes'] / 1e6:.1f} MB in BF16"


def _line(row: Row) -> str:
    cells = [
        row.tool, f"`{row.method}`", f"{row.nbytes / 1e6:.2f}", str(len(row.cells)),
        *_numbers(row, "kl_mean", "kl_standard_error"), *_numbers(row, "kl_p99", "kl_p99_standard_error"),
        f"{100 * row.mean('top1_agreement'):.2f} %",
        "" if row.ratio is None else f"{row.ratio[0]:.2f} ± {row.ratio[1]:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _numbers(row: Row, key: str, error: str) -> tuple[str, str, str]:
    """Mean over seeds, its standard error over text (one seed's), and one seed's standard deviation over seeds."""
    mean, spread = over_seeds([cell[key] for cell in row.cells])
    return f"{1e3 * mean:.3g}", f"{1e3 * row.mean(error):.2g}", "" if spread is None else f"{1e3 * spread:.2g}"


def write_tables(record: Record, page: Path) -> None:
    """Put the tables between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(record)}\n{END}{after}", encoding="utf-8")


def draw(record: Record, out: Path) -> None:
    """Bytes against mean KL, a panel a model, with l4pack's frontier."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    models = list(record.models)
    with rc_context({"svg.hashsalt": "l4pack", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.6 * len(models), 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            found = rows(record, model)
            own = frontier([(row.nbytes, row.mean("kl_mean")) for row in found if row.tool == "l4pack"])
            axes.plot(
                [size / 1e6 for size, _ in own], [1e3 * kl for _, kl in own], "--", color=COLOURS["l4pack"], alpha=0.5
            )
            for tool, colour in COLOURS.items():
                _points(axes, [row for row in found if row.tool == tool], tool, colour)
            axes.set(xlabel="tensors, MB", ylabel="mean KL to the original, 1e-3 nats", yscale="log", title=model)
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.margins(x=0.3)
            axes.grid(visible=True, alpha=0.3)
            axes.legend(fontsize=8)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None})


def _points(axes: Any, found: Sequence[Row], tool: str, colour: str) -> None:
    """A point a method; bars are twice the larger of the text's error and the spread over seeds."""
    if not found:
        return
    sizes, kl = [row.nbytes / 1e6 for row in found], [1e3 * row.mean("kl_mean") for row in found]
    axes.errorbar(sizes, kl, yerr=[2e3 * _error(row) for row in found], fmt="o", color=colour, markersize=4, label=tool)
    for row, size, value in zip(found, sizes, kl, strict=True):
        axes.annotate(row.method, (size, value), xytext=(4, 3), textcoords="offset points", fontsize=6)


def _error(row: Row) -> float:
    spread = over_seeds([cell["kl_mean"] for cell in row.cells])[1]
    return max(row.mean("kl_standard_error"), spread or 0.0)


def frontier(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points (bytes, KL) that no smaller one beats, by size."""
    found: list[tuple[int, float]] = []
    for size, kl in sorted(points):
        if not found or kl < found[-1][1]:
            found.append((size, kl))
    return found
