"""The command line starts fast: what is slow to import is imported by the command that needs it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("slow", ["torch", "transformers", "compressed_tensors"])
def test_command_line_starts_without(slow: str) -> None:
    code = f"import sys, l4pack.cli.app; sys.exit({slow!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
