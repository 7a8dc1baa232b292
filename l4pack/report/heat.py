"""Layers by experts as cells of a few colours, whose limits are told: from the least value to the 99th percentile."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from l4pack.report.plot import drawing
from l4pack.report.scale import counted, percentile

STEPS = 6
_CELL, _SMALL = 10, 4  # of the drawing; cells are parted by a line of the page's colour
_FAR = 4.0  # times the median
_FINE = 32  # columns: from here on there is no room for lines between cells
_LEAST_PIXELS = 13  # between the names of two rows


@dataclass(frozen=True)
class Colours:
    """Steps from the least value to the 99th percentile, equal ones, or like factors where values lie far apart.

    What lies above has a colour of its own.
    """

    limits: tuple[float, ...]  # where colours begin and end
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Colours:
        """The colours of values, of which there is one at least."""
        least, most = min(values), percentile(values, 0.99)
        if least > 0 and most > _FAR * percentile(values, 0.5):
            limits = [
                least,
                *(
                    math.exp(math.log(least) + (math.log(most) - math.log(least)) * step / STEPS)
                    for step in range(1, STEPS)
                ),
            ]
        else:
            limits = [least + (most - least) * step / STEPS for step in range(STEPS)]
        return cls((*limits, most), max(values))

    @property
    def flat(self) -> bool:
        """Whether all values, but for a few above, are the same."""
        return self.limits[0] >= self.limits[-1]

    @property
    def beyond(self) -> bool:
        """Whether there are values above the 99th percentile."""
        return self.largest > self.limits[-1]

    def step(self, value: float) -> int:
        """Number of a value's colour, `STEPS` above the 99th percentile."""
        if value > self.limits[-1]:
            return STEPS
        return 0 if self.flat else min(STEPS - 1, max(0, bisect_right(self.limits, value) - 1))


def heat_map(
    rows: Sequence[int],
    values: Sequence[Sequence[float | None]],
    colours: Colours,
    few: Collection[tuple[int, int]] = (),
    style: str = "error",
) -> str:
    """Cells for every layer (a row) and expert (a column): None is empty, cells in `few` are small.

    `few` holds (place of the row, column); `style` chooses the colours of the page.
    """
    columns = max(map(len, values))
    parted = "" if columns > _FINE else " parted"
    pixels = 22 if len(rows) <= 8 else 12 if len(rows) <= 24 else 9
    paths: dict[str, list[str]] = defaultdict(list)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            name = "none" if value is None else f"{style}{colours.step(value)}"
            paths[name].append(_cell(row, column, small=(row, column) in few))
    cells = "".join(f'<path class="{name}" d="{"".join(path)}"/>' for name, path in sorted(paths.items()))
    return (
        f'<div class="chart" role="img" aria-label="{style} by layer and expert"><div class="axis">layer</div>'
        f'<div class="plot{parted}" style="height:{pixels * len(rows)}px">'
        f"{drawing(cells, _CELL * columns, _CELL * len(rows))}{_names(rows, pixels)}{_numbers(columns)}</div>"
        f'<div class="axis under">expert</div></div>'
    )


def colour_key(colours: Colours, style: str, unit: str) -> str:
    """The colours with their limits."""
    texts = _limit_texts(colours)
    last = STEPS if colours.beyond else 0 if colours.flat else STEPS - 1
    shown = [0, STEPS] if colours.flat and colours.beyond else range(last + 1)
    steps = [f'<span class="step"><i class="{style}{step}"></i>{texts[step]}</span>' for step in shown]
    told = f"{escape(unit)}, from the least to the 99th percentile"
    told += "; the last colour is for what lies above it" if colours.beyond else ""
    end = f'<span class="step end"><i></i>{texts[last + 1]}</span>' if last else ""
    return f'<div class="key" role="img" aria-label="colours">{"".join(steps)}{end}</div><div class="axis">{told}</div>'


def _cell(row: int, column: int, *, small: bool) -> str:
    size = _SMALL if small else _CELL
    shift = (_CELL - size) // 2
    return f"M{_CELL * column + shift} {_CELL * row + shift}h{size}v{size}h-{size}z"


def _names(rows: Sequence[int], pixels: int) -> str:
    every = -(-_LEAST_PIXELS // pixels)
    return "".join(
        f'<span class="ytick" style="bottom:{100 * (1 - (place + 0.5) / len(rows)):.4g}%">{rows[place]}</span>'
        for place in range(0, len(rows), every)
    )


def _numbers(columns: int) -> str:
    scale = counted(0, columns - 1)
    return "".join(
        f'<span class="xtick" style="left:{100 * scale.share(tick):.4g}%">{tick:.0f}</span>' for tick in scale.ticks
    )


def _limit_texts(colours: Colours) -> list[str]:
    """The limits and the largest value, with as many digits as tell the limits apart, at most seven characters."""
    values = [*colours.limits, colours.largest]
    if colours.limits[0] >= 1:
        return [f"{value:,.0f}" for value in values]
    steps = [high - low for low, high in pairwise(colours.limits) if high > low]
    decimals = max(0, 1 - math.floor(math.log10(min(steps, default=1.0))))
    return [f"{value:.2g}" if decimals > 4 else f"{value:,.{decimals}f}" for value in values]
