"""`optimum-cli l4pack` is `l4pack`."""

import json
import subprocess
import sys

PROGRAM = [sys.executable, "-m", "optimum.commands.optimum_cli", "l4pack"]


def test_same_commands_and_exit_codes_through_optimum():
    done = subprocess.run([*PROGRAM, "recipes", "int4-rtn", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipes"][0]["name"] == "int4-rtn"
    failed = subprocess.run([*PROGRAM, "plan", "nowhere-at-all"], capture_output=True, text=True, check=False)
    assert failed.returncode == 4
    assert "error: nowhere-at-all" in failed.stderr
