"""The command line starts fast: what is slow to import is imported by the command that needs it, when it runs.

Modules are counted, not seconds: those that a command leaves in `sys.modules`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from l4pack.demo import model_path

SLOW = {
    "compressed_tensors", "huggingface_hub", "jinja2", "matplotlib", "numba", "numpy", "optimum", "safetensors", "scipy",
    "tokenizers", "torch", "transformers",
}  # fmt: skip
DEMO = str(model_path())

HEADERS_ONLY = [
    ["inspect", DEMO],
    ["inspect", "demo", "--json"],
    ["plan", DEMO],
    ["plan", "llama-4-scout", "--recipe", "scout-int4-1xh100"],
    ["budget", DEMO, "--device", "h100"],
    ["budget", "llama-4-scout", "--recipe", "int4", "--json"],
    ["budget", "llama-4-scout", "--matrix"],
    ["licence", DEMO],
    ["recipes"],
    ["recipes", "int4"],
    ["formats"],
    ["devices"],
    ["plan", "nowhere-at-all"],
    ["config"],
    ["budget", "check", str(Path(__file__).parents[1] / "bad" / "budget-context" / "l4pack-budget.yaml")],
    ["verify", DEMO, "--headers-only"],
]

PROGRAM = """
import json, sys
from l4pack.__main__ import main
try:
    main()
finally:
    sys.stderr.write("\\n" + json.dumps(sorted(sys.modules)))
"""


def modules_after(*arguments):
    """The modules that a command has imported when it ends."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in ended.stderr
    return set(json.loads(ended.stderr.splitlines()[-1]))


def packages(modules):
    return {name.partition(".")[0] for name in modules}


def own_commands(modules):
    return {name.removeprefix("l4pack.cli.") for name in modules if name.startswith("l4pack.cli.")}


@pytest.mark.parametrize("arguments", HEADERS_ONLY, ids=" ".join)
def test_what_reads_headers_alone_imports_nothing_slow(arguments):
    assert not packages(modules_after(*arguments)) & SLOW


def test_help_imports_what_commands_say_and_nothing_they_use():
    modules = modules_after("--help")
    assert not packages(modules) & {*SLOW, "pydantic", "yaml"}
    assert {name for name in modules if name.startswith("l4pack.")} - {f"l4pack.cli.{name}" for name in own_commands(modules)} <= {
        "l4pack.__main__", "l4pack.api", "l4pack.cli", "l4pack.errors", "l4pack.units", "l4pack.budget",
        "l4pack.budget.report_format", "l4pack.dequantize", "l4pack.evaluate", "l4pack.export", "l4pack.plan", "l4pack.quantize", "l4pack.verify",
        "l4pack.work", "l4pack.work.device", "l4pack.work.progress",
    }  # fmt: skip


def test_the_version_imports_no_command():
    assert own_commands(modules_after("--version")) == {"app", "console"}


def test_a_command_imports_no_other():
    found = {name.partition(".")[0] for name in own_commands(modules_after("recipes"))}  # options are a package
    assert found == {"app", "console", "options", "recipes", "shared"}
