"""`l4pack fit`, `build --fit` and the report's frontier, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from page import Page
from synthetic_sensitivity import synthetic

from l4pack.checkpoint.open import open_source
from l4pack.fit.record import FitRecord, read_fit
from l4pack.plan.plan import make_plan
from l4pack.recipe import load_recipe
from l4pack.report.fitted import frontier_figure

KEYS = {
    "weight_bytes", "artifact_bytes", "predicted_kl", "gap", "optimal", "choice", "frontier", "recipe", "stand_in", "runtime",
}  # fmt: skip
CHEAP = ("int4-rtn", "int8", "fp8")  # nothing to calibrate


@pytest.fixture
def at(checkpoint, tmp_path, monkeypatch):
    """A tiny Maverick and its measurement, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    source = checkpoint("maverick")
    synthetic(open_source(str(source)), options=CHEAP).write(tmp_path / "s.json")
    return source


def test_json_says_what_the_recipe_weighs(l4pack, at):
    ended = l4pack("fit", at, "--bits", "6.5", "--sensitivity", "s.json", "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found.keys() >= KEYS
    plan = make_plan(open_source(str(at)), load_recipe("fit.yaml"))
    assert (found["weight_bytes"], found["artifact_bytes"]) == (plan.weight_bytes, plan.artifact_bytes)
    assert found["predicted_kl"] == pytest.approx(sum(one["kl"] for one in found["choice"]))
    assert {(one["layer"], one["role"]) for one in found["choice"]} == {
        (linear.layer, linear.role.value) for linear, _ in plan.assigned
    }
    assert all(point.keys() >= {"bytes", "predicted_kl"} for point in found["frontier"])
    assert (found["optimal"], found["stand_in"], found["runtime"]) == (True, False, "vllm")
    assert found["recipe"] == "fit.yaml"


def test_people_see_choices_bytes_and_the_recipe(l4pack, at):
    ended = l4pack("fit", at, "--bits", "6.5", "--sensitivity", "s.json", "--out", "mine.yaml")
    assert ended.code == 0
    for words in (
        "Share of KL",
        "What bytes buy",
        "best of +1 %",
        "fp8 for all",
        "proven optimal",
        "--recipe mine.yaml",
    ):
        assert words in ended.out
    assert yaml.safe_load(Path("mine.yaml").read_text())["name"] == "mine"


def test_the_recipe_runs(l4pack, at):
    assert l4pack("fit", at, "--bits", "6.5", "--sensitivity", "s.json").code == 0
    ended = l4pack("quantize", at, "--recipe", "fit.yaml", "--out", "made", "--json")
    assert ended.code == 0, ended.err
    planned = json.loads(l4pack("plan", at, "--recipe", "fit.yaml", "--json").out)
    assert sum(path.stat().st_size for path in Path("made").iterdir()) == planned["artifact_bytes"]
    assert l4pack("verify", "made", "--against", at).code == 0


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A measurement of the demo whose MLPs can be solved, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    synthetic(open_source("demo"), options=("int4", "int8", "fp8")).write(tmp_path / "s.json")


def test_best_solves_mlps_of_four_bits_and_fp8_for_the_models_end(l4pack, demo):
    asked = ["fit", "demo", "--bits", "5", "--sensitivity", "s.json", "--json"]
    plain, best = json.loads(l4pack(*asked).out), json.loads(l4pack(*asked, "--best", "--out", "best.yaml").out)
    assert plain["choice"] == best["choice"]
    made, before = load_recipe("best.yaml"), load_recipe("fit.yaml")
    solved = {name for name, scheme in made.schemes.items() if scheme.gptq is not None and scheme.gptq.two_sided}
    assert solved == {"int4-best", "fp8-best"}
    assert solved.isdisjoint(rule.scheme for rule in made.rules if "attention" in rule.roles)
    assert made.calibration.gradient_samples == 64
    assert {"int8"} <= set(made.schemes) - solved <= set(before.schemes) - {"int4"}
    planned = [json.loads(l4pack("plan", "demo", "--recipe", name, "--json").out) for name in ("best.yaml", "fit.yaml")]
    assert planned[0]["weight_bytes"] == planned[1]["weight_bytes"]
    assert planned[0]["artifact_bytes"] == best["artifact_bytes"]
    assert "solved for the model's end" in Path("best.yaml").read_text()


def test_best_solves_mlps_of_fp8_too_which_else_are_rounded(l4pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic(open_source("demo"), options=("fp8",)).write(tmp_path / "s.json")
    asked = ["fit", "demo", "--bits", "8.1", "--sensitivity", "s.json", "--json"]
    plain, best = json.loads(l4pack(*asked).out), json.loads(l4pack(*asked, "--best", "--out", "best.yaml").out)
    assert plain["choice"] == best["choice"]
    made, before = load_recipe("best.yaml"), load_recipe("fit.yaml")
    assert before.calibration is None
    assert made.schemes["fp8-best"].gptq == load_recipe("fp8-best").schemes["fp8"].gptq
    assert not any("attention" in rule.roles for rule in made.rules if rule.scheme == "fp8-best")
    planned = json.loads(l4pack("plan", "demo", "--recipe", "best.yaml", "--json").out)
    assert planned["artifact_bytes"] == best["artifact_bytes"]


def test_a_shipped_stand_in_is_used_and_named_loudly(l4pack, at):
    ended = l4pack("fit", at, "--bits", "10", "--json")
    assert ended.code == 0
    assert ended.err.startswith("warning: the sensitivities are a stand-in's, measured on ")
    assert json.loads(ended.out)["stand_in"] is True
    assert "stand-in" in load_recipe("fit.yaml").title


@pytest.mark.parametrize("name", ["a.png", "b.SVG"])
def test_charts_are_the_same_every_time(l4pack, at, name):
    drawn = set()
    for _ in range(2):
        ended = l4pack("fit", at, "--bits", "6.5", "--sensitivity", "s.json", "--chart", name)
        assert ended.code == 0, ended.err
        drawn.add(Path(name).read_bytes())
    (data,) = drawn
    if name.endswith("png"):
        assert data.startswith(b"\x89PNG")
    else:
        assert ElementTree.fromstring(data).tag.endswith("svg")
        assert b"predicted KL, nats" in data
        assert b"<dc:date>" not in data


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--bits", "3"], 3, "the smallest artifact that the runtime can load takes "),
        (["--max-bytes", "1kB"], 3, "the smallest artifact that the runtime can load is "),
        ([], 2, "one budget: none is given"),
        (["--bits", "5", "--device", "h100"], 2, "--bits and --device"),
        (["--bits", "5", "--context", "9"], 2, "--context goes with --device"),
        (["--bits", "5", "--runtime", "x"], 2, "no runtime is named 'x'"),
        (["--bits", "5", "--chart", "a.gif"], 2, "a chart is .png or .svg"),
        (["--bits", "5", "--out", "fit.json"], 2, "ends in .yaml"),
        (["--bits", "5", "--sensitivity", "none.json"], 2, "none.json: No such file"),
        (["--max-bytes", "much"], 2, "'much' is not a size"),
        (["--bits", "17"], 2, "nothing needs to be quantized"),
    ],
)
def test_what_goes_wrong_writes_nothing(l4pack, at, tmp_path, options, code, says):
    given = [] if "--sensitivity" in options else ["--sensitivity", "s.json"]
    ended = l4pack("fit", at, *given, *options)
    assert ended.code == code
    assert says in ended.err
    assert "hint: " in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json"]


