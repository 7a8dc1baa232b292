"""What bytes buy, drawn: the frontier of a fit, one scheme for all, what was chosen, and what that measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from l4pack.report.figure import Figure, number, with_error
from l4pack.report.plot import Note, Point, dots, frame, joined, whiskers
from l4pack.report.scale import Scale, logarithmic, widened
from l4pack.units import human_bytes, unit_of

_BESIDE_LINE = ("above-right", "above", "right")


@dataclass(frozen=True)
class _Shown:
    """Every point that has a place, in units of bytes and nats: what lost nothing has none on a logarithmic axis."""

    frontier: list[Point]
    uniform: dict[str, Point]
    chosen: list[Point]
    measured: list[Point]

    @property
    def single(self) -> list[Point]:
        """All that is not on the line."""
        return [*self.measured, *self.chosen, *self.uniform.values()]


def frontier_figure(fitted: Mapping[str, Any], accuracy: Mapping[str, Any] | None) -> Figure:
    """Bytes of weights against KL: the frontier, one scheme for all, what was chosen, and what was measured of it."""
    unit, size = unit_of(fitted["weight_bytes"])
    measured = accuracy if accuracy and accuracy.get("kl_mean", 0.0) > 0 else None
    chosen = {"name": "chosen", "bytes": fitted["weight_bytes"], "predicted_kl": fitted["predicted_kl"]}
    shown = _Shown(
        list(_points(fitted["frontier"], size).values()),
        _points(fitted["uniform"], size),
        list(_points([chosen], size).values()),
        [Point(measured["artifact_weight_bytes"] / size, measured["kl_mean"], measured["kl_standard_error"])]
        if measured
        else [],
    )
    every = [*shown.frontier, *shown.single] or [Point(0.0, 1.0)]
    x, y = widened([point.x for point in every]), logarithmic(end for point in every for end in point.ends)
    titles = (f"weights, {unit}", "mean KL, nats")
    drawing = frame(_marks(shown, x, y), x, y, titles, _notes(shown, x, y), 240, shown.single)
    return Figure(Markup(drawing), ("What", ">Weights", ">KL, nats"), _table(fitted, chosen, measured))


def _marks(shown: _Shown, x: Scale, y: Scale) -> str:
    line = joined(shown.frontier, x, y, "predicted", stepped=True) + dots(shown.frontier, x, y, "speck predicted")
    rings = dots(shown.chosen, x, y, "big predicted") + dots(shown.chosen, x, y, "big hole")
    rings += dots(shown.uniform.values(), x, y, "dot predicted") + dots(shown.uniform.values(), x, y, "hole")
    return line + rings + whiskers(shown.measured, x, y, "measured") + dots(shown.measured, x, y, "dot measured")


def _notes(shown: _Shown, x: Scale, y: Scale) -> list[Note]:
    here = [(point, "measured") for point in shown.measured] + [(point, "chosen") for point in shown.chosen]
    notes = [Note(x.share(one.x), y.share(one.y), name, "strong", needed=True) for one, name in here]
    notes += [Note(x.share(one.x), y.share(one.y), name) for name, one in shown.uniform.items()]
    for one in shown.frontier[4 * len(shown.frontier) // 5 :][:1]:
        notes.append(Note(x.share(one.x), y.share(one.y), "frontier", sides=_BESIDE_LINE))
    return notes


def _points(sizes: Sequence[Mapping[str, Any]], size: int) -> dict[str, Point]:
    """By name, or by number where there is none."""
    shown = [one for one in sizes if one["predicted_kl"] > 0]
    return {
        one["name"] or str(place): Point(one["bytes"] / size, one["predicted_kl"]) for place, one in enumerate(shown)
    }


def _table(
    fitted: Mapping[str, Any], chosen: Mapping[str, Any], measured: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    named = [*(("frontier", one) for one in fitted["frontier"]), *(("one scheme for all", one) for one in fitted["uniform"]),
             ("predicted", chosen)]  # fmt: skip
    rows = [
        (f"{words}: {one['name']}" if one["name"] else words, human_bytes(one["bytes"]), number(one["predicted_kl"]))
        for words, one in named
    ]
    if measured is not None:
        kl = with_error(measured["kl_mean"], measured["kl_standard_error"])
        rows.append(("measured: chosen", human_bytes(measured["artifact_weight_bytes"]), kl))
    return rows


def choices(fitted: Mapping[str, Any]) -> list[tuple[str, str, int, int, float]]:
    """Role, option, number of layers, bytes and predicted KL of what was chosen."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for one in fitted["choice"]:
        found[one["role"].replace("_", " "), one["option"]].append(one)
    return [
        (role, option, len(members), sum(one["bytes"] for one in members), sum(one["kl"] for one in members))
        for (role, option), members in sorted(found.items())
    ]
