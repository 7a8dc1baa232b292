"""The report is one page that needs nothing else, shows what was measured, and trusts no text it is given."""

from __future__ import annotations

import json
import re
import shutil
from xml.etree import ElementTree

import pytest
from page import Page
from whole_model import one_thread  # noqa: F401

from l4pack.report.charts import HEIGHT, Series, heat_map, histogram, line_chart


@pytest.fixture(scope="session")
def evaluated_once(artifact, checkpoint, tmp_path_factory):
    """A Maverick-like artifact with an `accuracy.json` made by a real evaluation."""
    from l4pack.checkpoint.source import open_folder
    from l4pack.evaluate.evaluate import evaluate
    from l4pack.evaluate.inputs import EvaluationSettings
    from l4pack.evaluate.record import write_accuracy
    from l4pack.recipe import Gates
    from l4pack.text.choice import TextChoice

    folder = tmp_path_factory.mktemp("report")
    made = folder / "Llama-tiny-Int4"
    shutil.copytree(artifact("int4-rtn", "maverick"), made)
    (folder / "text.txt").write_text("some words of text, again and again " * 30)
    choice = TextChoice(str(folder / "text.txt"), 4, 64)
    record = evaluate(
        open_folder(made), open_folder(checkpoint("maverick")), EvaluationSettings(folder / "work", choice)
    )
    write_accuracy(made, record, Gates(max_kl=1e-9, min_agreement=0.01), {})
    return made


@pytest.fixture
def made(evaluated_once, tmp_path):
    return shutil.copytree(evaluated_once, tmp_path / "Llama-tiny-Int4")


@pytest.fixture
def page(l4pack, tmp_path):
    def render(artifact, *options):
        out = tmp_path / "page.html"
        ended = l4pack("report", artifact, "--out", out, *options)
        assert ended.code == 0, ended.err
        return out.read_text(encoding="utf-8")

    return render


def test_page_needs_nothing_else(page, made):
    text = page(made)
    parsed = Page(text)
    assert parsed.open == []
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(parsed.tags)
    names = {name for name, _ in parsed.attributes}
    assert not {"src", "href", "onclick", "onload"} & names
    assert "url(" not in text
    assert "@import" not in text
    assert re.findall(r"https?://", text) == []
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_page_shows_what_was_measured(page, made):
    record = json.loads((made / "accuracy.json").read_text())
    text = page(made)
    words = " ".join(Page(text).words)
    assert f"{record['kl_mean']:,.4g}" in words
    assert f"{100 * record['top1_agreement']:,.4g} %" in words
    assert record["text"]["sha256"] in words
    assert record["run"]["versions"]["torch"] in words
    worst = record["worst"][0]
    assert worst["block"].replace("_", " ") in words
    assert text.count('class="missed"') == text.count('class="passed"') == 1
    assert "recipe int4-rtn" in words


def test_a_sample_is_marked_from_where_the_models_part(page, made):
    record = json.loads((made / "accuracy.json").read_text())
    said = [{"text": text, "tokens": [1], "ended": True} for text in ("It is <b>", "It is so")]
    answer = {"prompt": "Why?", "artifact": said[0], "original": said[1], "first_difference": 0}
    (made / "accuracy.json").write_text(json.dumps({**record, "sample": {"tokens": 16, "answers": [answer]}}))
    assert "It is <mark>&lt;b&gt;</mark>" in page(made)
    assert "It is <mark>so</mark>" in page(made)


def test_heat_maps_have_a_cell_for_every_expert(page, made):
    record = json.loads((made / "accuracy.json").read_text())
    text = page(made)
    experts = [expert for layer in record["layers"] for expert in layer.get("experts", ())]
    assert text.count('class="heat"') + text.count('class="none"') == 2 * len(experts)
    for expert in experts:
        if expert["tokens"]:
            assert f", expert {expert['expert']}: {expert['tokens']:,} tokens" in text