def test_build_fits_first_and_goes_on_where_it_stopped(l4pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic(open_source("demo"), options=CHEAP).write(tmp_path / "s.json")
    command = ["build", "demo", "--out", "made", "--fit", "--bits", "6.5", "--sensitivity", "s.json", "--skip-evaluate"]
    first = l4pack(*command, "--json")
    assert first.code == 0, first.err
    steps = json.loads(first.out)
    assert next(iter(steps)) == "fit"
    assert steps["fit"]["outcome"] == "done"
    assert steps["fit"]["artifact_bytes"] == steps["plan"]["artifact_bytes"]
    recipe, record = Path("made.recipe.yaml").read_text(), Path("made.fit.json").read_text()
    again = json.loads(l4pack(*command, "--json").out)
    assert (again["fit"]["outcome"], again["quantize"]["outcome"]) == ("kept", "kept")
    assert (Path("made.recipe.yaml").read_text(), Path("made.fit.json").read_text()) == (recipe, record)
    Path("made.recipe.yaml").write_text(recipe + "# changed by hand\n")
    mended = json.loads(l4pack(*command, "--json").out)
    assert mended["fit"]["outcome"] == "done"
    assert Path("made.recipe.yaml").read_text() == recipe
    page = l4pack("report", "made", "--out", "page.html")
    assert page.code == 0
    text = Path("page.html").read_text()
    assert "What bytes buy" in Page(text).words
    assert "proven optimal" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fit", "--recipe", "int4"], "chooses the recipe itself"),
        (["--fit"], "one budget"),
        (["--bits", "5"], "go with --fit"),
        (["--max-bytes", "5GB"], "go with --fit"),
        (["--best"], "--recipe int4-best"),
    ],
)
def test_build_options_that_make_no_sense(l4pack, at, options, says):
    ended = l4pack("build", at, "--out", "made", *options)
    assert ended.code == 2
    assert says in ended.err


