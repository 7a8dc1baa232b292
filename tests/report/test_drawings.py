"""Marks lie where their values say, axes have round ticks, and words from outside stay words."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4pack.report.accuracy import accuracy_figures
from l4pack.report.experts import expert_figures
from l4pack.report.figure import with_error
from l4pack.report.heat import STEPS, Colours, colour_key, heat_map
from l4pack.report.plot import Note, Point, bars, dots, frame, joined, whiskers
from l4pack.report.scale import counted, linear, logarithmic, percentile, spanned

ROUND = {1.0, 2.0, 2.5, 5.0}


def is_round(number):
    """One of 1, 2, 2.5 and 5 times a power of ten, to rounding."""
    power = 10.0 ** math.floor(math.log10(number) + 1e-9)
    return any(math.isclose(number / power, one, rel_tol=1e-6) for one in ROUND)


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=5))
def test_ticks_are_round_and_hold_the_values(values):
    axis = linear(values)
    assert axis.low == 0
    assert axis.high >= max(values) * (1 - 1e-6)
    assert len(axis.ticks) <= 8
    assert is_round(axis.ticks[1] - axis.ticks[0])
    steep = logarithmic(values)
    assert steep.low <= min(values) * (1 + 1e-6)
    assert steep.high >= max(values) * (1 - 1e-6)
    assert 2 <= len(steep.ticks) <= 13
    assert all(is_round(tick) for tick in steep.ticks)
    for scale in (axis, steep):
        assert len(set(scale.texts())) == len(scale.ticks)
        assert max(map(len, scale.texts())) <= 9


def test_axes_of_numbered_things_have_whole_ticks():
    assert counted(0, 47).ticks == [0, 10, 20, 30, 40]
    assert counted(3, 3).ticks == [3]
    assert spanned(0, 1024).ticks == [0, 250, 500, 750, 1000]
    assert linear([0.15]).texts() == ["0.00", "0.05", "0.10", "0.15"]
    assert logarithmic([1e-6, 0.02]).texts() == ["1e-6", "1e-5", "0.0001", "0.001", "0.01"]


def test_marks_lie_at_their_values():
    x, y = spanned(0, 10), linear([0.0, 5.0])
    points = [Point(0, 0.0), Point(5, 2.5, 0.5), Point(10, 5.0)]
    assert dots(points, x, y, "dot") == '<path class="dot" d="M0 1000h0M500 500h0M1000 0h0"/>'
    assert joined(points, x, y, "a") == '<path class="line a" d="M0 1000L500 500L1000 0"/>'
    assert joined(points, x, y, "a", stepped=True) == '<path class="line a" d="M0 1000H500V500H1000V0"/>'
    assert whiskers(points, x, y, "a") == '<path class="whisker a" d="M500 600V400"/>'
    assert whiskers(points[:1], x, y, "a") == ""


def test_bar_heights_are_counts():
    path = bars([1, 2, 3], [10, 5], spanned(1, 3), linear([10.0]))
    assert re.findall(r"V(\d+)H", path) == ["0", "500"]


def test_colours_go_from_the_least_to_the_99th_percentile():
    values = [*(number / 100 for number in range(1, 101)), 7.0]
    colours = Colours.of(values)
    assert (colours.limits[0], colours.limits[-1], colours.largest) == (0.01, percentile(values, 0.99), 7.0)
    assert [colours.step(value) for value in (0.01, 0.5, 1.0, 7.0)] == [0, 2, STEPS - 1, STEPS]
    key = colour_key(colours, "error", "relative error")
    assert [f'error{step}"' in key for step in range(STEPS + 1)] == [True] * (STEPS + 1)
    assert re.findall(r"</i>([^<]+)", key) == ["0.01", "0.18", "0.34", "0.50", "0.67", "0.84", "1.00", "7.00"]


def test_values_far_apart_get_colours_by_factors():
    colours = Colours.of([1.0, 10.0, 20.0, 30.0, 10_000.0])
    factors = [high / low for low, high in zip(colours.limits, colours.limits[1:], strict=False)]
    assert factors == pytest.approx([10_000 ** (1 / STEPS)] * STEPS)
    assert [colours.step(value) for value in (1.0, 30.0, 10_000.0)] == [0, 2, STEPS - 1]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=150))
def test_every_value_has_a_colour_and_a_key(values):
    colours = Colours.of(values)
    assert {colours.step(value) for value in values} <= set(range(STEPS + 1))
    used = {colours.step(value) for value in values}
    key = colour_key(colours, "error", "unit")
    assert all(f'"error{step}"' in key for step in used)


def test_cells_are_empty_small_or_whole():
    drawing = heat_map([0, 2], [[1.0, 4.0], [None, 2.0]], Colours.of([1.0, 4.0, 2.0]), {(1, 1)})
    assert 'class="none" d="M0 10h10v10h-10z"' in drawing
    assert 'd="M13 13h4v4h-4z"' in drawing
    assert 'd="M10 0h10v10h-10z"' in drawing


def test_notes_don_t_lie_on_one_another_or_on_points():
    crowd = [Note(0.5, 0.5, f"number {place}") for place in range(20)]
    shown = frame("", spanned(0, 1), linear([1.0]), ("x", "y"), crowd).count('class="note')
    assert 1 < shown < 9
    covered = [Point(across / 20, up / 20) for across in range(21) for up in range(21)]
    assert 'class="note' not in frame("", spanned(0, 1), linear([1.0]), ("x", "y"), crowd, around=covered)


def test_drawings_of_little_are_drawn():
    nothing = {"layers": [], "text": {"tokens": 0}}
    assert accuracy_figures(nothing) == {}
    assert expert_figures([]) == {}
    cold = [{"layer": 1, "experts": [{"expert": 0, "tokens": 0}, {"expert": 1, "tokens": 0}]}]
    assert expert_figures(cold) == {}
    one = [{"layer": 1, "experts": [{"expert": 0, "tokens": 3, "error": 0.0}]}]
    assert set(expert_figures(one)) == {"expert_errors", "error_by_tokens", "expert_tokens"}
    bare = {
        "kl_histogram": {"edges": [], "counts": [0]},
        "by_position": [],
        "kl_median": 0.0,
        "kl_mean": 0.0,
        "kl_p99": 0.0,
    }
    assert set(accuracy_figures({**nothing, **bare})) == {"tokens", "positions"}
    exact = {"kl_histogram": {"edges": [1e-7], "counts": [9, 0]}, "by_position": []}
    assert set(accuracy_figures({**nothing, **bare, **exact})) == {"tokens", "positions"}


def test_no_label_is_markup():
    evil = "<script>1</script>"
    drawing = frame("", spanned(0, 1), linear([1.0]), (evil, evil), [Note(0.1, 0.5, evil)])
    drawing += colour_key(Colours.of([1.0]), "error", evil)
    assert "<script" not in drawing
    ElementTree.fromstring(f"<div>{drawing}</div>")


def test_numbers_have_the_digits_their_errors_leave():
    assert with_error(0.0027402, 0.000168) == "0.00274 ± 0.00017"
    assert with_error(18.66, 1.23) == "18.7 ± 1.2"
    assert with_error(18.66, None) == "18.66"
    assert with_error(None, None) == "not measured"
