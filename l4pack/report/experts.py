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
from l4pack.report.plot import Note, Point, dots, frame, joined, upright
from l4pack.report.scale import Scale, linear, logarithmic, percentile

FEW_TOKENS = 32
_NAMED = 3
_FAR = 4.0  # times the median: the axis is logarithmic then
_MANY = 200  # experts: their dots are small

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
    """A dot for every expert; the median by doublings of the tokens, and where few tokens end, for models that have many."""
    many = len(experts) > _MANY
    errors = [one.error for one in experts]
    far = min(errors) > 0 and max(errors) > _FAR * percentile(errors, 0.5)
    x, y = logarithmic(one.tokens for one in experts), logarithmic(errors) if far else linear(errors)
    places = [Point(one.tokens, one.error) for one in experts]
    doublings = _doublings(experts)
    marks, notes = dots(places, x, y, "speck measured" if many else "dot measured"), _worst(experts, x, y)
    if many:
        medians = [Point(2 ** (power + 0.5), percentile(found, 0.5)) for power, found in doublings.items()]
        last = x.share(medians[-1].x), y.share(medians[-1].y)
        marks += joined(medians, x, y, "middle")
        notes.append(Note(*last, "median", "strong", ("above", "above-left", "below-left"), needed=True))
    if x.low < FEW_TOKENS < x.high:
        marks += upright(FEW_TOKENS, x)
        notes.append(Note(x.share(FEW_TOKENS), 0.06, f"{FEW_TOKENS} tokens", sides=("right", "left")))
    titles = ("tokens that the router sent to the expert", "relative error")
    drawing = frame(marks, x, y, titles, notes, around=[] if many else places)
    columns = ("Tokens of an expert", ">Experts", ">Least error", ">Median", ">Largest")
    return Figure(Markup(drawing), columns, [_doubling(power, found) for power, found in doublings.items()])


def _worst(experts: Sequence[Drawn], x: Scale, y: Scale) -> list[Note]:
    return [
        Note(x.share(one.tokens), y.share(one.error), f"layer {one.layer}, expert {one.expert}")
        for one in sorted(experts, key=lambda one: -one.error)[:_NAMED]
    ]


def _doublings(experts: Sequence[Drawn]) -> dict[int, list[float]]:
    """Errors by the power of two that their experts' tokens reach, the least first."""
    found: dict[int, list[float]] = defaultdict(list)
    for one in sorted(experts, key=lambda one: one.tokens):
        found[int(math.log2(one.tokens))].append(one.error)
    return found


def _doubling(power: int, errors: Sequence[float]) -> tuple[str, ...]:
    numbers = (min(errors), percentile(errors, 0.5), max(errors))
    return (f"{2**power:,} to {2 ** (power + 1) - 1:,}", f"{len(errors):,}", *(f"{value:.3g}" for value in numbers))