def test_a_report_is_given_what_fit_said(l4pack, at, artifact, tmp_path):
    said = l4pack("fit", at, "--bits", "6.5", "--sensitivity", "s.json", "--json").out
    (tmp_path / "said.json").write_text(said)
    made = artifact("int4-rtn", "maverick")
    assert l4pack("report", made, "--out", "page.html", "--fit", "said.json").code == 0
    assert "What bytes buy" in Path("page.html").read_text()
    assert l4pack("report", made, "--out", "plain.html").code == 0
    assert "What bytes buy" not in Path("plain.html").read_text()
    (tmp_path / "bad.json").write_text('{"model": 3}')
    for name in ("bad.json", "absent.json"):
        ended = l4pack("report", made, "--out", "x.html", "--fit", name)
        assert (ended.code, "is not what fit says" in ended.err) == (2, True)


def test_names_in_a_record_do_not_reach_the_page_as_markup(l4pack, at, artifact, tmp_path):
    said = json.loads(l4pack("fit", at, "--bits", "6.5", "--sensitivity", "s.json", "--json").out)
    said["budget"] = said["uniform"][0]["name"] = said["choice"][0]["option"] = "<script>alert(1)</script>"
    (tmp_path / "said.json").write_text(json.dumps(said))
    assert l4pack("report", artifact("int4-rtn", "maverick"), "--out", "page.html", "--fit", "said.json").code == 0
    assert "script" not in Page(Path("page.html").read_text()).tags


def test_a_record_reads_back_as_it_was(l4pack, at, tmp_path):
    said = l4pack("fit", at, "--bits", "6.5", "--sensitivity", "s.json", "--json").out
    record = FitRecord.model_validate_json(said)
    (tmp_path / "again.json").write_bytes(record.to_json())
    assert read_fit(tmp_path / "again.json") == record


def test_the_frontier_has_a_row_for_every_point_and_a_mark_above_zero():
    sizes = [
        {"name": "", "bytes": size, "predicted_kl": kl}
        for size, kl in ((10**9, 0.1), (2 * 10**9, 0.01), (3 * 10**9, 0.0))
    ]
    fitted = {"weight_bytes": 2 * 10**9, "predicted_kl": 0.01, "frontier": sizes, "uniform": []}
    alone = frontier_figure(fitted, None)
    assert [row[1] for row in alone.rows] == ["1.00 GB", "2.00 GB", "3.00 GB", "2.00 GB"]
    assert "weights, GB" in alone.drawing
    assert "measured" not in alone.drawing
    assert 'class="speck predicted" d="M45 0h0M955 1000h0"' in alone.drawing
    measured = {"kl_mean": 0.02, "kl_standard_error": 0.001, "artifact_weight_bytes": 2 * 10**9}
    both = frontier_figure(fitted, measured)
    assert both.rows[-1] == ("measured: chosen", "2.00 GB", "0.0200 ± 0.0010")
    assert "whisker measured" in both.drawing
    assert "measured</span>" in both.drawing
    frontier_figure({**fitted, "frontier": [], "predicted_kl": 0.0}, None)
