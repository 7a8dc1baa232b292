"""The frontier as a picture, for papers and slides: PNG or SVG, the same bytes for the same fit."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from l4pack.errors import UsageError
from l4pack.fit.record import FitRecord, SizedArtifact
from l4pack.units import GIB, MIB

SUFFIXES = (".png", ".svg")
_SIZE = (7.2, 4.4)  # inches
_SALT = "l4pack"


def check_chart(path: Path) -> None:
    """Raise UsageError for a suffix that is neither PNG nor SVG."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a chart is {' or '.join(SUFFIXES)}", hint="for example --chart frontier.svg")


def draw_chart(record: FitRecord, path: Path) -> bytes:
    """Bytes against predicted KL: the frontier, uniform recipes, and what was chosen. `path` says the kind of file."""
    from matplotlib import rc_context  # takes a second to load
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix.lower().removeprefix(".")
    unit, name = (GIB, "GiB") if record.weight_bytes >= GIB else (MIB, "MiB")
    stream = BytesIO()
    with rc_context({"svg.hashsalt": _SALT, "svg.fonttype": "none"}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(*_points(record.frontier, unit), drawstyle="steps-post", color="#2a78d6", label="frontier", zorder=2)
        uniform = [size for size in record.uniform if size.predicted_kl > 0]
        axes.scatter(*_points(uniform, unit), color="#8b8a84", label="one scheme for all", zorder=3)
        for size in uniform:
            axes.annotate(size.name, (size.bytes / unit, size.predicted_kl), xytext=(5, 3), textcoords="offset points", fontsize=8)  # fmt: skip
        axes.scatter([record.weight_bytes / unit], [record.predicted_kl], color="#eb6834", marker="D", label="chosen", zorder=4)  # fmt: skip
        if any(size.predicted_kl > 0 for size in record.frontier):
            axes.set_yscale("log")
        axes.set_xlabel(f"weights, {name}")
        axes.set_ylabel("predicted KL, nats")
        axes.set_title(f"{Path(record.model).name or record.model}: what bytes buy", fontsize=10, parse_math=False)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return stream.getvalue()


def _points(sizes: list[SizedArtifact], unit: int) -> tuple[list[float], list[float]]:
    """Places on a logarithmic axis, where nothing lost has none."""
    shown = [size for size in sizes if size.predicted_kl > 0]
    return [size.bytes / unit for size in shown], [size.predicted_kl for size in shown]
