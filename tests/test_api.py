"""The functions of the package: their examples run, they are light to import, and a failure is one of l4pack's errors."""

from __future__ import annotations

import doctest
import inspect
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import l4pack
from l4pack import api
from l4pack.errors import BudgetError, QualityError, SourceError, UsageError

pytest_plugins = ["publishing_fixtures"]
NAMES = [name for name in l4pack.__all__ if name != "__version__"]
RESULTS = {
    "plan": "planned",
    "quantize": "made",
    "verify": "checked",
    "budget": "answer",
    "evaluate": "measured",
    "export": "exported",
    "dequantize": "dequantized",
    "package": "packaged",
    "push": "pushed",
}  # what the examples call them
ROOT = Path(__file__).parents[1]


@pytest.mark.usefixtures("own_home", "hub")
def test_the_examples_of_all_functions_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestParser()
    named = [name for name in vars(api) if name in NAMES]
    text = "\n\n".join(inspect.getdoc(getattr(api, name)) for name in named)
    examples = found.get_doctest(text, {"l4pack": l4pack}, "api", None, 0)
    ran = doctest.DocTestRunner(verbose=False).run(examples, clear_globs=False)
    assert ran == doctest.TestResults(failed=0, attempted=ran.attempted)
    assert ran.attempted >= len(NAMES)
    for name, attributes in runpy.run_path(str(ROOT / "tools" / "make_reference.py"))["RESULTS"].items():
        result = examples.globs[RESULTS[name]]
        assert not [key for key in attributes if not hasattr(result, key.removesuffix("()"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_function_says_what_it_takes_and_what_it_raises(name):
    function = getattr(l4pack, name)
    described = inspect.getdoc(function)
    assert "Raises " in described
    assert ">>> " in described
    hints = function.__annotations__
    assert {"return", *inspect.signature(function).parameters} == hints.keys()


def test_the_package_is_light_and_its_functions_stay_functions():
    program = (
        "import sys, l4pack; assert len([n for n in sys.modules if n.startswith('l4pack')]) < 10, sys.modules;"
        "assert 'pydantic' not in sys.modules and 'torch' not in sys.modules;"
        "import l4pack.plan.plan, l4pack.budget.model, l4pack.evaluate.gates;"
        "assert all(callable(getattr(l4pack, name)) for name in l4pack.__all__[1:])"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_plan_is_what_quantize_does(tmp_path):
    planned = l4pack.plan("demo", "int4-rtn", max_ram="2GB", shard_size=2_000_000)
    seen = []
    made = l4pack.quantize(planned, tmp_path / "out", advance=seen.append)
    assert {path.name: path.stat().st_size for path in made.out.iterdir()} == planned.files
    assert sum(seen) == planned.read_bytes == made.read_bytes
    assert l4pack.quantize(planned, tmp_path / "out").already_done


def test_failures_are_errors_with_a_hint(tmp_path, artifact, monkeypatch):
    folder = shutil.copytree(artifact("int4-rtn"), tmp_path / "made")
    for error, call in (
        (SourceError, lambda: l4pack.inspect(tmp_path / "nothing")),
        (BudgetError, lambda: l4pack.plan("demo", max_ram=1_000_000)),
        (UsageError, lambda: l4pack.plan("demo", max_ram="much")),
        (UsageError, lambda: l4pack.budget("demo", device="h1000")),
        (UsageError, lambda: l4pack.verify(folder, sample=3)),
        (UsageError, lambda: l4pack.verify(folder, "demo", headers_only=True)),
        (UsageError, lambda: l4pack.evaluate(folder, gates={"max_kl": -1})),
        (UsageError, lambda: l4pack.evaluate(folder, gates={"max_k": 1})),
        (UsageError, lambda: l4pack.push(folder, "no-repository")),
    ):
        with pytest.raises(error) as raised:
            call()
        assert raised.value.hint


def test_a_missed_gate_is_raised_and_the_record_kept(tmp_path, artifact, checkpoint):
    folder, text = shutil.copytree(artifact("int4-rtn"), tmp_path / "made"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    with pytest.raises(QualityError):
        l4pack.evaluate(folder, checkpoint("scout"), text=text, samples=1, sequence_length=32, gates={"max_kl": 0.0})
    assert (folder / "accuracy.json").exists()


def test_what_a_light_install_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "l4pack.quantize.run", None)
    with pytest.raises(ModuleNotFoundError):
        l4pack.quantize("demo", tmp_path / "out", "int4-rtn")
    monkeypatch.setitem(sys.modules, "l4pack.verify.verify", None)
    monkeypatch.setattr("builtins.__import__", _without_torch(__import__))
    with pytest.raises(UsageError, match="pip install 'l4pack\\[all\\]'"):
        l4pack.verify(tmp_path)


def _without_torch(real):
    def found(name, *rest):
        if name == "l4pack.verify.verify":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *rest)

    return found


def test_types_are_shipped():
    assert (ROOT / "l4pack" / "py.typed").exists()
