"""The Dockerfile: a linter finds nothing, what the wheel is made of gets in, and where there is an engine, it builds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
STEPS = re.findall(r"^([A-Z]+) (.*)$", DOCKERFILE, re.MULTILINE)
LINTER = shutil.which("hadolint", path=str(Path(sys.executable).parent))


def engine() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.skipif(LINTER is None, reason="hadolint is not installed")
def test_a_linter_finds_nothing():
    ended = subprocess.run([LINTER, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_it_runs_l4pack_and_not_as_root():
    last = dict(STEPS)
    assert last["ENTRYPOINT"] == '["l4pack"]'
    assert last["USER"].isdecimal()
    assert int(last["USER"]) > 0


def test_base_and_index_of_torch_are_arguments_and_versions_are_pinned():
    arguments = dict(value.partition("=")[::2] for step, value in STEPS if step == "ARG")
    assert arguments["BASE"].startswith("python:3.")
    assert arguments["TORCH_INDEX"].endswith("/cpu")
    assert [value for step, value in STEPS if step == "FROM"][-1] == "${BASE}"
    installs = re.findall(r"pip install [^;&]*", DOCKERFILE)
    assert installs
    assert all("--constraint /constraints.txt" in line for line in installs)


def test_what_the_wheel_is_made_of_is_in_the_context():
    let_in = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], *project["project"]["license-files"]}
    assert let_in == needed | {project["project"]["readme"], "pyproject.toml", "constraints.txt"}


@pytest.mark.skipif(not engine(), reason="no container engine answers")
def test_the_light_image_builds_and_budgets():
    tag = "l4pack:test"
    subprocess.run(["docker", "build", "--tag", tag, "--build-arg", "EXTRAS=", "."], cwd=ROOT, check=True, timeout=600)
    command = ["docker", "run", "--rm", tag, "budget", "scout-int4-1xh100", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert '"fits": true' in ended.stdout
