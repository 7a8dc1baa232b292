"""The report is one page that needs nothing else, shows what was measured, and trusts no text it is given."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from large_record import EXPERTS, LAYERS, large
from page import Page
from whole_model import one_thread  # noqa: F401

from l4pack.report.figure import with_error
from l4pack.report.making import a_line_each

pytest_plugins = ["report_fixtures"]


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
    assert with_error(record["kl_mean"], record["kl_standard_error"]) in words
    agreement = with_error(100 * record["top1_agreement"], 100 * record["top1_agreement_standard_error"])
    assert f"{agreement} %" in words
    assert f"{record['perplexity_reference']:.3f} → {record['perplexity_artifact']:.3f}" in words
    assert record["text"]["sha256"] in words
    assert record["run"]["versions"]["torch"] in words
    worst = record["worst"][0]
    assert worst["block"].replace("_", " ") in words
    gates = text[text.index("<h2>Quality gates") : text.index("<h2>Serve it")]
    assert gates.count("✗ missed") == gates.count("✓ passed") == 1
    assert "recipe int4-rtn" in words


def test_a_sample_is_marked_from_where_the_models_part(page, made):
    record = json.loads((made / "accuracy.json").read_text())
    said = [{"text": text, "tokens": [1], "ended": True} for text in ("It is <b>", "It is so")]
    answer = {"prompt": "Why?", "artifact": said[0], "original": said[1], "first_difference": 0}
    (made / "accuracy.json").write_text(json.dumps({**record, "sample": {"tokens": 16, "answers": [answer]}}))
    assert "It is <mark>&lt;b&gt;</mark>" in page(made)
    assert "It is <mark>so</mark>" in page(made)


def test_every_expert_is_in_the_drawings_and_in_the_tables(page, made):
    record = json.loads((made / "accuracy.json").read_text())
    text = page(made)
    experts = [expert for layer in record["layers"] for expert in layer.get("experts", ())]
    cells = re.findall(r'<path class="(?:error\d|tokens\d|none)" d="([^"]+)"', text)
    assert sum(path.count("z") for path in cells) == 2 * len(experts)
    table = " ".join(Page(text).words).split()
    for expert in experts:
        if expert["tokens"]:
            error = f"{expert['error']:.3g}"
            assert (error if expert["tokens"] >= 32 else f"({error})") in table


def test_every_chart_has_its_numbers(page, made):
    text = page(made)
    figures = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(figures) == 7
    for figure in figures:
        assert figure.count("<details>") == 1
        assert figure.count("<tr>") > 1
    assert "tokens that the router sent to the expert" in text
    assert text.count("<details>") == len(figures) + 2  # memory and bytes, which are bars


def test_what_is_known_of_the_artifact_is_told(page, made):
    words = " ".join(" ".join(Page(page(made)).words).split())
    for told in (
        "Page of 20", "Precision by role", "l4pack quantize", "--recipe int4-rtn", "vllm serve Llama-tiny-Int4",
        "runtime plans", "perplexity, original → artifact: times", "in order", "duties open", "W4A16",
    ):  # fmt: skip
        assert told in words, told


def test_every_byte_is_held_against_a_source_where_one_is_named(page, made, checkpoint):
    words = " ".join(" ".join(Page(page(made, "--against", checkpoint("maverick"))).words).split())
    assert "Every byte ✓ in order" in words
    assert re.search(r"Held against .*tiny-maverick: \d+ quantized matrices, \d+ other tensors bit for bit", words)
    plain = " ".join(" ".join(Page(page(made)).words).split())
    assert "from their headers" in plain


def test_calibration_is_told():
    from l4pack.report.making import _calibration

    told = dict(_calibration({
        "text": {"source": "words", "sequences": 4, "sequence_length": 2048, "tokens": 8000},
        "routed_tokens": {"1": [0, 5], "3": [7, 9]},
        "matrices": {
            "a": {"method": "rtn", "reason": "not definite", "error": 1.0},
            "b": {"method": "gptq", "borrowed_tokens": 3, "error": 1.0},
            "c": {"input_amax": 1.0},
        },
    }))  # fmt: skip
    assert told["text"] == "words, 4 sequences of at most 2,048 tokens, 8,000 tokens in all"
    assert told["cold experts"] == "1 of 4 saw no token: layer 1 expert 0"
    assert told["fewest tokens"] == "0, in layer 1 expert 0"
    assert told["fallbacks"] == "1 of 2 matrices are rounded to nearest instead: a (not definite)"
    assert told["borrowed tokens"].startswith("1 matrices")


def test_the_page_of_a_model_as_large_as_maverick_is_below_a_megabyte(page, made):
    record = large(json.loads((made / "accuracy.json").read_text()))
    (made / "accuracy.json").write_text(json.dumps(record))
    text = page(made)
    assert 300_000 < len(text.encode()) < 1_000_000
    cells = re.findall(r'<path class="(?:error\d|tokens\d|none)" d="([^"]+)"', text)
    assert sum(path.count("z") for path in cells) == 2 * LAYERS * EXPERTS


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


@pytest.mark.parametrize("value", [[], 3, "x", {"recipe": []}, {"recipe": {"name": {}}}, {"tensors": {"a": 1}}])
def test_a_manifest_of_wrong_types_is_one_line(l4pack, made, value):
    path = made / "l4pack-manifest.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, **value} if isinstance(value, dict) else value))
    ended = l4pack("report", made)
    assert ended.code in (0, 2), ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= 2


def test_options_stand_on_lines_of_their_own_but_for_what_is_quoted():
    words = ["l4pack", "quantize", "a b --c", "--text", "it's --not one", "--out", "x"]
    shown = a_line_each(shlex.join(words))
    assert [line.split()[0] for line in shown.splitlines()] == ["l4pack", "--text", "--out"]
    assert shlex.split(shown.replace("\\\n", "")) == words
