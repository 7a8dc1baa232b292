"""Every broken input of `bad/`: one line that says what and where, a hint, the exit code, and nothing that looks whole."""

from __future__ import annotations

import os
import re
import shutil

import pytest
from bad.checkpoints import SPOILERS
from bad.recipes import GOOD, RECIPES


def check_refused(ended, code):
    """One line of error and one of hint on stderr, nothing on stdout."""
    assert ended.code == code, ended
    error, hint = ended.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert len(hint) > 10
    assert ended.out == ""


@pytest.mark.parametrize("bad", SPOILERS.values(), ids=SPOILERS)
def test_a_bad_checkpoint(checkpoint, tmp_path, l4pack, bad):
    source = shutil.copytree(checkpoint("scout", shards=3), tmp_path / "source")
    bad.spoil(source)
    ended = l4pack("quantize", source, "--recipe", bad.recipe, "--out", tmp_path / "out")
    check_refused(ended, 4)
    assert re.search(bad.message, ended.err), ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "message"), RECIPES.values(), ids=RECIPES)
def test_a_bad_recipe(checkpoint, tmp_path, l4pack, text, message):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    source = checkpoint("scout", **{"intermediate_size": 96} if "divide" in message else {})
    ended = l4pack("quantize", source, "--recipe", recipe, "--out", tmp_path / "out")
    check_refused(ended, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert re.search(message, ended.err), ended.err


def test_the_recipe_that_is_spoiled_is_good(checkpoint, tmp_path, l4pack):
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert l4pack("plan", checkpoint("scout"), "--recipe", tmp_path / "mine.yaml").code == 0


ARGUMENTS = {
    "memory too small": (["--max-ram", "100MB"], 3, "the job needs .* the limit is 100.00 MB"),
    "no memory": (["--max-ram", "0"], 3, "the limit is 0 B"),
    "size in words": (["--max-ram", "lots"], 2, "'lots' is not a size"),
    "negative size": (["--shard-size=-1GB"], 2, "'-1GB' is not a size"),
    "unknown unit": (["--max-ram", "4GX"], 2, "'4GX' is not a size"),
    "size without end": (["--max-ram", "9" * 400], 2, "is not a size"),
    "empty size": (["--max-ram", ""], 2, "'' is not a size"),
    "unknown recipe": (["--recipe", "int4-rnt"], 2, "no recipe is named 'int4-rnt'(.|\n)*did you mean int4-rtn"),
    "missing recipe file": (["--recipe", "mine.yaml"], 2, "no recipe is named 'mine.yaml'"),
    "unknown place to compute": (["--compute", "abacus"], 2, "'abacus' is not a place to compute"),
    "CUDA that is not there": (["--compute", "cuda:9"], 2, "this machine has no cuda:9"),
}


@pytest.mark.parametrize(("options", "code", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_bad_option(checkpoint, tmp_path, l4pack, options, code, message):
    ended = l4pack("quantize", checkpoint("scout"), "--out", tmp_path / "out", *options)
    check_refused(ended, code)
    assert re.search(message, ended.err), ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["inspect", "plan", "quantize"])
@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "", "line\nbreak\x1b[31m"])
def test_a_source_that_is_none(tmp_path, l4pack, monkeypatch, command, source):
    monkeypatch.chdir(tmp_path)
    options = ["--out", "out"] if command == "quantize" else []
    ended = l4pack(command, source, *options)
    check_refused(ended, 4)
    assert "\x1b" not in ended.err
    assert not list(tmp_path.iterdir())


def test_a_configuration_cannot_be_quantized(l4pack, tmp_path):
    check_refused(l4pack("quantize", "llama-4-scout", "--out", tmp_path / "out"), 4)
    assert not list(tmp_path.iterdir())


def test_a_pipe_among_the_shards_does_not_block(checkpoint, tmp_path, l4pack):
    source = shutil.copytree(checkpoint("scout"), tmp_path / "source")
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")
    check_refused(l4pack("quantize", source, "--out", tmp_path / "out"), 4)
