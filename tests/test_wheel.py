"""The wheel, installed apart from this checkout: commands run, and every file they need is found inside it."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from l4pack import __version__
from l4pack.formats import format_names
from l4pack.recipe import recipe_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A fresh environment that holds the wheel, and borrows the dependencies (not l4pack) of the one tests run in."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # Lines of a .pth file are added to the end of the path, and the .pth files found there are not read, so an editable
    # install of this checkout stays out.
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin" / "python"


@pytest.fixture
def run(python, tmp_path):
    def call(*arguments):
        command = [str(python), "-I", "-m", "l4pack", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout

    return call


def test_the_package_is_the_wheels(python, tmp_path):
    command = [str(python), "-I", "-c", "import l4pack; print(l4pack.__file__, l4pack.__version__)"]
    file, version = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert Path(file).is_relative_to(python.parents[1])
    assert version == __version__


def test_recipes_and_formats_are_found(run):
    assert [recipe["name"] for recipe in json.loads(run("recipes", "--json"))["recipes"]] == recipe_names()
    assert [spec["name"] for spec in json.loads(run("formats", "--json"))["formats"]] == format_names()


def test_a_known_model_is_planned(run):
    plan = json.loads(run("plan", "llama-4-scout", "--recipe", "int4-rtn", "--json"))
    assert plan["weight_bytes"] == 64_873_104_640


def test_every_data_file_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [path for path in (ROOT / "l4pack").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in data} <= names
    for kind in ("recipes", "formats", "sensitivities"):
        assert {f"l4pack/{kind}/{path.name}" for path in (ROOT / kind).iterdir()} <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "benchmarks/"))]
    assert not [name for name in names if name.endswith((".nbc", ".nbi", ".pyc"))]


def test_the_wheel_states_its_licence_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"l4pack-{__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert "License-Expression: Apache-2.0" in metadata
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
        assert "l4pack = l4pack.__main__:main" in archive.read(f"{folder}/entry_points.txt").decode()