def test_bars_are_bytes_by_role(page, made):
    from l4pack.checkpoint.source import open_folder

    words = Page(page(made)).words
    total = open_folder(made).weight_bytes
    assert any(f"{total / 1e6:.2f} MB" in word for word in words)


def test_an_artifact_that_was_not_evaluated(page, artifact):
    text = page(artifact("fp8"))
    assert "has not been evaluated" in text
    assert Page(text).open == []


def test_names_from_outside_are_taken_as_text(page, made):
    record = json.loads((made / "accuracy.json").read_text())
    record["against"] = "<script>alert(1)</script>"
    record["tasks"] = {"<img src=x>": {"questions": 1, "accuracy": {"value": 1.0, "standard_error": None}}}
    (made / "accuracy.json").write_text(json.dumps(record))
    text = page(made)
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"tokens": 1}'])
def test_a_damaged_accuracy_file(l4pack, made, content):
    (made / "accuracy.json").write_text(content)
    ended = l4pack("report", made)
    assert ended.code == 2
    assert "accuracy.json" in ended.err
    assert "hint: run `l4pack evaluate` again" in ended.err


def test_default_place_and_unknown_device(l4pack, made):
    assert l4pack("report", made).code == 0
    assert (made.parent / "Llama-tiny-Int4.report.html").is_file()
    assert l4pack("report", made, "--device", "toaster").code == 2


def test_a_folder_named_by_a_dot(l4pack, made, monkeypatch):
    monkeypatch.chdir(made)
    assert l4pack("report", ".").code == 0
    assert (made.parent / "Llama-tiny-Int4.report.html").is_file()


def test_same_record_same_page(page, made):
    assert page(made) == page(made)


# Drawings


def shapes(svg, tag):
    return [element for element in ElementTree.fromstring(svg).iter(tag)]


def test_lines_lie_at_their_values():
    svg = line_chart(["0", "1", "2"], [Series("s", "c1", [0.0, 0.5, None])], "layer", "error")
    dots = shapes(svg, "circle")
    assert len(dots) == 2
    low, high = (float(dot.get("cy")) for dot in dots)
    assert low == HEIGHT - 40
    assert high == 14
    assert [dot[0].text for dot in dots] == ["s, layer 0: 0", "s, layer 1: 0.5"]


def test_bar_heights_are_counts():
    svg = histogram([0.1, 1.0], [5, 10, 0], "KL", "tokens")
    heights = [float(bar.get("height")) for bar in shapes(svg, "rect")]
    assert len(heights) == 2
    assert heights[1] == pytest.approx(2 * heights[0])


def test_heat_shares_and_empty_cells():
    svg = heat_map(["0", "1"], ["0", "1"], [[1.0, 4.0], [None, 2.0]], "tokens")
    cells = shapes(svg, "rect")
    assert [cell.get("style") for cell in cells] == ["--v:25.0%", "--v:100.0%", None, "--v:50.0%"]
    assert cells[2].get("class") == "none"


def test_drawings_of_nothing_are_drawn():
    assert shapes(line_chart([], [], "x", "y"), "circle") == []
    assert len(shapes(histogram([1.0], [0, 0], "x", "y"), "rect")) == 2
    assert shapes(heat_map([], [], [], "tokens"), "rect") == []


def test_no_label_is_markup():
    evil = "<script>1</script>"
    for drawing in (
        heat_map([evil], [evil], [[1.0]], evil),
        heat_map([evil], [evil], [[None]], evil),
        line_chart([evil], [Series(evil, "c1", [1.0])], evil, evil),
        histogram([1.0], [1, 2], evil, evil),
    ):
        assert "<script" not in drawing
        ElementTree.fromstring(drawing)


@pytest.mark.parametrize("value", [[], 3, "x", {"recipe": []}, {"recipe": {"name": {}}}, {"tensors": {"a": 1}}])
def test_a_manifest_of_wrong_types_is_one_line(l4pack, made, value):
    path = made / "l4pack-manifest.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, **value} if isinstance(value, dict) else value))
    ended = l4pack("report", made)
    assert ended.code in (0, 2), ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= 2
