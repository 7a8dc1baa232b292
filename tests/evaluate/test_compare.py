"""A comparison is what single evaluations say, found in one pass over the original; differences are paired."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import whole_model
from limits import least_ram
from page import Page
from whole_model import one_thread  # noqa: F401

from l4pack.checkpoint.source import open_folder
from l4pack.errors import StoppedError
from l4pack.evaluate.compare import prepare_comparison
from l4pack.evaluate.inputs import EvaluationSettings
from l4pack.report.figure import with_error
from l4pack.stream.units import load_unit
from l4pack.stream.visitor import Progress
from l4pack.text.choice import TextChoice
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer

LENGTH, SAMPLES = 64, 5
RECIPES = ("int4-rtn", "fp8", "int4-rtn")
NAMES = ("four", "eight", "four-again")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("the quick brown fox jumps over a lazy dog, and nobody knows why it would; " * 12)
    return path


@pytest.fixture(scope="module")
def artifacts(artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return [Path(shutil.copytree(artifact(recipe), folder / name)) for recipe, name in zip(RECIPES, NAMES, strict=True)]


@pytest.fixture
def options(text):
    return ("--text", text, "--sequence-length", LENGTH, "--samples", SAMPLES, "--compute", "cpu")


@pytest.fixture
def compared(l4pack, checkpoint, artifacts, options):
    """`l4pack compare` of all artifacts, as JSON."""

    def run(*more):
        ended = l4pack("compare", *artifacts, "--against", checkpoint("scout"), *options, *more, "--json")
        assert ended.code == 0, ended.err
        return json.loads(ended.out)

    return run


def measured(folder):
    """An artifact's record without how it came about."""
    record = json.loads((folder / "accuracy.json").read_text())
    return {key: value for key, value in record.items() if key not in ("run", "resumed_layers", "evaluations")}


def test_each_artifact_gets_what_its_own_evaluation_says(compared, l4pack, checkpoint, artifacts, options, tmp_path):
    found = compared()
    together = [measured(folder) for folder in artifacts]
    for folder, record, one in zip(artifacts, together, found["artifacts"], strict=True):
        alone = shutil.copytree(folder, tmp_path / folder.name)
        (alone / "accuracy.json").unlink()
        ended = l4pack("evaluate", alone, "--against", checkpoint("scout"), *options, "--json")
        assert ended.code == 0, ended.err
        assert measured(alone) == record
        assert one["kl_mean"] == record["kl_mean"]
        assert one["artifact_bytes"] == sum(
            path.stat().st_size for path in folder.iterdir() if path.name != "accuracy.json"
        )
    assert [one["artifact"] for one in found["artifacts"]] == list(NAMES)
    assert [one["recipe"] for one in found["artifacts"]] == list(RECIPES)


def token_kl(source, made, text):
    """KL of every token and whether the likeliest token is the same, from two whole models."""
    choice = TextChoice(str(text), SAMPLES, LENGTH)
    ids = [list(one.tokens) for one in load_text(choice, load_tokenizer(open_folder(source)), 1024).sequences]
    original = whole_model.logits(whole_model.load(source), ids)
    changed = whole_model.logits(whole_model.load(made, quantized=True, dtype=torch.bfloat16), ids)
    pairs = [
        (whole_model.log_probabilities(ours[:-1]), whole_model.log_probabilities(theirs[:-1]))
        for ours, theirs in zip(original, changed, strict=True)
    ]
    return [(p.exp() * (p - q)).sum(1) for p, q in pairs], [(p.argmax(1) == q.argmax(1)).double() for p, q in pairs]


def test_differences_are_those_of_single_tokens(compared, checkpoint, artifacts, text):
    record = compared("--weights-only")  # FP8 would round inputs too, which whole models don't
    found = record["differences"]
    assert [(one["artifact"], one["than"]) for one in found] == [
        ("eight", "four"), ("four-again", "four"), ("four-again", "eight"),
    ]  # fmt: skip
    assert found[1]["kl_difference"] == found[1]["kl_difference_standard_error"] == 0
    kl, agrees = zip(*(token_kl(checkpoint("scout"), folder, text) for folder in artifacts[:2]), strict=True)
    by_sequence = [theirs - ours for ours, theirs in zip(*kl, strict=True)]
    values = torch.cat(by_sequence)
    # Fewer than 16 sequences: tokens of a sequence are independent by runs of 64.
    sums = torch.stack([(run - values.mean()).sum() for one in by_sequence for run in one.split(64)])
    error = math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / len(values)
    assert found[0]["kl_difference"] == pytest.approx(float(values.mean()), rel=1e-3)
    assert found[0]["kl_difference_standard_error"] == pytest.approx(error, rel=1e-3)
    four, eight = (float(torch.cat(same).mean()) for same in agrees)
    assert found[0]["top1_agreement_difference"] == pytest.approx(eight - four, abs=2 / len(values))
    assert found[0]["kl_difference_standard_error"] < record["artifacts"][0]["kl_standard_error"]


