"""vLLM's own loader takes the KV-cache scales of an artifact, with the file's very values.

vLLM lives in an interpreter of its own (tools/vllm/make_vllm_venv.sh); where there is none, these tests are skipped by name.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import KVStrategy, Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parents[1] / "support" / "vllm_kv_scales.py"
LAYERS, HEADS = 4, 2


@pytest.fixture(scope="module")
def vllm_python() -> str:
    default = ROOT / ".venv-vllm" / "bin" / "python"
    named = os.environ.get("L4PACK_VLLM_PYTHON")
    if named is None and not default.is_file():
        pytest.skip("optional: needs vLLM's sources in .venv-vllm, make it with tools/vllm/make_vllm_venv.sh")
    return named or str(default)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo model in int4 with scales by layer, and in FP8 with scales by head."""
    root = tmp_path_factory.mktemp("kv")
    chosen = (("int4-rtn", KVStrategy.TENSOR), ("fp8", KVStrategy.HEAD))
    return [made(base, strategy, root / f"{base}-{strategy}") for base, strategy in chosen]


def made(base: str, strategy: KVStrategy, out: Path) -> Path:
    values = load_recipe(base).model_dump()
    values |= {"kv_cache": {"dtype": "fp8", "strategy": strategy}, "calibration": {"samples": 2, "sequence_length": 64}}
    return run_plan(with_text(make_plan(open_source("demo"), Recipe.model_validate(values))), out).out


@pytest.fixture(scope="module")
def loaded(vllm_python: str, artifacts: list[Path]) -> list[dict[str, Any]]:
    folders = json.dumps([str(folder) for folder in artifacts])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([vllm_python, str(SCRIPT)], input=folders, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("number", [0, 1], ids=["by-layer", "by-head"])
def test_every_scale_arrives_with_the_files_value(
    artifacts: list[Path], loaded: list[dict[str, Any]], number: int
) -> None:
    report, tensors = loaded[number], load_file(artifacts[number] / "model.safetensors")
    assert report["findings"] == []
    assert report["kv_scales"] == 2 * LAYERS
    assert len(report["layers"]) == LAYERS
    for name, found in report["layers"].items():
        for suffix in ("k_scale", "v_scale"):
            in_file = tensors[f"{name.removesuffix('.attn')}.{suffix}"].reshape(-1).tolist()
            assert len(in_file) == (1, HEADS)[number]
            assert found["before"][suffix] == in_file
            assert found["after"][suffix] == in_file


def test_the_scheme_alone_makes_the_cache_fp8(loaded: list[dict[str, Any]]) -> None:
    assert {layer["dtype"] for report in loaded for layer in report["layers"].values()} == {"fp8"}
