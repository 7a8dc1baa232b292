"""`l4pack verify`: exit codes, JSON, and a report people can read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import damage
import pytest
import torch

from l4pack.checkpoint.source import open_folder
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text-only source, complete but for its chat template, and its artifact."""
    folder = tmp_path_factory.mktemp("command")
    source = Path(shutil.copytree(checkpoint("text"), folder / "source"))
    run_plan(make_plan(open_folder(source), load_recipe("int4-rtn")), folder / "artifact")
    return source, folder / "artifact"


@pytest.fixture
def artifact(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return damage.unsigned(Path(shutil.copytree(made[1], tmp_path / "artifact")))


def spoil(folder: Path) -> None:
    """Two experts without scales above zero, and experts left in BF16."""
    prefix = "model.layers.1.feed_forward.experts."
    damage.put(f"{prefix}0.up_proj.weight_scale", damage.filled(0.0))(folder)
    damage.in_bfloat16("model.layers.2.feed_forward.experts.")(folder)


def test_a_good_artifact_says_so_in_one_line(made: tuple[Path, Path], l4pack: Callable) -> None:
    source, folder = made
    ended = l4pack("verify", folder, "--against", source)
    assert ended.code == 0, ended.out
    assert ended.out.splitlines()[0] == f"{folder}: verified, nothing found"
    assert "within half a step" in ended.out
    assert ended.err == ""


def test_findings_are_grouped_and_counted(artifact: Path, l4pack: Callable) -> None:
    spoil(artifact)
    ended = l4pack("verify", artifact)
    assert ended.code == 1
    assert ended.out.splitlines()[0] == f"{artifact}: not verified, 13 errors"
    assert "ignore x 12: the file and the stanza disagree about what is quantized" in ended.out
    assert "and 9 more (--json lists all)" in ended.out
    assert "experts.0.up_proj.weight_scale: 128 of 128 scales are not above zero" in ended.out


def test_json_holds_every_finding_and_nothing_else(artifact: Path, l4pack: Callable) -> None:
    spoil(artifact)
    ended = l4pack("verify", artifact, "--json")
    record = json.loads(ended.out)
    assert ended.code == 1
    assert record["ok"] is False
    assert record["errors"] == len(record["findings"]) == 13
    assert all({"rule", "where", "message", "level"} == set(finding) for finding in record["findings"])
    assert record["checked"]["matrices"] > 0
    assert record["checked"]["matrices_compared"] == 0


def test_json_of_a_good_artifact(made: tuple[Path, Path], l4pack: Callable) -> None:
    source, folder = made
    ended = l4pack("verify", folder, "--against", source, "--sample", 3, "--json")
    record = json.loads(ended.out)
    assert (ended.code, record["ok"], record["findings"]) == (0, True, [])
    assert record["checked"]["matrices_compared"] == 3
    assert record["checked"]["compared_sample_of"] == record["checked"]["matrices"]


def test_warnings_fail_only_when_strict(artifact: Path, l4pack: Callable) -> None:
    (artifact / "generation_config.json").unlink()
    loose, strict = l4pack("verify", artifact), l4pack("verify", artifact, "--strict")
    assert (loose.code, strict.code) == (0, 1)
    assert loose.out.splitlines()[0].endswith("verified, 1 warning")
    assert strict.out.splitlines()[0].endswith("not verified, 1 warning")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 4, "nowhere is not a folder"),
        ([".", "--against", "nowhere"], 4, "nowhere is neither a folder"),
        ([".", "--sample", "3"], 2, "needs --against"),
        ([".", "--sample", "0", "--against", "."], 2, "--sample"),
    ],
)
def test_what_can_not_be_checked(
    arguments: list[str], code: int, says: str, l4pack: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = l4pack("verify", *arguments)
    assert ended.code == code
    assert says in ended.err


def test_a_configuration_alone_is_no_source(made: tuple[Path, Path], l4pack: Callable) -> None:
    ended = l4pack("verify", made[1], "--against", made[0] / "config.json")
    assert ended.code == 4
    assert "no weights to compare with" in ended.err


def test_names_from_the_file_can_not_write_to_the_terminal(artifact: Path, l4pack: Callable) -> None:
    name = "model.layers.1.\x1b[31mred[bold]"
    damage.tensors(lambda state: state.update({name: torch.ones(3)}))(artifact)
    ended = l4pack("verify", artifact)
    assert ended.code == 1
    assert "\x1b" not in ended.out
    assert "[31mred[bold]" in ended.out


def test_headers_alone_are_enough_for_what_headers_tell(artifact: Path, l4pack: Callable) -> None:
    """Scales of zero are in the tensors, an expert that stayed in BF16 is in the headers."""
    good = json.loads(l4pack("verify", artifact, "--headers-only", "--json").out)
    assert (good["ok"], good["headers_only"], good["findings"]) == (True, True, [])
    assert good["checked"]["tensors"] > 0
    assert good["checked"]["bytes"] == 0
    spoil(artifact)
    ended = l4pack("verify", artifact, "--headers-only", "--json")
    assert ended.code == 1
    assert {finding["rule"] for finding in json.loads(ended.out)["findings"]} == {"ignore"}
    assert "not looked at (--headers-only)" in l4pack("verify", artifact, "--headers-only").out


def test_headers_alone_say_nothing_about_a_source(made: tuple[Path, Path], l4pack: Callable) -> None:
    source, folder = made
    ended = l4pack("verify", folder, "--headers-only", "--against", source)
    assert ended.code == 2
    assert ended.err.startswith("error: invalid value for --headers-only")
