"""An evaluated artifact, and pages made of it."""

from __future__ import annotations

import shutil

import pytest


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
