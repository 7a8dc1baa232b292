"""Memory decides how fast, never what: bytes and figures are the same under every `--max-ram`, and changed half way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, file_digests, quick_plan
from limits import least_ram

from l4pack.errors import StoppedError
from l4pack.stream.walk import Walk

Run = Callable[..., Ended]
FEW = ("--samples", 6, "--sequence-length", 100, "--compute", "cpu")  # 600 tokens: more than one block


@pytest.fixture
def stopped(l4pack: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a command that is stopped once its walk has saved a layer."""

    def run(*command: object) -> None:
        save = Walk._save

        def save_and_stop(*arguments: Any) -> None:
            save(*arguments)
            raise StoppedError("stopped by a test", hint="")

        with monkeypatch.context() as patched:
            patched.setattr(Walk, "_save", save_and_stop)
            ended = l4pack(*command)
        assert ended.code == 75, ended.err

    return run


@pytest.fixture(scope="module")
def source(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("maverick", num_hidden_layers=2, no_rope_layers=[1, 0], num_local_experts=2)


def test_an_artifact_is_the_same_under_every_limit_and_when_it_changes(
    l4pack: Run, stopped: Callable[..., None], source: Path, tmp_path: Path
) -> None:
    command = ("quantize", source, "--recipe", "int4", *FEW)
    tight = int(1.01 * quick_plan(source, "int4").peak_ram_bytes)  # fewer rows were once computed at once in it
    whole = [tmp_path / name for name in ("free", "tight")]
    for out, limit in zip(whole, ((), ("--max-ram", tight)), strict=True):
        ended = l4pack(*command, "--out", out, *limit)
        assert ended.code == 0, ended.err
    changed = tmp_path / "changed"
    stopped(*command, "--out", changed)
    assert l4pack(*command, "--out", changed, "--max-ram", tight).code == 0
    assert file_digests(whole[0]) == file_digests(whole[1]) == file_digests(changed)


def test_an_evaluation_goes_on_under_another_limit(
    l4pack: Run, stopped: Callable[..., None], source: Path, artifact: Callable[..., Path], tmp_path: Path
) -> None:
    made = artifact("fp8", "maverick", num_hidden_layers=2, no_rope_layers=[1, 0], num_local_experts=2)
    command = ("evaluate", made, "--against", source, *FEW, "--json")
    free = json.loads(l4pack(*command).out)
    changed = (*command, "--work", tmp_path / "work")
    stopped(*changed)
    again = json.loads(l4pack(*changed, "--max-ram", least_ram(l4pack, *command)).out)
    assert again["resumed_layers"] == 1
    assert {**again, "run": 0, "resumed_layers": 0} == {**free, "run": 0}


def test_a_measurement_goes_on_under_another_limit(
    l4pack: Run, stopped: Callable[..., None], source: Path, tmp_path: Path
) -> None:
    command = ("measure", source, *FEW, "--calibration-samples", 3, "--options", "int4-g128,fp8", "--direct", "all")
    assert l4pack(*command, "--out", tmp_path / "free.json").code == 0
    changed = (*command, "--out", tmp_path / "changed.json")
    stopped(*changed)
    ended = l4pack(*changed, "--max-ram", least_ram(l4pack, *command, "--out", tmp_path / "none.json"))
    assert ended.code == 0, ended.err
    assert (tmp_path / "changed.json").read_bytes() == (tmp_path / "free.json").read_bytes()


def test_coverage_is_the_same_under_every_limit(
    l4pack: Run, stopped: Callable[..., None], source: Path, tmp_path: Path
) -> None:
    command = ("coverage", source, "--calibration-samples", 6, "--sequence-length", 100, "--compute", "cpu", "--json")
    free = json.loads(l4pack(*command, "--work", tmp_path / "free").out)
    changed = (*command, "--work", tmp_path / "work")
    stopped(*changed)
    again = json.loads(l4pack(*changed, "--max-ram", least_ram(l4pack, *command, "--work", tmp_path / "none")).out)
    assert {**again, "seconds": 0} == {**free, "seconds": 0}
