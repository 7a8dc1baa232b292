"""A drawing that is as wide as its place: marks stretch with an SVG, words stay the size they are, as HTML over it.

Marks have no colours of their own: classes take theirs from the page's style sheet. Everything is in thousandths of the
drawing's width and height; strokes and dots keep their width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from l4pack.report.scale import Scale

NARROWEST, MARGIN = 250, 20  # pixels: of a drawing between its axis and its edge on a telephone, and right of it
CHARACTER, LINE = 6.4, 15  # pixels: no less than a letter of a note takes, and the height of its line
_FULL = 1000


@dataclass(frozen=True)
class Note:
    """Words at a place, shares of the axes from the left and from the bottom; on the first of `sides` with room.

    One that is `needed` may lie on points where there is no room.
    """

    x: float
    y: float
    text: str
    style: str = ""
    sides: Sequence[str] = ("right", "left", "above", "below", "above-left", "above-right", "below-left", "below-right")
    needed: bool = False


@dataclass(frozen=True)
class Point:
    """A value with its standard error, None where that is not known."""

    x: float
    y: float
    error: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Where its error bar ends; the value itself where it has none."""
        return self.y - (self.error or 0.0), self.y + (self.error or 0.0)


def frame(
    marks: str,
    x: Scale,
    y: Scale,
    titles: tuple[str, str],
    notes: Sequence[Note] = (),
    height: int = 190,
    around: Sequence[Point] = (),
) -> str:
    """Axes with round ticks around marks; `titles` are those of the x and the y axis, notes leave `around` free."""
    lines = "".join(f'<path class="rule" d="M0 {_down(y, tick)}H{_FULL}"/>' for tick in y.ticks)
    ticks = [
        f'<span class="{name}" style="{side}:{_percent(scale.share(tick))}">{text}</span>'
        for name, side, scale in (("ytick", "bottom", y), ("xtick", "left", x))
        for tick, text in zip(scale.ticks, scale.texts(), strict=True)
    ]
    return (
        f'<div class="chart" role="img" aria-label="{escape(f"{titles[1]} by {titles[0]}")}">'
        f'<div class="axis">{escape(titles[1])}</div><div class="plot" style="height:{height}px">'
        f"{drawing(lines + marks)}{''.join(ticks)}{''.join(_placed(notes, height, [(x.share(one.x), y.share(one.y)) for one in around]))}</div>"
        f'<div class="axis under">{escape(titles[0])}</div></div>'
    )


def drawing(marks: str, width: int = _FULL, height: int = _FULL) -> str:
    """An SVG that fills its place."""
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{marks}</svg>'


def dots(points: Iterable[Point], x: Scale, y: Scale, style: str) -> str:
    """A round dot at every point."""
    places = "".join(f"M{_across(x, point.x)} {_down(y, point.y)}h0" for point in points)
    return f'<path class="{style}" d="{places}"/>' if places else ""


def joined(points: Sequence[Point], x: Scale, y: Scale, style: str, *, stepped: bool = False) -> str:
    """A line through the points, or one that keeps its height until the next one."""
    path = ""
    for point in points:
        across, down = _across(x, point.x), _down(y, point.y)
        path += f"M{across} {down}" if not path else f"H{across}V{down}" if stepped else f"L{across} {down}"
    return f'<path class="line {style}" d="{path}"/>'


def whiskers(points: Iterable[Point], x: Scale, y: Scale, style: str) -> str:
    """One standard error up and down from each point that has one."""
    known = [(point, point.error) for point in points if point.error]
    path = "".join(
        f"M{_across(x, point.x)} {_down(y, point.y - error)}V{_down(y, point.y + error)}" for point, error in known
    )
    return f'<path class="whisker {style}" d="{path}"/>' if path else ""


def bars(edges: Sequence[float], heights: Sequence[float], x: Scale, y: Scale) -> str:
    """Bars between each two edges."""
    base = _down(y, y.low)
    parts = []
    for left, right, height in zip(edges, edges[1:], heights, strict=False):
        start, top = _across(x, left), _down(y, height)
        parts.append(f"M{start} {base}V{top}H{max(start + 1, _across(x, right) - 2)}V{base}z")
    return f'<path class="bar" d="{"".join(parts)}"/>'


def upright(value: float, x: Scale) -> str:
    """A dashed line from bottom to top."""
    return f'<path class="mark" d="M{_across(x, value)} 0V{_FULL}"/>'


def _placed(notes: Sequence[Note], height: int, around: Sequence[tuple[float, float]]) -> Iterable[str]:
    """Notes beside their points where they lie on nothing even in the narrowest drawing; the rest is left out."""
    places = ((x * NARROWEST, (1 - y) * height) for x, y in around)
    points: list[_Box] = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in places]
    taken: list[_Box] = []
    for note in notes:
        inside = [(side, box) for side in note.sides if _inside(box := _box(note, side, height), height)]
        free = [one for one in inside if not any(_overlap(one[1], other) for other in taken)]
        clear = [one for one in free if not any(_overlap(one[1], other) for other in points)]
        chosen = clear or (free if note.needed else [])
        if chosen:
            side, box = chosen[0]
            taken.append(box)
            at = f"left:{_percent(note.x)};bottom:{_percent(note.y)}"
            yield f'<span class="note {side} {note.style}" style="{at}">{escape(note.text)}</span>'


_Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the narrowest drawing
_BESIDE, _OVER = 8, 6  # pixels between a point and its note, as in the style sheet
_DOT = 3  # pixels: half a dot


def _box(note: Note, side: str, height: int) -> _Box:
    wide = CHARACTER * len(note.text)
    x, y = note.x * NARROWEST, (1 - note.y) * height
    left = x + _BESIDE if side == "right" else x - wide - _BESIDE if side == "left" else (
        x - wide if side.endswith("-left") else x if side.endswith("-right") else x - wide / 2
    )  # fmt: skip
    top = y - LINE - _OVER if side.startswith("above") else y + _OVER if side.startswith("below") else y - LINE / 2
    return left, top, left + wide, top + LINE


def _inside(box: _Box, height: int) -> bool:
    return box[0] >= 0 and box[2] <= NARROWEST + MARGIN and box[1] >= -LINE and box[3] <= height


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _across(x: Scale, value: float) -> int:
    return round(_FULL * x.share(value))


def _down(y: Scale, value: float) -> int:
    return round(_FULL * (1 - y.share(value)))


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
