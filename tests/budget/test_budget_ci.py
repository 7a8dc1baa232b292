"""What continuous integration runs: the action's own shell, baselines that come and go, and checks of more than memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from measured import measured

from l4pack.budget.trend import MOST, earlier_runs, trend
from l4pack.units import human_gib

ROOT = Path(__file__).parents[2]
Run = Callable[..., Any]
SCOUT = "checks:\n  - {name: scout, source: llama-4-scout, recipe: int4-uniform, device: 2xh100, context: 128k}\n"


@pytest.fixture
def checks(tmp_path: Path) -> Path:
    """One check that holds."""
    file = tmp_path / "l4pack-budget.yaml"
    file.write_text(SCOUT)
    return file


def test_a_baseline_that_is_not_there_yet_is_said_and_nothing_more(l4pack: Run, checks: Path, tmp_path: Path) -> None:
    ended = l4pack("budget", "check", checks, "--baseline", tmp_path / "main.json")
    assert ended.code == 0
    assert ended.err.startswith("warning: there is no baseline ")
    assert "since the baseline" not in ended.out


def test_a_report_may_take_the_baselines_place(l4pack: Run, checks: Path, tmp_path: Path) -> None:
    """It is compared with what was there before, then written."""
    saved = tmp_path / "main.json"
    assert l4pack("budget", "check", checks, "--report", f"json={saved}").code == 0
    checks.write_text(SCOUT.replace("int4-uniform", "fp8"))
    ended = l4pack("budget", "check", checks, "--baseline", saved, "--report", f"json={saved}")
    assert "since the baseline: weights grew by" in ended.out
    assert json.loads(saved.read_text())["checks"][0]["change"].startswith("weights grew by")
    assert l4pack("budget", "check", checks, "--baseline", saved).out.count("since the baseline") == 0


def test_several_runs_have_a_trend(l4pack: Run, checks: Path, tmp_path: Path) -> None:
    """Each run's numbers go along in what the next one saves; a run that found none has none."""
    saved = tmp_path / "main.json"
    again = ("budget", "check", checks, "--baseline", saved, "--report", f"json={saved}")
    contexts = ("64k", "nothing.yaml", "128k", "256k")
    for context in contexts:
        text = SCOUT.replace("128k", context) if context != "nothing.yaml" else SCOUT.replace("int4-uniform", context)
        checks.write_text(text)
        ended = l4pack(*again)
        assert "3 runs" in ended.out or context != contexts[-1]
    record = json.loads(saved.read_text())["checks"][0]
    before = [run["headroom_bytes"] for run in record["earlier"]]
    assert len(before) == 2
    assert before[0] > before[1] > record["headroom_bytes"]
    summary = l4pack(*again, "--format", "markdown").out
    assert "as before; █" in summary
    assert f"to {human_gib(record['headroom_bytes'])} to spare in 4 runs" in summary


@pytest.mark.parametrize("earlier", [7, [7], [{"headroom_bytes": "much"}], [{"headroom_bytes": True}], {}])
def test_a_baselines_earlier_runs_are_not_believed(earlier: object) -> None:
    assert earlier_runs({"earlier": earlier}) == []


def test_a_record_keeps_the_last_runs() -> None:
    run = {"weight_bytes": 1, "max_context": 2}
    runs = earlier_runs(
        {"earlier": [run | {"headroom_bytes": number} for number in range(90)], **run, "headroom_bytes": 90}
    )
    assert [runs[0]["headroom_bytes"], runs[-1]["headroom_bytes"], len(runs)] == [61, 90, MOST]
    assert trend(runs[:1], 5) == ""
    assert trend(runs[:2], 62).startswith("▁█")
    assert trend([runs[0]] * 2, 61).startswith("▄▄▄ ")


@pytest.mark.parametrize("text", ["budget.json", "yaml=x", "json="])
def test_a_report_that_is_none(l4pack: Run, checks: Path, text: str) -> None:
    ended = l4pack("budget", "check", checks, "--report", text)
    assert ended.code == 2
    assert ended.err.splitlines()[0] == f"error: --report {text}: not FORMAT=FILE"


def step(name: str) -> dict[str, Any]:
    """A step of the action."""
    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    return next(step for step in steps if step.get("name") == name)


def run_check_step(folder: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str], str]:
    """The action's check as a runner runs it: what it did, its outputs, and its summary."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    values = {name: given["default"] for name, given in action["inputs"].items()} | inputs
    environment = {
        name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: values[found[1]], value)
        for name, value in step("Check the budgets")["env"].items()
    }
    files = {name: folder / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {**os.environ, "PATH": path, **environment, **{name: str(file) for name, file in files.items()}}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step("Check the budgets")["run"]]
    ended = subprocess.run(shell, cwd=folder, env=given, capture_output=True, text=True, check=False)
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return ended, outputs, files["GITHUB_STEP_SUMMARY"].read_text()


def test_the_action_saves_over_its_own_baseline(checks: Path, tmp_path: Path) -> None:
    """First run, a run with a change, and a run that fails: annotations, summary, outputs, exit code."""
    inputs = {"baseline": "l4pack-budget.json"}
    ended, outputs, summary = run_check_step(tmp_path, **inputs)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert "warning: there is no baseline" in ended.stderr
    assert outputs == {"passed": "1", "failed": "0", "report": "l4pack-budget.json"}
    assert summary.startswith("### Memory budget: 1 of 1 checks hold")
    checks.write_text(SCOUT.replace("128k", "10M"))
    ended, outputs, summary = run_check_step(tmp_path, **inputs)
    assert ended.returncode == 3
    assert ended.stdout.startswith("::error file=l4pack-budget.yaml,line=2,title=budget scout::does not fit: ")
    assert (outputs["passed"], outputs["failed"]) == ("0", "1")
    assert "headroom shrank by" in summary
    checks.write_text("checks: []\n")
    ended, outputs, summary = run_check_step(tmp_path, **inputs)
    assert (ended.returncode, outputs, summary) == (2, {}, "")
    assert json.loads((tmp_path / "l4pack-budget.json").read_text())["failed"] == 1


def test_the_action_installs_what_it_is_told(tmp_path: Path) -> None:
    """Its install step as it stands, with a pip that notes what it was asked for."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@" > asked\n')
    fake.chmod(0o755)
    given = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "VERSION": "/somewhere/l4pack[hub]"}
    shell = ["bash", "-eo", "pipefail", "-c", step("Install l4pack")["run"]]
    subprocess.run(shell, cwd=tmp_path, env=given, check=True)
    assert (tmp_path / "asked").read_text().split() == ["-m", "pip", "install", "--quiet", "/somewhere/l4pack[hub]"]


