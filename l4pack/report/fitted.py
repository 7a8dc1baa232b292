"""What bytes buy, drawn: the frontier of a fit, one scheme for all, what was chosen, and what that measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from l4pack.report.figure import Figure, number, with_error
from l4pack.report.plot import Note, Point, dots, frame, joined, rings, whiskers
from l4pack.report.scale import logarithmic, spanned
from l4pack.units import human_bytes, unit_of


def frontier_figure(fitted: Mapping[str, Any], accuracy: Mapping[str, Any] | None) -> Figure:
    """Bytes of weights against KL on a logarithmic axis, where nothing lost has no place."""
    unit, size = unit_of(fitted["weight_bytes"])
    frontier, uniform = _points(fitted["frontier"], size), _points(fitted["uniform"], size)
    chosen = _points([{**fitted, "bytes": fitted["weight_bytes"]}], size)
    measured = _measured(accuracy, size)
    every = [*frontier, *uniform, *chosen, *measured]
    x = spanned(min(point.x for point in every), max(point.x for point in every)) if every else spanned(0, 1)
    y = logarithmic(
        [end for point in every for end in (point.y, point.y + (point.error or 0), point.y - (point.error or 0))]
    )
    marks = joined(frontier, x, y, "predicted", stepped=True) + dots(frontier, x, y, "speck predicted")
    marks += rings(uniform, x, y, "predicted") + dots(chosen, x, y, "big predicted")
    marks += whiskers(measured, x, y, "measured") + dots(measured, x, y, "big measured")
    names = [one["name"] for one in fitted["uniform"] if one["predicted_kl"] > 0]
    named = [(point, "measured", "strong") for point in measured] + [(point, "chosen", "strong") for point in chosen]
    named += [(point, name, "") for point, name in zip(uniform, names, strict=True)]
    notes = [Note(x.share(point.x), y.share(point.y), name, style) for point, name, style in named]
    notes += [
        Note(x.share(point.x), y.share(point.y), "frontier", sides=("above-right",))
        for point in frontier[2 * len(frontier) // 3 :: max(1, len(frontier))]
    ]
    rows = [
        *_rows(fitted["frontier"], "frontier"), *_rows(fitted["uniform"], "one scheme for all"),
        ("chosen, predicted", human_bytes(fitted["weight_bytes"]), number(fitted["predicted_kl"])),
    ]  # fmt: skip
    if measured and accuracy:
        kl = with_error(accuracy["kl_mean"], accuracy["kl_standard_error"])
        rows.append(("chosen, measured", human_bytes(accuracy["artifact_weight_bytes"]), kl))
    return Figure(
        Markup(frame(marks, x, y, (f"weights, {unit}", "mean KL, nats"), notes, 240, [*uniform, *chosen, *measured])),
        ("What", ">Weights", ">KL, nats"),
        rows,
    )


def _measured(accuracy: Mapping[str, Any] | None, size: int) -> list[Point]:
    if accuracy is None or accuracy.get("kl_mean", 0.0) <= 0:
        return []
    return [Point(accuracy["artifact_weight_bytes"] / size, accuracy["kl_mean"], accuracy["kl_standard_error"])]


def _points(sizes: Sequence[Mapping[str, Any]], size: int) -> list[Point]:
    return [Point(one["bytes"] / size, one["predicted_kl"]) for one in sizes if one["predicted_kl"] > 0]


def _rows(sizes: Sequence[Mapping[str, Any]], words: str) -> list[tuple[str, str, str]]:
    return [
        (f"{words}: {one['name']}" if one["name"] else words, human_bytes(one["bytes"]), number(one["predicted_kl"]))
        for one in sizes
    ]


def choices(fitted: Mapping[str, Any]) -> list[tuple[str, str, int, int, float]]:
    """Role, option, number of layers, bytes and predicted KL of what was chosen."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for one in fitted["choice"]:
        found[one["role"].replace("_", " "), one["option"]].append(one)
    return [
        (role, option, len(members), sum(one["bytes"] for one in members), sum(one["kl"] for one in members))
        for (role, option), members in sorted(found.items())
    ]
