"""A page can be read: enough contrast in light and dark, and no words beyond their place, on a telephone too."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib
import pytest
from large_record import large
from PIL import ImageFont
from whole_model import one_thread  # noqa: F401

from l4pack.cli.report import report
from l4pack.resources import data_text

pytest_plugins = ["report_fixtures"]

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
PLAIN, STRONG = (ImageFont.truetype(str(FONTS / f"DejaVuSans{kind}.ttf"), 11) for kind in ("", "-Bold"))
AXIS_ROOM = 50  # pixels left of a drawing
NARROW, WIDE = 250, 880  # pixels of a drawing on a small telephone and on a large screen
STYLE = data_text("report", "templates", "report.css")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (320, 390, 768, 1100)


@pytest.fixture(scope="module", params=["small", "large"])
def text(request, evaluated_once, tmp_path_factory):
    """The page of an evaluated artifact, and of one whose record is as large as Maverick's."""
    folder = tmp_path_factory.mktemp("look")
    made = shutil.copytree(evaluated_once, folder / "Llama-tiny-Int4")
    if request.param == "large":
        record = large(json.loads((made / "accuracy.json").read_text()))
        (made / "accuracy.json").write_text(json.dumps(record))
    report(str(made), folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


# Contrast, as WCAG 2.2 defines it


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_of_what_is_known():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.fixture(params=["light", "dark"])
def colours(request):
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    return found | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark)) if request.param == "dark" else found


def test_both_schemes_set_every_colour():
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    names = [re.findall(r"--([\w-]+):", block) for block in (light, dark)]
    assert names[0] == names[1]
    assert len(names[0]) > 20


def test_words_have_the_contrast_of_level_aa(colours):
    pairs = [("ink", "page"), ("ink", "card"), ("ink", "well"), ("soft", "page"), ("soft", "card"),
             ("good", "good-back"), ("bad", "bad-back")]  # fmt: skip
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert min(low.values()) >= 4.5, low


def test_marks_stand_out_from_the_page_and_from_one_another(colours):
    marks = ("measured", "original", "predicted")
    assert min(contrast(colours[mark], colours["card"]) for mark in marks) >= 3
    assert len({colours[mark] for mark in marks}) == 3


@pytest.mark.parametrize("ramp", ["error", "tokens"])
def test_steps_of_a_ramp_are_told_apart_without_their_hue(colours, ramp):
    steps = [colours[f"{ramp}{step}"] for step in range(7)]
    away = [contrast(step, colours["card"]) for step in steps]
    assert away == sorted(away)
    assert away[0] >= 1.1
    assert away[-3] >= 3
    assert min(contrast(one, other) for one, other in itertools.pairwise(steps)) >= 1.2


# Room for words


def spans(drawing, kind):
    """Words of one kind: (sides, share from the left, share from the bottom, text)."""
    found = re.findall(rf'<span class="({kind}[^"]*)" style="([^"]*)">([^<]*)</span>', drawing)
    for name, style, words in found:
        place = {side: float(share) / 100 for side, share in re.findall(r"(left|bottom):([\d.e-]+)%", style)}
        yield name, place.get("left", 0.0), place.get("bottom", 0.0), html.unescape(words)


def drawings(text):
    """Every drawing with axes, and its height in pixels."""
    found = re.findall(r'<div class="plot[^"]*" style="height:(\d+)px">(.*?)</div>', text, re.DOTALL)
    assert len(found) >= 6
    return [(int(height), drawing) for height, drawing in found]


def apart(boxes):
    for one, other in itertools.combinations(boxes, 2):
        (_, left, top, right, bottom), (_, start, over, end, under) = one, other
        assert not (left < end and start < right and top < under and over < bottom), (one[0], other[0])


def test_numbers_at_axes_have_room(text):
    for _, drawing in drawings(text):
        assert all(PLAIN.getlength(words) <= AXIS_ROOM - 6 for *_, words in spans(drawing, "ytick"))
        middles = [(left * NARROW, PLAIN.getlength(words), words) for _, left, _, words in spans(drawing, "xtick")]
        apart([(words, at - wide / 2, 0, at + wide / 2, 1) for at, wide, words in middles])


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_notes_lie_within_their_drawing_and_apart(text, width):
    notes = 0
    for height, drawing in drawings(text):
        boxes = []
        for name, left, bottom, words in spans(drawing, "note"):
            wide = (STRONG if "strong" in name else PLAIN).getlength(words)
            side = name.split()[1]
            x, y = left * width, (1 - bottom) * height
            start = {"right": x + 8, "left": x - wide - 8, "above": x - wide / 2, "below": x - wide / 2}.get(
                side, x - wide if side.endswith("left") else x
            )
            top = y - 21 if side.startswith("above") else y + 6 if side.startswith("below") else y - 7.5
            boxes.append((words, start, top, start + wide, top + 15))
            assert start >= -AXIS_ROOM
            assert start + wide <= width + 20, words
        apart(boxes)
        notes += len(boxes)
    assert notes >= 5


def test_limits_of_colours_have_room(text):
    keys = re.findall(r'<div class="key".*?</div>', text)
    assert keys
    for key in keys:
        limits = re.findall(r"</i>([^<]+)", key)
        assert all(PLAIN.getlength(limit) <= 44 for limit in limits)
        assert all(PLAIN.getlength(limit) <= (NARROW + 14 - 44) / (len(limits) - 1) + 12 for limit in limits[:-1])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_nothing_scrolls_sideways_in_a_browser(text, tmp_path):
    """Whole pages, closed and with every table open, in frames as wide as telephones and screens."""
    assert BROWSER is not None
    opened = text.replace("<details>", "<details open>")
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
        for page in (text, opened)
    )
    script = """onload = () => {
      const wide = [];
      for (const frame of document.querySelectorAll("iframe")) {
        const page = frame.contentDocument, edge = page.documentElement.clientWidth;
        if (page.documentElement.scrollWidth > edge) wide.push(frame.style.width + " page");
        for (const one of page.querySelectorAll("td, th, span, p, h1, h2, h3, pre, b, div"))
          if (one.getBoundingClientRect().right > edge + 0.5 || one.scrollWidth > one.clientWidth + 1 && one.matches("td, th, pre, p, .amount"))
            wide.push(frame.style.width + " " + one.className + " " + one.textContent.slice(0, 40));
      }
      document.title = "measured";
      document.body.textContent = wide.slice(0, 9).join("; ") || "all within";
    }"""
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}<script>{script}</script></body>")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=20000", "--dump-dom", f"file://{tmp_path / 'frames.html'}"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>measured</title>" in ended.stdout
    assert "all within" in ended.stdout, ended.stdout[-2000:]
