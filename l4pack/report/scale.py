"""From values to places on an axis, with round numbers as ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_DECADE = (1, 2, 5)
_MOST_TICKS = 6


@dataclass(frozen=True)
class Scale:
    """An axis: its ends, and its ticks within them."""

    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one; what lies beyond is put at the end."""
        if self.logarithmic:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def texts(self) -> list[str]:
        """The ticks' numbers: with as many decimals as the finest of them where the axis is linear."""
        texts = [_tick_text(tick) for tick in self.ticks]
        plain = not self.logarithmic and all("e" not in text and text[-1].isdigit() for text in texts)
        decimals = max((len(text.partition(".")[2]) for text in texts), default=0) if plain else 0
        return [f"{tick:,.{decimals}f}" for tick in self.ticks] if decimals else texts


def linear(values: Iterable[float]) -> Scale:
    """A linear axis from zero (or the round number below the least value) to the round number above the largest one."""
    known = [0.0, *(value for value in values if math.isfinite(value))]
    low, high = min(known), max(known)
    ticks = _round_ticks(low, high if high > low else low + 1.0, math.floor, math.ceil)
    return Scale(ticks[0], ticks[-1], ticks)


def spanned(low: float, high: float) -> Scale:
    """A linear axis with just these ends; ticks are the round numbers between them."""
    high = high if high > low else low + (abs(low) or 1.0)
    return Scale(low, high, _round_ticks(low, high, math.ceil, math.floor))


def widened(values: Sequence[float]) -> Scale:
    """A linear axis a little wider than its values, of which there is one at least."""
    low, high = min(values), max(values)
    return spanned(low - (high - low) / 20, high + (high - low) / 20)


def counted(first: int, last: int) -> Scale:
    """A linear axis for things that are numbered, half a step wider than they are; ticks are whole numbers."""
    step = max(1, math.ceil(_round_step((last - first) / (_MOST_TICKS - 1)))) if last > first else 1
    ticks = [float(number) for number in range(math.ceil(first / step) * step, last + 1, step)]
    return Scale(first - 0.5, last + 0.5, ticks)


def logarithmic(values: Iterable[float]) -> Scale:
    """A logarithmic axis that holds all values above zero; ticks are powers of ten, with 2 and 5 where there is room."""
    known = [value for value in values if value > 0 and math.isfinite(value)] or [0.1, 1.0]
    marks = [
        mark * 10.0**power
        for power in range(math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known))) + 2)
        for mark in _DECADE
    ]
    low = max(mark for mark in marks if mark <= min(known) * (1 + 1e-9))
    high = min(mark for mark in marks if mark >= max(known) * (1 - 1e-9) and mark > low)
    inside = [mark for mark in marks if low <= mark <= high]
    decades = [mark for mark in inside if math.isclose(10.0 ** round(math.log10(mark)), mark, rel_tol=1e-9)]
    every = math.ceil(len(decades) / _MOST_TICKS)
    return Scale(low, high, inside if len(inside) <= _MOST_TICKS else decades[::every], logarithmic=True)


def _tick_text(value: float) -> str:
    """At most seven characters: `0.05`, `1e-5`, `20,000`, `4M`."""
    if value and abs(value) < 1e-4:
        mantissa, _, power = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(power)}"
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values don't exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _round_ticks(low: float, high: float, first: Callable[[float], int], last: Callable[[float], int]) -> list[float]:
    step = _round_step((high - low) / (_MOST_TICKS - 1))
    hair = 1e-9 if first is math.floor else -1e-9
    return [number * step for number in range(first(low / step + hair), last(high / step - hair) + 1)]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in _STEPS if step * power >= least * (1 - 1e-9))
