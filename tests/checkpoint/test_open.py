"""A folder on this machine or a repository on the Hub: what looks like a path is one, and never a download."""

from __future__ import annotations

import json
import shutil

import pytest

from l4pack.artifact.manifest import source_record
from l4pack.budget.checks import Means, run_checks
from l4pack.checkpoint import hub
from l4pack.checkpoint.open import hub_repository, open_source
from l4pack.errors import SourceError

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def means(opening):
    """Checks of memory alone."""
    return Means(opening, lambda *_: {}, lambda *_: ())


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The repositories asked for, in a folder with `out` in it; each answers that it is not there."""
    seen = []

    def answer(repo_id, revision=None, **_):
        seen.append((repo_id, revision))
        raise SourceError(f"{repo_id} was asked for", hint="this is the Hub")

    monkeypatch.setattr(hub, "open_hub", answer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return seen


PATHS = ["out/scout-int4", "models/scout", "Checkpoints/step-100", "outputs/x@main", "data/scout-int4", "./scout/int4", "../scout/int4", "/scout/int4", "~/scout", "a/b/c", "org/name/", "org\\name",
         "org/config.json", "scouts/model.safetensors", "out/x@main", "out/", ".", "..\\x", "a/b/c@main"]  # fmt: skip
REPOSITORIES = {
    "org/name": ("org/name", None),
    "org/name@v1": ("org/name", "v1"),
    "org/name@refs/pr/1": ("org/name", "refs/pr/1"),
    "hf://org/name": ("org/name", None),
    "hf://out/scout-int4@main": ("out/scout-int4", "main"),
}
COMMANDS = {
    "inspect": ["inspect", "{}"],
    "plan": ["plan", "{}"],
    "quantize": ["quantize", "{}", "--out", "made"],
    "build": ["build", "{}", "--out", "made"],
    "budget": ["budget", "{}", "--device", "h100", "--context", "1024"],
    "fit": ["fit", "{}", "--max-bytes", "65GB"],
    "measure": ["measure", "{}"],
    "coverage": ["coverage", "{}"],
    "licence": ["licence", "{}"],
}


@pytest.mark.parametrize("text", PATHS)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(asked, text):
    with pytest.raises(SourceError) as caught:
        open_source(text)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert not asked


@pytest.mark.parametrize(("text", "repository"), REPOSITORIES.items())
def test_what_is_a_repository(asked, text, repository):
    assert hub_repository(text) == repository
    with pytest.raises(SourceError, match="was asked for"):
        open_source(text)
    assert asked == [repository]


@pytest.mark.parametrize("text", ["hf://name", "hf://a/b/c", "hf:///etc/passwd", "hf://", "https://huggingface.co/a/b"])
def test_what_is_no_repository(asked, text):
    with pytest.raises(SourceError):
        open_source(text)
    assert not asked


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_keeps_the_rule(asked, l4pack, command):
    ended = l4pack(*(part.format("out/scout-int4") for part in command))
    assert (ended.code, ended.out) == (4, "")
    assert "there is no out/scout-int4 on this machine" in ended.err
    assert "hf://out/scout-int4" in ended.err
    assert not asked


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_an_original_that_is_not_there(asked, l4pack, artifact, command):
    ended = l4pack(command, artifact("int4-rtn"), "--against", "out/scout")
    assert ended.code == 4
    assert "there is no out/scout on this machine" in ended.err
    assert not asked


def test_a_folder_of_a_known_models_name_is_that_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(checkpoint("scout"), tmp_path / "llama-4-scout").parent)
    assert not open_source("llama-4-scout").bare


CHECK = {"name": "one", "device": "h100", "context": 1024}


@pytest.mark.parametrize(
    ("subject", "error"),
    [({"artifact": "org/name"}, "there is no artifact"), ({"artifact": "hf://org/name"}, "there is no artifact"),
     ({"artifact": "llama-4-scout"}, "there is no artifact"), ({"artifact": "x\0y"}, "no path"),
     ({"source": "out/scout"}, "there is no out/scout"), ({"source": "../x"}, r"there is no \.\./x"),
     ({"hub": "name"}, "hf://name is not"), ({"hub": "../x/y"}, "is not hf://")],
)  # fmt: skip
def test_a_check_never_takes_a_strangers_repository(tmp_path, asked, subject, error):
    (tmp_path / "l4pack-budget.yaml").write_text(json.dumps({"checks": [{**CHECK, **subject}]}))
    (result,) = run_checks(tmp_path / "l4pack-budget.yaml", means(lambda source, _: open_source(source)))
    assert not result.passed
    assert result.error is not None
    assert result.error.exit_code == 4
    assert result.error.hint
    with pytest.raises(SourceError, match=error):
        raise result.error
    assert not asked


@pytest.mark.parametrize(
    ("subject", "opened"),
    [({"hub": "org/name@v1"}, "hf://org/name@v1"), ({"hub": "hf://org/name"}, "hf://org/name"),
     ({"source": "org/name"}, "hf://org/name"), ({"source": "llama-4-scout"}, "llama-4-scout"), ({"source": "demo"}, "demo")],
)  # fmt: skip
def test_what_a_check_opens(tmp_path, asked, monkeypatch, subject, opened):
    """Its paths are relative to its folder, wherever the command runs."""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "org").mkdir()
    (tmp_path / "deploy" / "l4pack-budget.yaml").write_text(json.dumps({"checks": [{**CHECK, **subject}]}))
    seen = []

    def opening(source, recipe):
        seen.append(source)
        raise SourceError("no")

    run_checks(tmp_path / "deploy" / "l4pack-budget.yaml", means(opening))
    assert seen == [opened]


@pytest.fixture
def cached(checkpoint, tmp_path):
    """A repository's folder in the Hub's cache, as huggingface_hub lays it out."""
    root = tmp_path / "models--meta-llama--Llama-4-Tiny"
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint("scout", shards=3).iterdir())):
        shutil.copy(path, root / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return root


@pytest.mark.parametrize("inside", ["", "snapshots", f"snapshots/{COMMIT}"])
def test_a_repositorys_folder_in_the_hubs_cache(cached, monkeypatch, inside):
    wanted = ("meta-llama/Llama-4-Tiny", COMMIT)
    record = source_record(open_source(str(cached / inside)))
    assert (record["repository"], record["revision"]) == wanted
    monkeypatch.chdir(cached / inside)
    record = source_record(open_source("."))
    assert (record["repository"], record["revision"]) == wanted


def test_which_snapshot_of_a_cache_folder(cached):
    main = cached / "refs" / "main"
    shutil.copytree(cached / "snapshots" / COMMIT, cached / "snapshots" / OTHER, symlinks=True)
    assert open_source(str(cached)).name.endswith(COMMIT)
    main.write_text(OTHER + "\n")
    assert open_source(str(cached)).name.endswith(OTHER)
    for text in ("../../../etc", "e" * 40, "", "\0" * 40):
        main.write_text(text)
        with pytest.raises(SourceError, match=f"2 snapshots and no main: {COMMIT}, {OTHER}"):
            open_source(str(cached))
    main.unlink()
    shutil.rmtree(cached / "snapshots" / COMMIT)
    assert open_source(str(cached)).name.endswith(OTHER)
    shutil.rmtree(cached / "snapshots" / OTHER)
    with pytest.raises(SourceError, match="holds no snapshot"):
        open_source(str(cached))
