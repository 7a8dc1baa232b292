"""Every broken input of `bad/`: one line that says what and where, a hint, the exit code, and nothing that looks whole."""

from __future__ import annotations

import os
import re
import resource
import shutil

import pytest
from bad.checkpoints import SPOILERS
from bad.recipes import GOOD, RECIPES

from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.open_files import allow_open_files
from l4pack.errors import SourceError, UsageError
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe
from l4pack.work.folder import claim
from l4pack.work.progress import Shown


def check_refused(ended, code):
    """One line of error and one of hint on stderr, beside how far a job was; nothing on stdout."""
    assert ended.code == code, ended
    # A slow machine says how far it was before it found what is wrong.
    error, hint = (line for line in ended.err.splitlines() if not re.match(r"\w+: +\d+ %", line))
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
    "unknown option": (["--bogus"], 2, "no such option: --bogus(.|\n)*hint: see l4pack quantize --help"),
    "option without its value": (["--max-ram"], 2, "requires an argument"),
    "words for a number": (["--calibration-samples", "many"], 2, "invalid value for '--calibration-samples'"),
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
@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "", "line\nbreak\x1b[31m", "n" * 300])
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


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_work_is_never_put_where_something_else_lies(checkpoint, tmp_path, l4pack, kind):
    """The end of a job removes its work folder with all it holds."""
    work, precious = tmp_path / "out.partial", tmp_path / "elsewhere" / "precious"
    precious.parent.mkdir()
    precious.write_text("mine")
    if kind == "file":
        work.write_text("mine")
    elif kind == "folder":
        precious.parent.rename(work)
        precious = work / "precious"
    else:
        work.symlink_to(precious.parent)
    check_refused(l4pack("quantize", checkpoint("scout"), "--recipe", "int4-rtn", "--out", tmp_path / "out"), 2)
    assert precious.read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_file_slipped_into_the_work_does_not_become_part_of_the_artifact(checkpoint, tmp_path, l4pack):
    claim(tmp_path / "out.partial", "quantize")
    folder = tmp_path / "out.partial" / "artifact"
    folder.mkdir()
    (folder / "slipped-in.py").write_text("x")
    command = ("quantize", checkpoint("scout"), "--recipe", "int4-rtn", "--out", tmp_path / "out")
    check_refused(l4pack(*command), 2)
    assert l4pack(*command, "--restart").code == 0
    assert not (tmp_path / "out" / "slipped-in.py").exists()


@pytest.mark.parametrize("line", ['{"finished": 5}', '{"digests": []}', '{"finished": [[]]}', '{"digests": {"a": 1}}'])
def test_a_journal_somebody_wrote_in(checkpoint, tmp_path, l4pack, line):
    plan = make_plan(open_source(str(checkpoint("scout"))), load_recipe("int4-rtn"))
    claim(tmp_path / "out.partial", "quantize")
    path = tmp_path / "out.partial" / "journal.jsonl"
    Journal(path, plan.identity()).close()
    with path.open("a") as stream:
        stream.write(f"{line}\n")
    assert l4pack("quantize", checkpoint("scout"), "--recipe", "int4-rtn", "--out", tmp_path / "out").code == 0


def test_a_source_changed_while_the_job_ran(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("scout"), tmp_path / "source")
    plan = make_plan(open_source(str(source)), load_recipe("int4-rtn"))
    touched = iter([source / "model.safetensors"])

    def touch(_: int) -> None:
        for path in touched:
            os.utime(path, ns=(0, 0))

    with pytest.raises(SourceError, match="was changed while the job ran"):
        run_plan(plan, tmp_path / "out", shown=Shown(touch))
    assert not (tmp_path / "out").exists()


def test_a_folder_named_in_bytes_that_are_no_text(checkpoint, tmp_path, l4pack):
    source = shutil.copytree(checkpoint("scout"), tmp_path / os.fsdecode(b"llama-\xff"))
    command = ("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "out", "--json")
    assert l4pack(*command).code == 0


def test_more_shards_than_a_process_may_open(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    allow_open_files(100)
    assert asked == []
    allow_open_files(2000)
    assert asked == [(2256, 4096)]
    with pytest.raises(UsageError, match="5,000 files would be open"):
        allow_open_files(5000)
