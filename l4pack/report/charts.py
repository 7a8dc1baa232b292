"""The report's drawings, as SVG text without colours of its own: classes take theirs from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 760, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40


@dataclass(frozen=True)
class Series:
    """One line: a name, a CSS class for its colour, and a value (or None) for every place on the x axis."""

    name: str
    style: str
    values: Sequence[float | None]


def line_chart(labels: Sequence[str], series: Sequence[Series], x_title: str, y_title: str) -> str:
    """Lines with a dot for every value; the y axis starts at zero."""
    known = [value for one in series for value in one.values if value is not None]
    top = _nice(max(known, default=0.0))
    parts = [_y_axis(top, y_title), _x_axis(labels, x_title)]
    for one in series:
        points = [
            (_x(index, len(labels)), _y(value, top), labels[index], value)
            for index, value in enumerate(one.values)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        parts.append(f'<polyline class="line {one.style}" points="{path}"/>')
        parts += [
            f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{escape(one.name)}, {escape(x_title)} {escape(label)}: {value:.4g}</title></circle>"
            for x, y, label, value in points
        ]
    return _svg(parts, HEIGHT, f"{y_title} by {x_title}: {', '.join(one.name for one in series)}")


def histogram(edges: Sequence[float], counts: Sequence[int], x_title: str, y_title: str) -> str:
    """Bars over a logarithmic x axis; the first counts what lies below the first edge, the last what lies above."""
    used = [index for index, count in enumerate(counts) if count]
    first, last = (min(used), max(used)) if used else (0, len(counts) - 1)
    shown = range(first, last + 1)
    top = _nice(max(counts, default=0))
    width = (WIDTH - LEFT - RIGHT) / len(shown)
    parts = [_y_axis(top, y_title)]
    for place, index in enumerate(shown):
        x, y = LEFT + place * width, _y(counts[index], top)
        low = edges[index - 1] if index else 0.0
        high = f"{edges[index]:.2g}" if index < len(edges) else "more"
        parts.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{y:.1f}" width="{max(1.0, width - 2):.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}" rx="2"><title>{low:.2g} to {high}: {counts[index]:,}</title></rect>'
        )
        if index % 4 == 1 or (index == first and index % 4 == 2):
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{low:.2g}</text>')
    parts.append(_title(x_title))
    return _svg(parts, HEIGHT, f"{y_title} by {x_title}")


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], unit: str) -> str:
    """Cells whose class `heat` gets the share --v of the largest value; None stays empty. Rows are layers."""
    largest = max((value for row in values for value in row if value is not None), default=0.0) or 1.0
    cell_width = max(5.0, min(36.0, (WIDTH - LEFT - RIGHT) / max(1, len(columns))))
    cell_height = 22 if len(rows) <= 12 else 14
    width = max(WIDTH, LEFT + RIGHT + cell_width * len(columns))
    parts = []
    for number, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = TOP + number * cell_height
        if number % max(1, len(rows) // 24) == 0:
            parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + cell_height * 0.7:.1f}">{escape(name)}</text>')
        for place, value in enumerate(row):
            parts.append(_cell(LEFT + place * cell_width, y, cell_width, cell_height, value, largest,
                               f"layer {name}, expert {columns[place]}", unit))  # fmt: skip
    bottom = TOP + len(rows) * cell_height
    step = max(1, math.ceil(len(columns) / 16))
    parts += [
        f'<text class="tick" x="{LEFT + (place + 0.5) * cell_width:.1f}" y="{bottom + 16}">{escape(columns[place])}</text>'
        for place in range(0, len(columns), step)
    ]
    parts.append(
        f'<text class="axis" x="{LEFT}" y="{bottom + 34}">expert, by layer; the strongest colour is {_amount(largest, unit)}</text>'
    )
    return _svg(parts, bottom + 44, f"{unit} by layer and expert", width)


@dataclass(frozen=True)
class Marks:
    """Points (x, y, what each is), with a CSS class for their colour; joined as steps, or left apart."""

    style: str
    points: Sequence[tuple[float, float, str]]
    joined: bool = False


def trade_off(series: Sequence[Marks], x_title: str, y_title: str) -> str:
    """Falling steps and points over a linear x axis and a logarithmic y axis; what is not above zero has no place."""
    shown = [replace(one, points=[point for point in one.points if point[1] > 0]) for one in series]
    xs = [x for one in shown for x, _, _ in one.points] or [0.0, 1.0]
    ys = [math.log10(y) for one in shown for _, y, _ in one.points] or [0.0]
    left, right, low, high = min(xs), max(xs), math.floor(min(ys)), max(math.ceil(max(ys)), math.floor(min(ys)) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / ((right - left) or 1.0)
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(y) - low) / (high - low)

    parts = []
    for power in range(low, high + 1):
        y = place(left, 10.0**power)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">1e{power}</text>')
    for step in range(6):
        x = left + (right - left) * step / 5
        parts.append(f'<text class="tick mid" x="{place(x, 1.0)[0]:.1f}" y="{HEIGHT - BOTTOM + 16}">{x:.4g}</text>')
    for one in shown:
        at = [(*place(x, y), what) for x, y, what in one.points]
        if one.joined and at:
            steps = [f"{x:.1f},{before:.1f} {x:.1f},{y:.1f}" for (_, before, _), (x, y, _) in pairwise(at)]
            parts.append(
                f'<polyline class="line {one.style}" points="{" ".join([f"{at[0][0]:.1f},{at[0][1]:.1f}", *steps])}"/>'
            )
        parts += [
            f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="{3 if one.joined else 5}">'
            f"<title>{escape(what)}</title></circle>"
            for x, y, what in at
        ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="axis mid" transform="translate(12 {middle:.0f}) rotate(-90)">{escape(y_title)}</text>')
    parts.append(_title(x_title))
    return _svg(parts, HEIGHT, f"{y_title} by {x_title}")


def _cell(
    x: float, y: float, width: float, height: float, value: float | None, largest: float, where: str, unit: str
) -> str:
    style, said = ('class="none"', "none") if value is None else (
        f'class="heat" style="--v:{100 * value / largest:.1f}%"', _amount(value, unit)
    )  # fmt: skip
    return (
        f'<rect {style} x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{width - 1:.1f}" height="{height - 1}" rx="1">'
        f"<title>{escape(where)}: {said}</title></rect>"
    )


def _amount(value: float, unit: str) -> str:
    number = f"{value:,.0f}" if value == int(value) and value >= 1 else f"{value:.4g}"
    return f"{number} {escape(unit)}"


def _svg(parts: Sequence[str], height: float, label: str, width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="min-width:{min(width, 1400):.0f}px" role="img" '
        f'aria-label="{escape(label)}">' + "".join(parts) + "</svg>"
    )


def _nice(largest: float) -> float:
    """The next round number, so that a quarter of it is round too."""
    if largest <= 0 or not math.isfinite(largest):
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10) if step * power >= largest * 0.999)


def _x(index: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / max(1, count)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top


def _y_axis(top: float, title: str) -> str:
    lines = []
    for step in range(5):
        value = top * step / 4
        y = _y(value, top)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{_tick(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(f'<text class="axis mid" transform="translate(12 {middle:.0f}) rotate(-90)">{escape(title)}</text>')
    return "".join(lines)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _x_axis(labels: Sequence[str], title: str) -> str:
    step = max(1, math.ceil(len(labels) / 16))
    ticks = "".join(
        f'<text class="tick mid" x="{_x(index, len(labels)):.1f}" y="{HEIGHT - BOTTOM + 16}">{escape(labels[index])}</text>'
        for index in range(0, len(labels), step)
    )
    return ticks + _title(title)


def _title(text: str) -> str:
    return f'<text class="axis mid" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}">{escape(text)}</text>'
