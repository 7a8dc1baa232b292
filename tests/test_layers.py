"""Imports go one way: a package may import from itself and from those below it. The table is the architecture.

Commands call the chain (`build`) and single steps; steps carry out a plan; a plan assigns tensors by recipe, format and
what Llama 4 is. Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "l4pack"

# From the user down to the ground. A name covers a module or a whole package; those on a line know nothing of one another.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["api"],
    ["build"],
    ["report"],
    ["fit"],
    ["dequantize", "export"],
    ["publish"],
    ["measure", "quantize"],
    ["timing"],
    ["budget", "calibration", "evaluate", "verify"],
    ["plan"],
    ["text"],
    ["gradient"],
    ["stream"],
    ["artifact"],
    ["recipe"],
    ["containers", "formats"],
    ["checkpoint"],
    ["cluster", "demo", "hub", "model"],
    ["quant", "work"],
    ["datafile"],
    ["extras", "units", "resources"],
    ["errors"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    """Every module of the package as its path parts below `l4pack`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts[:-1] if parts[-1] == "__init__" else parts


def imports(path):
    """The l4pack modules a file imports, as path parts, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("l4pack.") and name.split(".")[1] in LEVEL:
                yield name.split(".")[1:], node.lineno


def test_every_module_has_its_layer():
    assert {parts[0] for _, parts in modules()} == set(LEVEL)


@pytest.mark.parametrize(
    ("path", "parts"), list(modules()), ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_imports_go_down(path, parts):
    for target, line in imports(path):
        assert target[0] == parts[0] or LEVEL[target[0]] > LEVEL[parts[0]], (
            f"{path}:{line}: {parts[0]} imports {target[0]}, which does not lie below it"
        )


def test_no_two_modules_import_each_other():
    """Not even inside functions or for types alone."""
    known = {".".join(parts) for _, parts in modules()}
    edges = {}
    for path, parts in modules():
        targets = {".".join(target[:length]) for target, _ in imports(path) for length in (1, 2)}
        edges[".".join(parts)] = targets & known - {".".join(parts)}
    while edges:
        leaves = {name for name, targets in edges.items() if not targets & edges.keys()}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: targets for name, targets in edges.items() if name not in leaves}


def test_only_the_console_prints():
    for path, parts in modules():
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert not calls, f"{path}:{calls}"
        if parts != ("cli", "console"):
            assert "sys.stdout.write" not in path.read_text(encoding="utf-8"), path


def test_nothing_unpickles_or_evaluates():
    banned = {"pickle", "marshal", "shelve", "dill"}
    for path, _ in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not banned & {alias.name.partition(".")[0] for alias in node.names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = f"{ast.unparse(node.func)}"
                assert name not in ("torch.load", "yaml.unsafe_load", "os.system"), f"{path}:{node.lineno}"
