"""The notebook runs from its first cell to its last, and is committed without what it printed."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "quantize-demo.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_holds_no_output():
    assert not [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]


@pytest.fixture
def figures():
    plt.switch_backend("agg")
    yield plt
    plt.close("all")


def test_its_cells_run_in_order(figures, tmp_path, monkeypatch, capsys):
    """In this process, which has torch loaded: a kernel of its own would take most of a minute."""
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names = {}
    for source in CODE:
        exec(compile(source, NOTEBOOK.name, "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count(" verified\n") == len(names["RECIPES"])
    assert "hint: raise --max-ram" in printed
    assert "vllm serve " in printed
    assert len(figures.get_fignums()) == 3
    assert names["measured"]["fp8"].kl_mean < names["measured"]["int4-rtn"].kl_mean < 0.05
