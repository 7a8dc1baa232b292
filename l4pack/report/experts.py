"""Routed experts of every layer, drawn: their errors, their tokens, and one against the other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from l4pack.report.figure import Figure
from l4pack.report.heat import Colours, colour_key, heat_map
from l4pack.report.plot import Note, Point, dots, frame, joined
from l4pack.report.scale import linear, logarithmic, percentile

FEW_TOKENS = 32
_NAMED = 3
_FAR = 4.0  # times the median: the axis is logarithmic then
_MANY = 200  # experts whose dots are small

Grid = list[list[float | None]]


@dataclass(frozen=True)
class Drawn:
    """One expert that got tokens and has an error."""

    layer: int
    expert: int
    tokens: int
    error: float


def expert_figures(layers: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The figures of the layers that have routed experts by name; those without numbers are left out."""
    routed = [layer for layer in layers if layer.get("experts")]
    if not routed:
        return {}
    rows = [layer["layer"] for layer in routed]
    tokens: Grid = [[expert["tokens"] or None for expert in layer["experts"]] for layer in routed]
    errors: Grid = [[expert.get("error") for expert in layer["experts"]] for layer in routed]
    few = {
        (row, column)
        for row, line in enumerate(tokens)
        for column, count in enumerate(line)
        if count is not None and count < FEW_TOKENS
    }
    found = {}
    if any(value is not None for line in errors for value in line):
        found["expert_errors"] = _map(rows, errors, few, "error", "relative error", "{:.3g}".format)
        found["error_by_tokens"] = _scatter(_drawn(routed))
    if any(value is not None for line in tokens for value in line):
        found["expert_tokens"] = _map(rows, tokens, set(), "tokens", "tokens", "{:.0f}".format)
    return found


def _map(
    rows: Sequence[int], values: Grid, few: set[tuple[int, int]], style: str, unit: str, text: Callable[[float], str]
) -> Figure:
    colours = Colours.of([value for line in values for value in line if value is not None])
    drawing = heat_map(rows, values, colours, few, style) + colour_key(colours, style, unit)
    columns = ("Layer", ">Least", ">Median", ">Largest", f"{unit} of every expert, from 0 on")
    table = []
    for row, (layer, line) in enumerate(zip(rows, values, strict=True)):
        known = [value for value in line if value is not None] or [0.0]
        cells = [
            "none" if value is None else f"({text(value)})" if (row, column) in few else text(value)
            for column, value in enumerate(line)
        ]
        extremes = [text(value) for value in (min(known), percentile(known, 0.5), max(known))]
        table.append((str(layer), *extremes, " ".join(cells)))
    return Figure(Markup(drawing), columns, table)


def _drawn(layers: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    return [
        Drawn(layer["layer"], expert["expert"], expert["tokens"], expert["error"])
        for layer in layers
        for expert in layer["experts"]
        if expert["tokens"] and expert.get("error") is not None
    ]


def _scatter(experts: Sequence[Drawn]) -> Figure:
    """A dot for every expert, and the median by doublings of the tokens."""
    errors = [one.error for one in experts]
    far = min(errors) > 0 and max(errors) > _FAR * percentile(errors, 0.5)
    x, y = logarithmic(one.tokens for one in experts), logarithmic(errors) if far else linear(errors)
    doubled: dict[int, list[float]] = defaultdict(list)
    for one in experts:
        doubled[int(math.log2(one.tokens))].append(one.error)
    bins = sorted(doubled.items())
    medians = [Point(2 ** (power + 0.5), percentile(found, 0.5)) for power, found in bins]
    worst = sorted(experts, key=lambda one: -one.error)[:_NAMED]
    notes = [Note(x.share(one.tokens), y.share(one.error), f"layer {one.layer}, expert {one.expert}") for one in worst]
    last = medians[-1]
    notes.append(Note(x.share(last.x), y.share(last.y), "median", "strong", ("above", "above-left", "below-left")))
    places = [Point(one.tokens, one.error) for one in experts]
    marks = dots(places, x, y, "speck measured" if len(experts) > _MANY else "dot measured")
    marks += joined(medians, x, y, "middle")
    rows = [
        (f"{2**power:,} to {2 ** (power + 1) - 1:,}", f"{len(found):,}",
         *(f"{value:.3g}" for value in (min(found), percentile(found, 0.5), max(found))))
        for power, found in bins
    ]  # fmt: skip
    columns = ("Tokens of an expert", ">Experts", ">Least error", ">Median", ">Largest")
    titles = ("tokens that the router sent to the expert", "relative error")
    around = places if len(places) <= _MANY else []
    return Figure(Markup(frame(marks, x, y, titles, notes, around=around)), columns, rows)
