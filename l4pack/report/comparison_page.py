"""One page about several artifacts of one original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from l4pack import __version__
from l4pack.report.figure import Figure, with_error
from l4pack.report.page import environment
from l4pack.report.plot import Note, Point, dots, frame, whiskers
from l4pack.report.scale import logarithmic, widened
from l4pack.units import human_bytes, unit_of

_HEIGHT = 240  # pixels


def render_comparison(record: Mapping[str, Any], day: str) -> str:
    """The page of what `compare --json` prints, made on `day` (2026-11-26)."""
    artifacts = record["artifacts"]
    return (
        environment()
        .get_template("comparison.html")
        .render(
            record=record,
            day=day,
            version=__version__,
            closest=min(artifacts, key=lambda one: one["kl_mean"]),
            smallest=min(artifacts, key=lambda one: one["weight_bytes"]),
            tasks=[(name, one["artifact"], task) for one in artifacts for name, task in one["tasks"].items()],
            drawn=_sizes_and_losses(record),
        )
    )


def _sizes_and_losses(record: Mapping[str, Any]) -> Figure:
    """Bytes of weights against KL on a logarithmic axis, where nothing lost has no place."""
    artifacts = record["artifacts"]
    unit, size = unit_of(max(one["weight_bytes"] for one in artifacts))
    found = {
        one["artifact"]: Point(one["weight_bytes"] / size, one["kl_mean"], one["kl_standard_error"])
        for one in artifacts
        if one["kl_mean"] > 0
    }
    points = list(found.values())
    x = widened([point.x for point in points] or [0.0, 1.0])
    y = logarithmic(end for point in points for end in point.ends)
    marks = whiskers(points, x, y, "measured") + dots(points, x, y, "dot measured")
    notes = [Note(x.share(point.x), y.share(point.y), name, "strong", needed=True) for name, point in found.items()]
    rows = [
        (one["artifact"], human_bytes(one["weight_bytes"]), with_error(one["kl_mean"], one["kl_standard_error"]))
        for one in artifacts
    ]
    titles = (f"weights, {unit}", "mean KL, nats")
    return Figure(
        Markup(frame(marks, x, y, titles, notes, _HEIGHT, points)), ("Artifact", ">Weights", ">KL, nats"), rows
    )
