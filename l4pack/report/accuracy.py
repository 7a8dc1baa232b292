"""What an evaluation found, drawn: single tokens, positions, layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from l4pack.model.tensors import Role
from l4pack.report.figure import Figure, number, with_error
from l4pack.report.plot import Note, Point, bars, dots, frame, joined, upright, whiskers
from l4pack.report.scale import Scale, counted, linear, logarithmic, spanned

BLOCKS = {
    "residual": "residual stream", Role.ATTENTION.value: "attention", Role.SHARED_EXPERT.value: "shared expert",
    Role.DENSE_MLP.value: "dense MLP", Role.ROUTED_EXPERT.value: "routed experts",
}  # fmt: skip
MEASURED = "measured"
_PANEL = 130  # pixels
_HEADROOM = 1.08  # for the note over the highest point
_MANY = 24  # points whose dots are small
_OVER = ("above", "above-left", "above-right", "left", "right")


def accuracy_figures(accuracy: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of an evaluation by name; those without numbers are left out."""
    layers = accuracy["layers"]
    found: dict[str, Figure | None] = {
        "layers": _layers(layers),
        "routing": _routing(layers, accuracy["text"]["tokens"]),
    }
    if "kl_histogram" in accuracy:
        found |= {"tokens": _tokens(accuracy), "positions": _positions(accuracy["by_position"])}
    return {name: figure for name, figure in found.items() if figure is not None}


def _tokens(accuracy: Mapping[str, Any]) -> Figure:
    """How many tokens have which KL, on a logarithmic axis; the first bar has what lies below the first edge."""
    edges, counts = accuracy["kl_histogram"]["edges"], accuracy["kl_histogram"]["counts"]
    ends = [edges[0] / 10**0.25, *edges, edges[-1] * 10**0.25] if edges else [0.1, 1.0]
    used = [place for place, count in enumerate(counts) if count] or [0]
    shown = slice(used[0], used[-1] + 1)
    x = _decades(ends[used[0]], ends[used[-1] + 1])
    y = linear([float(count) for count in counts])
    marks = {"median": accuracy["kl_median"], "mean": accuracy["kl_mean"], "p99": accuracy["kl_p99"]}
    notes = [
        Note(
            x.share(value),
            0.94 - 0.1 * place,
            f"{name} {value:.2g}",
            sides=("right", "left") if place else ("left", "right"),
        )
        for place, (name, value) in enumerate(marks.items())
        if value > 0
    ]
    lines = "".join(upright(value, x) for value in marks.values() if value > 0)
    drawn = bars(ends[used[0] : used[-1] + 2], counts[shown], x, y) + lines
    rows = [(_between(edges, place), f"{counts[place]:,}") for place in range(used[0], used[-1] + 1)]
    return Figure(
        Markup(frame(drawn, x, y, ("KL of a token, nats", "tokens"), notes)), ("KL of a token, nats", ">Tokens"), rows
    )


def _decades(low: float, high: float) -> Scale:
    """A logarithmic axis with just these ends."""
    inner = logarithmic([low, high])
    return Scale(low, high, [tick for tick in inner.ticks if low <= tick <= high], logarithmic=True)


def _between(edges: Sequence[float], place: int) -> str:
    if place == 0:
        return f"below {edges[0]:.2g}" if edges else "any"
    return f"{edges[place - 1]:.2g} to {edges[place]:.2g}" if place < len(edges) else f"from {edges[-1]:.2g}"


def _positions(places: Sequence[Mapping[str, Any]]) -> Figure:
    points = [
        Point((place["from"] + place["to"] + 1) / 2, place["kl_mean"], place.get("kl_standard_error"))
        for place in places
    ]
    x = spanned(0, max((place["to"] + 1 for place in places), default=1))
    drawn, y = _with_errors(points, x)
    columns = ("Positions", ">Tokens", ">Mean KL, nats", ">Same likeliest token")
    rows = [
        (
            f"{place['from']:,} to {place['to']:,}", f"{place['tokens']:,}",
            with_error(place["kl_mean"], place.get("kl_standard_error")),
            with_error(place["top1_agreement"], place.get("top1_agreement_standard_error")),
        )
        for place in places
    ]  # fmt: skip
    return Figure(Markup(frame(drawn, x, y, ("position in the sequence", "mean KL, nats"))), columns, rows)


