"""What many tests need: a terminal that says the same everywhere, tiny checkpoints made once, and the command line."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from ray_nodes import ENVIRONMENT

# What this machine does a second is not measured for every test; one that wants that has a cache of its own.
os.environ["L4PACK_CACHE"] = tempfile.mkdtemp(prefix="l4pack-tests-")

# Before torch is there: the number of threads is part of what a calibrated job is, here and in the processes that tests
# start and kill, and two test processes share two cores.
os.environ["OMP_NUM_THREADS"] = "1"

# Before Ray is there, which any test may be the first to import.
os.environ.update(ENVIRONMENT)

from l4pack.__main__ import main
from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.plan.plan import Plan, RunLimits, make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe
from l4pack.timing.kept import Measurement, keep, machine_identity
from l4pack.timing.work import Kind

atexit.register(shutil.rmtree, os.environ["L4PACK_CACHE"], ignore_errors=True)
for place in (Path.cwd(), Path(tempfile.gettempdir())):
    keep(Measurement(machine=machine_identity(place, "cpu"), taken="2026-01-01", rates=dict.fromkeys(Kind, 1e9)))

# A busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Whoever starts the tests in the background may have these ignored, and a job leaves an ignored signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours, one width, whatever terminal the tests are started from."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models.build`, each kind of checkpoint made once. Tests that change files copy the folder first."""
    made: dict[str, Path] = {}

    def build_once(kind: str = "scout", **options: Any) -> Path:
        from models import build

        key = json.dumps([kind, options], sort_keys=True)
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp("sources") / f"tiny-{kind}", kind, **options)
        return made[key]

    return build_once


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def l4pack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run `l4pack ARGUMENTS` in this process, as the installed command does."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["l4pack", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        written = capsys.readouterr()
        return Ended(code, written.out, written.err)

    return run


def quick_recipe(name: str) -> Recipe:
    """A shipped recipe; one that calibrates looks at two short samples and takes what comes of it."""
    recipe = load_recipe(name)
    if recipe.calibration is None:
        return recipe
    update = {"samples": 2, "sequence_length": 48, "max_cold_experts": 1.0, "max_fallbacks": 1.0}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=update)})


def quick_plan(source: Path, recipe: str | Recipe, limits: RunLimits | None = None) -> Plan:
    """The plan of a recipe for a tiny checkpoint, with a text if it calibrates; float32 stays, to be compared exactly."""
    chosen, opened = quick_recipe(recipe) if isinstance(recipe, str) else recipe, open_source(str(source))
    plan = make_plan(opened, chosen.keeping(float32="F32" in opened.float_names.values()), limits)
    if not plan.calibrated:
        return plan
    text = source.parent / "calibration.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, 0123456789 times. " * 8)
    return with_text(plan, str(text))


@pytest.fixture(scope="session")
def artifact(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An artifact made from `checkpoint(kind, ...)` by a recipe's name, each made once and not to be changed."""
    made: dict[str, Path] = {}

    def make_once(recipe: str, kind: str = "scout", **options: Any) -> Path:
        key = json.dumps([recipe, kind, options], sort_keys=True)
        if key not in made:
            plan = quick_plan(checkpoint(kind, **options), recipe)
            made[key] = run_plan(plan, tmp_path_factory.mktemp("artifacts") / f"{kind}-{recipe}").out
        return made[key]

    return make_once


def file_digests(folder: Path) -> dict[str, str]:
    """Hex SHA-256 of every file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
