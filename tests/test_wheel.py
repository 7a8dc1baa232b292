"""The wheel, installed apart from this checkout: commands run, and every file they need is found inside it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from l4pack import __version__
from l4pack.checkpoint.open import open_source
from l4pack.errors import LicenceError
from l4pack.extras import CORE, EXTRAS
from l4pack.formats.known import format_names
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe, recipe_names

LIGHT_BYTES = 60_000_000
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


def closure(requirements):
    """The distributions that pip would install for the requirements, by name, of those in this environment."""
    found, waiting = {}, [*requirements]
    while waiting:
        requirement = Requirement(waiting.pop())
        if canonical(requirement.name) in found or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        found[canonical(requirement.name)] = distribution(requirement.name)
        waiting += distribution(requirement.name).requires or []
    return found


@pytest.fixture(scope="module")
def light(wheel, tmp_path_factory):
    """A fresh environment with the wheel and links to what it requires without extras: what pip would put there."""
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    metadata = Distribution.at(next(site.glob("l4pack-*.dist-info"))).metadata
    for one in closure(metadata.get_all("Requires-Dist")).values():
        for name in {file.parts[0] for file in one.files if file.parts[0] not in ("..", "__pycache__")}:
            (site / name).symlink_to(one.locate_file(name))
    return folder


@pytest.fixture
def run_light(light, tmp_path):
    def call(*arguments):
        command = [str(light / "bin" / "python"), "-I", "-m", "l4pack", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    return call


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "artifact"
    run_plan(make_plan(open_source("demo"), load_recipe("int4-rtn")), folder)
    return folder


def test_a_light_install_is_small(light):
    site = next(light.glob("lib/python*/site-packages"))
    files = [file for place in site.iterdir() for file in place.resolve().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if file.suffix != ".pyc") < LIGHT_BYTES


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "demo"],
        ["plan", "demo"],
        ["plan", "llama-4-maverick", "--recipe", "maverick-fp8-8xh100"],
        ["budget", "llama-4-scout", "--recipe", "int4", "--device", "8xh100"],
        ["budget", "scout-int4-1xh100"],
        ["licence", "ARTIFACT"],
        ["recipes"],
        ["recipes", "int4"],
        ["formats"],
        ["devices"],
        ["verify", "ARTIFACT", "--headers-only"],
        ["quantize", "--help"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_the_core_needs_no_more(run_light, artifact, arguments):
    ended = run_light(*(artifact if each == "ARTIFACT" else each for each in arguments))
    unpackaged = LicenceError.exit_code if arguments[0] == "licence" else 0
    assert (ended.returncode, ended.stderr) == (unpackaged, "")
    assert ended.stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["quantize", "demo", "--recipe", "int4-rtn", "--out", "out"], "quantize"),
        (["build", "demo", "--out", "out"], "quantize"),
        (["verify", "ARTIFACT"], "quantize"),
        (["evaluate", "ARTIFACT", "--against", "demo"], "quantize"),
        (["measure", "demo"], "quantize"),
        (["fit", "demo", "--bits", "5"], "quantize"),
        (["coverage", "demo"], "quantize"),
        (["report", "ARTIFACT"], "report"),
        (["package", "ARTIFACT"], "hub"),
        (["push", "ARTIFACT", "some/where"], "hub"),
        (["inspect", "some/where"], "hub"),
        (["licence", "some/where"], "hub"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_command_that_lacks_its_part_names_it_and_leaves_nothing(run_light, artifact, tmp_path, arguments, extra):
    ended = run_light(*(artifact if each == "ARTIFACT" else each for each in arguments))
    assert (ended.returncode, ended.stdout) == (2, "")
    line, hint = ended.stderr.splitlines()
    assert line.startswith("error: this needs ")
    assert line.endswith(": pip install 'l4pack[all]'")
    assert hint == f"hint: 'l4pack[{extra}]' is the part with it; the core does {CORE}"
    assert not [*tmp_path.iterdir()]


def libraries_of_the_package():
    trees = [ast.parse(file.read_text()) for file in (ROOT / "l4pack").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names} - {"l4pack", *sys.stdlib_module_names}


def test_every_library_comes_with_the_core_or_with_the_extra_it_is_said_to_be_in():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brings = {library: set(map(canonical, found)) for library, found in packages_distributions().items()}
    asked_for = {
        "lm_eval",
        "vllm",
        "datasets",
        "pyarrow",
        "ray",
        "triton",
        "mlx",
        "PIL",
    }  # where one is missing, the user is told so in other words, or what it does is done without it
    used = libraries_of_the_package() - asked_for
    with_core = {library for library in used if brings.get(library, set()) & closure(project["dependencies"]).keys()}
    assert used - with_core <= {library for libraries in EXTRAS.values() for library in libraries}
    for extra, libraries in EXTRAS.items():
        there = closure(extras[extra]).keys()
        assert all(brings[library] & there for library in libraries if library in brings), extra
    assert extras["all"] == [f"l4pack[{','.join(EXTRAS)}]"]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()
