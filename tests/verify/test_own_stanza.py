"""A stanza taken for this package's own is one that compressed-tensors takes too; no other is waved through."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from operator import setitem
from pathlib import Path

import pytest
from compressed_tensors.quantization import QuantizationConfig

from l4pack.artifact.stanza import read_stanza
from l4pack.checkpoint.open import open_source
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe, recipe_names
from l4pack.verify.declared import read_declared
from l4pack.verify.findings import Findings
from l4pack.verify.own_stanza import is_own_stanza

OTHERS = [
    None,
    True,
    False,
    0,
    1,
    1.0,
    3,
    -1,
    8,
    "",
    "int",
    "float",
    "group",
    "token",
    [],
    ["x"],
    [1, "x"],
    {},
    {"x": 1},
]


def stanza_of(recipe):
    for source in ("demo", "llama-4-scout", "llama-4-maverick"):
        loaded = load_recipe(recipe)
        if loaded.promise is None or loaded.promise.model == source:
            return make_plan(open_source(source), loaded).stanza
    raise AssertionError(recipe)


def own(stanza):
    return is_own_stanza(stanza, read_declared(read_stanza(stanza), (), Findings()))


def accepted(stanza):
    try:
        QuantizationConfig.model_validate(copy.deepcopy(stanza))
    except Exception:
        return False
    return True


def places(value, path=()):
    """Every key and index below a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        yield (*path, key)
        yield from places(below, (*path, key))


def changed(stanza, path, edit):
    result = copy.deepcopy(stanza)
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    edit(parent, path[-1])
    return result


def changes(stanza):
    """The stanza with each of its values gone, and with others in its place, and with keys more."""
    for path in places(stanza):
        yield changed(stanza, path, lambda parent, key: parent.pop(key))
        for other in OTHERS:
            yield changed(stanza, path, lambda parent, key, other=other: setitem(parent, key, other))
    for path in [(), ("config_groups",), ("config_groups", "group_0"), ("config_groups", "group_0", "weights")]:
        yield changed(stanza, (*path, "more"), lambda parent, key: setitem(parent, key, 1))


@pytest.mark.parametrize("recipe", recipe_names())
def test_what_is_written_is_known_and_accepted(recipe):
    stanza = json.loads(json.dumps(stanza_of(recipe)))
    assert own(stanza)
    # What only ggml knows, compressed-tensors must refuse rather than read as something else.
    assert accepted(stanza) == (not recipe.startswith("gguf-"))


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8-static", "scout-int4-1xh100"])
def test_what_compressed_tensors_refuses_is_never_known(recipe):
    stanza = json.loads(json.dumps(stanza_of(recipe)))
    refused = [one for one in changes(stanza) if not accepted(one)]
    assert len(refused) > 100
    assert not [one for one in refused if own(one)]


def test_verifying_an_own_artifact_imports_neither_torch_nor_transformers(tmp_path: Path):
    run_plan(make_plan(open_source("demo"), load_recipe("int4-rtn")), tmp_path / "artifact")
    program = (
        "import sys; from l4pack.__main__ import main\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers', 'compressed_tensors'} & set(sys.modules), file=sys.stderr)"
    )
    for against in ([], ["--against", "demo"]):
        command = [sys.executable, "-c", program, "verify", str(tmp_path / "artifact"), *against]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (ended.returncode, ended.stderr) == (0, "set()\n"), ended.stdout