def test_every_unit_of_the_original_is_read_once(compared, checkpoint, monkeypatch):
    read = Counter()

    def counted(weights, unit):
        read[Path(weights.checkpoint.name).name, str(unit)] += 1
        return load_unit(weights, unit)

    monkeypatch.setattr("l4pack.stream.walk.load_unit", counted)
    compared()
    assert {name for name, _ in read} == {checkpoint("scout").name, *NAMES}
    assert set(read.values()) == {1}


def test_stopped_it_goes_on_to_the_same_numbers(checkpoint, artifacts, text, tmp_path):
    checkpoints, original = [open_folder(folder) for folder in artifacts[:2]], open_folder(checkpoint("scout"))
    settings = EvaluationSettings(tmp_path / "work", TextChoice(str(text), SAMPLES, LENGTH), compute="cpu")
    stop = threading.Event()

    def said(label):
        if label.startswith("layer 3 of"):
            stop.set()

    with pytest.raises(StoppedError):
        prepare_comparison(checkpoints, original, settings, Progress(label=said, stop=stop)).run()
    resumed = prepare_comparison(checkpoints, original, settings).run()
    whole = prepare_comparison(checkpoints, original, settings).run()
    assert [record.pop("resumed_layers") for one in (resumed, whole) for record in one.records] == [2, 2, 0, 0]
    for record in (*resumed.records, *whole.records):
        del record["run"]
    assert resumed == whole
    assert not settings.work.exists()


def test_people_see_what_sets_them_apart(l4pack, checkpoint, artifacts, options, tmp_path):
    out = tmp_path / "page.html"
    ended = l4pack("compare", *artifacts, "--against", checkpoint("scout"), *options, "--context", "1k", "--out", out)
    assert ended.code == 0, ended.err
    page = Page(out.read_text())
    assert page.open == []
    assert not {"script", "img", "link"} & set(page.tags)
    record = json.loads((artifacts[1] / "accuracy.json").read_text())
    assert {*NAMES, "fits", with_error(record["kl_mean"], record["kl_standard_error"])} <= {
        word.strip(" ✓") for word in page.words
    }
    lines = ended.out.splitlines()
    for name in NAMES:
        assert any(line.startswith(name) and "±" in line for line in lines)
    assert any(line.split()[:2] == ["eight", "four"] for line in lines)
    assert "On h100" in ended.out
    assert "not recorded" in ended.out


def test_a_plan_reads_no_weight(l4pack, checkpoint, artifacts, options):
    asked = ("compare", *artifacts, "--against", checkpoint("scout"), *options, "--dry-run")
    plan = json.loads(l4pack(*asked, "--json").out)["plan"]
    alone = json.loads(
        l4pack("evaluate", artifacts[0], "--against", checkpoint("scout"), *options, "--dry-run", "--json").out
    )["plan"]
    assert plan["tokens"] == alone["tokens"]
    assert alone["read_bytes"] < plan["read_bytes"] < 3 * alone["read_bytes"]
    assert plan["peak_ram_bytes"] > alone["peak_ram_bytes"]
    assert "predicted" in plan
    assert "of memory" in l4pack(*asked).out


def test_too_little_memory_is_said_before_the_first_layer(l4pack, checkpoint, artifacts, options):
    asked = ("compare", *artifacts, "--against", checkpoint("scout"), *options)
    assert l4pack(*asked, "--max-ram", least_ram(l4pack, *asked)).code == 0


@pytest.mark.parametrize(
    ("names", "against", "said"),
    [
        ((0,), True, "there is nothing to compare one artifact with"),
        ((0, 0), True, "an artifact is named twice"),
        ((0, 1), False, "compare needs the original"),
    ],
)
def test_what_is_no_comparison(l4pack, checkpoint, artifacts, names, against, said):
    original = ("--against", checkpoint("scout")) if against else ()
    ended = l4pack("compare", *(artifacts[number] for number in names), *original)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {said}")
    assert "hint: " in ended.err
