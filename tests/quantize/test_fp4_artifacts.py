"""Artifacts of four-bit floats: global scales that are shared, planned bytes, and what `verify` makes of wrong ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import quick_plan
from mixes import rounding
from safetensors.torch import load_file, save_file

from l4pack.artifact.calibration_record import read_calibration
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.checkpoint.open import open_source
from l4pack.quantize.run import run_plan
from l4pack.verify.verify import verify_artifact

Make = Callable[..., Path]
GLOBAL = ".weight_global_scale"


def global_scales(artifact: Path) -> dict[str, float]:
    tensors = {name: value for file in artifact.glob("*.safetensors") for name, value in load_file(file).items()}
    return {name.removesuffix(GLOBAL): float(value[0]) for name, value in tensors.items() if name.endswith(GLOBAL)}


def errors(artifact: Path, source: Path | None = None) -> list[str]:
    found = verify_artifact(artifact, None if source is None else open_source(str(source))).findings
    return [f"{one.rule}: {one.message}" for one in found if one.level == "error" and one.rule != "companion"]


@pytest.mark.parametrize("layout", ["fused", "unfused"])
def test_what_runtimes_merge_has_one_global_scale(checkpoint: Make, tmp_path: Path, layout: str) -> None:
    source = checkpoint("maverick", layout=layout)
    made = run_plan(quick_plan(source, rounding("nvfp4")), tmp_path / "made").out
    scales = global_scales(made)
    assert len(set(scales.values())) > 1
    for module, scale in scales.items():
        if module.endswith("gate_proj"):
            assert scales[module.replace("gate_proj", "up_proj")] == scale


def test_rounded_and_solved_artifacts_are_what_was_planned(checkpoint: Make, artifact: Make, tmp_path: Path) -> None:
    source = checkpoint("scout")
    for recipe in ("nvfp4", "mxfp4"):
        plan = quick_plan(source, rounding(recipe))
        made = run_plan(plan, tmp_path / recipe).out
        assert sum(file.stat().st_size for file in made.iterdir()) == plan.artifact_bytes
        assert errors(made, source) == []
        assert errors(artifact(recipe, "scout"), source) == []


def test_scales_of_inputs_are_those_of_the_record(checkpoint: Make, artifact: Make, tmp_path: Path) -> None:
    source, made = checkpoint("maverick"), artifact("nvfp4-w4a4", "maverick")
    assert errors(made, source) == []
    record = read_calibration(made) or {}
    assert all(found.keys() >= {"error", "input_amax"} for found in record["matrices"].values())
    wrong = tmp_path / "wrong"
    shutil.copytree(made, wrong)
    file = next(wrong.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.input_global_scale"))
    module = name.removesuffix(".input_global_scale")
    assert float(tensors[name][0]) == pytest.approx(448 * 6 / record["matrices"][module]["input_amax"], rel=1e-5)
    tensors[name] = 2 * tensors[name]
    save_file(tensors, file, {"format": "pt"})
    (wrong / MANIFEST_NAME).unlink()
    assert any("makes it" in message for message in errors(wrong))


def test_a_global_scale_that_is_not_shared_is_found(checkpoint: Make, tmp_path: Path) -> None:
    made = run_plan(quick_plan(checkpoint("scout"), rounding("nvfp4")), tmp_path / "made").out
    file = next(made.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f"experts.1.up_proj{GLOBAL}"))
    tensors[name] = 2 * tensors[name]
    save_file(tensors, file, {"format": "pt"})
    (made / MANIFEST_NAME).unlink()
    assert any("runtimes take one for both" in message for message in errors(made))
