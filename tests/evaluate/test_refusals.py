"""Refusals of an artifact and its original: probabilities held against whole models, statistics against scipy."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import whole_model
from scipy.stats import binomtest
from whole_model import one_thread  # noqa: F401

from l4pack.checkpoint.source import open_folder
from l4pack.evaluate import refusals
from l4pack.evaluate.refusal_text import refusal_lines, refusal_rows
from l4pack.evaluate.refusals import Requests, exact_mcnemar, paired_refusals, refusal_record, refusal_suite
from l4pack.evaluate.schema import Refusals
from l4pack.evaluate.talk import prompt_of
from l4pack.text.tokenizer import load_tokenizer

SHORT = refusal_suite().model_copy(
    update={"openings": ("I", "No", "Sorr"), "pairs": refusal_suite().pairs[:2], "title": "short"}
)


def test_the_suite_is_forty_pairs_in_the_public_domain():
    suite = refusal_suite()
    assert (suite.licence, len(suite.pairs)) == ("CC0-1.0", 40)
    prompts = suite.prompts()
    assert len(set(prompts)) == 80
    assert all(10 < len(text) < 120 and "\n" not in text for text in prompts)
    assert prompts[0] == suite.pairs[0].harmful
    assert prompts[40] == suite.pairs[0].harmless


def test_no_opening_is_the_beginning_of_another():
    """Or the probabilities of answers would be counted twice."""
    openings = refusal_suite().openings
    assert not [(a, b) for a in openings for b in openings if a != b and b.startswith(a)]


def probabilities_of_whole_model(model, tokenizer):
    """Of each request, the sum over openings of the product of their tokens' probabilities."""
    found = []
    for request in SHORT.prompts():
        prompt = list(prompt_of(tokenizer, [{"role": "user", "content": request}]).tokens)
        total = 0.0
        for opening in SHORT.openings:
            ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
            (logits,) = whole_model.logits(model, [prompt + ids])
            rows = whole_model.log_probabilities(logits[len(prompt) - 1 : -1])
            total += math.exp(float(rows.gather(1, torch.tensor(ids)[:, None]).sum()))
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture
def short(monkeypatch):
    """A suite of two pairs and three openings."""
    monkeypatch.setattr(refusals, "refusal_suite", lambda: SHORT)


def test_probabilities_are_those_of_whole_models(short, checkpoint, artifact, tmp_path, l4pack):
    source, made = checkpoint("scout"), shutil.copytree(artifact("int4-rtn"), tmp_path / "made")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 40)
    command = ["evaluate", made, "--text", text, "--sequence-length", 64, "--samples", 2, "--compute", "cpu"]
    ended = l4pack(*command, "--against", source, "--suite", "refusals")
    assert ended.code == 0, ended.err
    assert "2 harmful requests" in ended.out
    assert "refuses next to nothing" in ended.out
    (record,) = refusals_in(made)
    assert record["chat_template"] is True
    tokenizer = load_tokenizer(open_folder(source))
    theirs = probabilities_of_whole_model(whole_model.load(source), tokenizer)
    ours = probabilities_of_whole_model(whole_model.load(made, quantized=True, dtype=torch.bfloat16), tokenizer)
    for part, kind in ((slice(0, 2), "harmful"), (slice(2, 4), "harmless")):
        one = record[kind]
        assert one["probability_original"]["value"] == pytest.approx(float(theirs[part].mean()), rel=1e-4)
        assert one["probability_artifact"]["value"] == pytest.approx(float(ours[part].mean()), rel=1e-3)
        change = (ours - theirs)[part]
        assert one["probability_change"]["value"] == pytest.approx(float(change.mean()), rel=0.05, abs=1e-7)
        assert (one["refused_original"], one["refused_artifact"], one["p_value"]) == (0, 0, 1.0)
    alone = l4pack(*command, "--suite", "refusals")
    assert alone.code == 0, alone.err
    assert "0 of 2 harmful requests are more likely refused than not" in alone.out


def refusals_in(folder):
    from l4pack.evaluate.record import read_evaluations

    return [one["refusals"] for one in read_evaluations(folder)]


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (5, 0), (7, 2), (20, 20), (0, 40), (300, 200)])
def test_mcnemar_is_scipys(one, other):
    wanted = binomtest(one, one + other, 0.5).pvalue if one + other else 1.0
    assert exact_mcnemar(one, other) == pytest.approx(wanted, rel=1e-9)


def test_a_drift_is_told_by_probabilities_and_by_verdicts():
    original = torch.tensor([0.99, 0.97, 0.95, 0.9, 0.1, 0.02], dtype=torch.float64)
    artifact = torch.tensor([0.98, 0.4, 0.3, 0.2, 0.6, 0.01], dtype=torch.float64)
    found = paired_refusals(artifact, original)
    change = artifact - original
    assert found["probability_change"]["value"] == pytest.approx(float(change.mean()))
    assert found["probability_change"]["standard_error"] == pytest.approx(float(change.std()) / math.sqrt(6))
    assert (found["refused_original"], found["refused_artifact"]) == (4, 2)
    assert (found["refused_by_original_only"], found["refused_by_artifact_only"]) == (3, 1)
    assert found["p_value"] == pytest.approx(binomtest(1, 4, 0.5).pvalue)


def record_of(artifact, original):
    """A record of the short suite from probabilities of refusing, spread over the openings."""

    def likelihoods(values):
        return None if values is None else [math.log(value / 3) for value in values for _ in range(3)]

    return refusal_record(Requests(SHORT, chat_template=True), likelihoods(artifact), likelihoods(original))


def test_words_of_a_record():
    record = record_of([0.3, 0.9, 0.01, 0.02], [0.9, 0.9, 0.01, 0.02])
    Refusals.model_validate(record)
    assert refusal_rows(record)[0] == ("2 harmful requests", "90.00 %", "60.00 %", "-30.00 ± 30.00 %")
    assert (
        "original is more likely than not to refuse 2, the artifact 1; 1 the original alone" in refusal_lines(record)[0]
    )
    assert len(refusal_lines(record)) == 2


def test_a_model_that_never_refuses_is_called_so():
    record = record_of([1e-9] * 4, [1e-9] * 4)
    assert "none of its refusals can be lost" in refusal_lines(record)[-1]
    assert "plain text" in refusal_lines({**record, "chat_template": False})[-1]
    assert "none of its" not in " ".join(refusal_lines(record_of([1e-9] * 4, None)))


def test_half_a_pair_is_no_record():
    record = record_of([0.3] * 4, [0.9] * 4)
    del record["harmful"]["probability_change"]
    with pytest.raises(ValueError, match="together or not at all"):
        Refusals.model_validate(record)


def test_a_suite_that_is_not_there(artifact, l4pack):
    ended = l4pack("evaluate", artifact("int4-rtn"), "--suite", "riddles")
    assert ended.code == 2
    assert "there is no suite riddles" in ended.err
    assert "hint: choose refusals" in ended.err
