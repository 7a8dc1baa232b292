"""Whole Scout at full apparent size, headers and holes: what reads no weight does so at any size, as planned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "full_size.py"


def test_a_whole_model_is_read_by_its_headers(tmp_path: Path):
    command = [sys.executable, str(BENCHMARK), "scout", str(tmp_path), "--headers-only"]
    ended = subprocess.run(command, capture_output=True, check=True, text=True)
    steps = json.loads((tmp_path / "results-scout-none.json").read_text())
    assert [steps[name]["found_bytes"] for name in ("make", "inspect")] == 2 * [217_283_587_072]
    assert steps["plan"]["planned_bytes"] == steps["plan"]["found_bytes"] == 64_873_104_640
    assert all(steps[name]["peak_bytes"] < 200_000_000 for name in ("inspect", "plan", "budget"))
    assert "fits" in ended.stdout