def test_the_hook_runs_for_whatever_a_budget_is_made_from() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    for path in ("l4pack-budget.yaml", "recipes/ours.yml", "out/config.json", "out/model-00001-of-00002.safetensors"):
        assert re.search(hook["files"], path)
    assert not re.search(hook["files"], "README.md")
    assert hook["pass_filenames"] is False


def test_init_writes_a_check_that_holds(l4pack: Run, tmp_path: Path) -> None:
    file = tmp_path / "l4pack-budget.yaml"
    assert l4pack("budget", "init", "scout-fp8-2xh100", "--out", file).code == 0
    (check,) = yaml.safe_load(file.read_text())["checks"]
    assert (check["name"], check["source"], check["recipe"]) == (
        "scout-fp8-2xh100",
        "llama-4-scout",
        "scout-fp8-2xh100",
    )
    assert check["device"] == "2xh100"
    assert l4pack("budget", "check", file).code == 0
    again = l4pack("budget", "init", "scout-fp8-2xh100", "--out", file)
    assert (again.code, "is there already" in again.err) == (2, True)


def test_init_refuses_what_does_not_hold(l4pack: Run, tmp_path: Path) -> None:
    file = tmp_path / "l4pack-budget.yaml"
    ended = l4pack("budget", "init", "llama-4-scout", "--recipe", "int4", "--context", "10M", "--out", file)
    assert ended.code == 3
    assert ended.err.startswith("error: h100 lacks ")
    assert not file.exists()


def test_init_of_an_artifact_names_its_folder(l4pack: Run, artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "ci" / "l4pack-budget.yaml"
    file.parent.mkdir()
    record = json.loads(l4pack("budget", "init", artifact, "--context", "1k", "--out", file, "--json").out)
    assert record["check"]["artifact"] == os.path.relpath(artifact, file.parent)
    assert l4pack("budget", "check", file).code == 0


@pytest.fixture
def artifact(l4pack: Run, checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A small artifact that was never evaluated or packaged."""
    out = tmp_path / "tiny-fp8"
    assert l4pack("quantize", checkpoint("scout"), "--recipe", "fp8", "--out", out).code == 0
    return out


def promised(artifact: Path, **more: object) -> str:
    """A checks file with one check of an artifact."""
    check = {"name": "tiny", "artifact": artifact.name, "device": "h100", "context": 512, **more}
    (artifact.parent / "l4pack-budget.yaml").write_text(yaml.safe_dump({"checks": [check]}))
    return str(artifact.parent / "l4pack-budget.yaml")


def test_accuracy_and_licence_are_checked_in_the_same_file(l4pack: Run, artifact: Path) -> None:
    never = l4pack("budget", "check", promised(artifact, quality={"max_kl": 0.1}))
    assert never.code == 6
    assert "accuracy was not measured" in never.out
    unlicensed = l4pack("budget", "check", promised(artifact, licence=True), "--json")
    assert unlicensed.code == 7
    (check,) = json.loads(unlicensed.out)["checks"]
    assert check["fits"] is True
    assert check["passed"] is False
    assert check["broken"][0]["hint"].startswith("l4pack licence ")
    both = l4pack("budget", "check", promised(artifact, licence=True, quality={"max_kl": 0.1}, min_headroom="79GiB"))
    assert both.code == 3
    assert both.out.count("FAIL") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"artifact": None, "source": "llama-4-scout", "licence": True}, "'licence' goes with 'artifact' or 'hub'"),
        ({"artifact": None, "source": "llama-4-scout", "quality": {}}, "'quality' goes with 'artifact'"),
        ({"quality": {"max_kl": -1}}, "quality.max_kl"),
        ({"context": "12q"}, "'12q' is not a number of tokens"),
    ],
)
def test_a_check_that_asks_nonsense(l4pack: Run, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    check = {"name": "tiny", "artifact": "x", "device": "h100", "context": 512, **more}
    values = {key: value for key, value in check.items() if value is not None}
    (tmp_path / "l4pack-budget.yaml").write_text(yaml.safe_dump({"checks": [values]}))
    ended = l4pack("budget", "check", tmp_path / "l4pack-budget.yaml")
    assert ended.code == 2
    assert message in ended.err.splitlines()[0]


def test_a_missed_gate_fails_the_check(l4pack: Run, artifact: Path) -> None:
    measured(artifact)
    passed = l4pack("budget", "check", promised(artifact, quality={"max_kl": 10.0}))
    assert passed.code == 0, passed.out
    missed = l4pack("budget", "check", promised(artifact, quality={"max_kl": 0.0}))
    assert missed.code == 6
    assert "max_kl 0 (" in missed.out