def _with_errors(points: Sequence[Point], x: Scale, y: Scale | None = None) -> tuple[str, Scale]:
    """A line of points with their error bars, and the y axis that holds them."""
    y = y or linear(point.ends[1] for point in points)
    dot = f"{'speck' if len(points) > _MANY else 'dot'} {MEASURED}"
    return joined(points, x, y, MEASURED) + whiskers(points, x, y, MEASURED) + dots(points, x, y, dot), y


def _layers(layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    """One small drawing for each kind of block, all with the same axes."""
    found = {key: _errors(layers, key) for key in BLOCKS}
    found = {key: points for key, points in found.items() if points}
    if not found:
        return None
    numbers = [layer["layer"] for layer in layers]
    x = counted(min(numbers), max(numbers))
    y = linear(_HEADROOM * point.ends[1] for points in found.values() for point in points)
    panels = "".join(f"<div><h3>{BLOCKS[key]}</h3>{_panel(points, x, y)}</div>" for key, points in found.items())
    style = "panels two" if len(found) in (2, 4) else "panels"
    rows = [(str(layer["layer"]), *(_cell(layer, key) for key in found)) for layer in layers]
    columns = ("Layer", *(f">{key.replace('_', ' ')}" for key in found))
    return Figure(Markup(f'<div class="{style}">{panels}</div>'), columns, rows)


def _panel(points: Sequence[Point], x: Scale, y: Scale) -> str:
    worst = max(points, key=lambda point: point.y)
    place = x.share(worst.x), y.share(worst.ends[1])
    notes = [Note(*place, f"layer {worst.x:.0f}: {worst.y:.3g}", sides=_OVER)] if worst.y else []
    return frame(_with_errors(points, x, y)[0], x, y, ("layer", "relative error"), notes, _PANEL)


def _errors(layers: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    return [
        Point(layer["layer"], layer[f"{key}_error"], layer.get(f"{key}_standard_error"))
        for layer in layers
        if layer.get(f"{key}_error") is not None
    ]


def _cell(layer: Mapping[str, Any], key: str) -> str:
    value = layer.get(f"{key}_error")
    return "" if value is None else with_error(value, layer.get(f"{key}_standard_error"))


def _routing(layers: Sequence[Mapping[str, Any]], tokens: int) -> Figure | None:
    """Share of tokens that go to another expert, with the standard error of a share of independent tokens."""
    points = [
        Point(layer["layer"], moved, math.sqrt(moved * (1 - moved) / tokens) if tokens else None)
        for layer in layers
        if layer.get("routing_agreement") is not None
        for moved in [1 - layer["routing_agreement"]]
    ]
    if not points:
        return None
    x = counted(layers[0]["layer"], layers[-1]["layer"])
    drawn, y = _with_errors(points, x)
    rows = [(f"{point.x:.0f}", with_error(point.y, point.error)) for point in points]
    titles = ("layer", "share of tokens that take another expert")
    return Figure(Markup(frame(drawn, x, y, titles)), ("Layer", ">Share of tokens"), rows)


def measures(accuracy: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of what was measured: its name, the original's value and the artifact's, with standard errors."""

    def both(key: str) -> str:
        return with_error(accuracy[key], accuracy[f"{key}_standard_error"])

    rows = [("perplexity", both("perplexity_reference") if "kl_mean" in accuracy else "", both("perplexity_artifact"))]
    if "kl_mean" in accuracy:
        rows += [
            ("artifact's perplexity over the original's", "", both("perplexity_ratio")),
            ("mean KL(original || artifact), nats a token", "", with_error(accuracy["kl_mean"], accuracy["kl_standard_error"])),
            ("KL, 99th percentile", "", number(accuracy["kl_p99"])),
            ("KL, 999th of 1000", "", number(accuracy["kl_p999"])),
            ("KL, largest", "", number(accuracy["kl_max"])),
            ("same likeliest token, share", "", both("top1_agreement")),
        ]  # fmt: skip
    for name, task in accuracy["tasks"].items():
        before, after = (task.get(key) for key in ("accuracy_reference", "accuracy"))
        pair = [
            "not measured" if one is None else with_error(one["value"], one["standard_error"])
            for one in (before, after)
        ]
        rows.append((f"{name}, {task['questions']:,} questions: {task.get('metric', 'accuracy')}", pair[0], pair[1]))
    return rows
