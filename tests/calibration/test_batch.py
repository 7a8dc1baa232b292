"""Experts solved together: the same bytes however many, killed anywhere, and the figures of experts solved one by one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import file_digests
from killing import TEXT, Killed, killed_after
from models import build
from pretend_device import pretend_device
from safetensors.torch import load_file

from l4pack.artifact.calibration_record import RECORD_NAME
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.calibration import batch
from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.plan.plan import Plan, make_plan
from l4pack.quant import two_sided_tiles
from l4pack.quant.torch_ops import unpack_levels
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe

SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 2,
}  # fmt: skip
TOGETHER = (1, 2, 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(batch, "ROWS", 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("together") / "tiny", "text", **SMALL)


INT4 = {**load_recipe("int4").model_dump()["schemes"]["int4"], "group_size": 32}
FP8 = {"format": "float-quantized", "num_bits": 8, "type": "float", "method": "gptq", "gptq": {"sweeps": 2}}
FP8_SCHEMES = {
    "channel": {**FP8, "strategy": "channel", "activations": "dynamic_token"},
    "block": {**FP8, "strategy": "block", "block_structure": [128, 128], "activations": "dynamic_group"},
}


def recipe(scheme: dict[str, Any] = INT4) -> Recipe:
    values = load_recipe("int4").model_dump()
    values["schemes"] = {"one": scheme}
    mlps = ["routed_expert", "shared_expert", "dense_mlp"]
    values["rules"] = [{"roles": mlps, "scheme": "one"}, {"roles": "all", "scheme": "keep"}]
    values["calibration"].update(samples=4, sequence_length=64, min_tokens=40, max_cold_experts=1.0)
    return Recipe.model_validate(values)


def planned(source: Path, together: int, scheme: dict[str, Any] = INT4) -> Plan:
    text = source.parent / "numbers.txt"
    text.write_text(TEXT)
    plan = with_text(make_plan(open_source(str(source)), recipe(scheme)), str(text))
    return replace(plan, needs=replace(plan.needs, together=together))


def digests(folder: Path) -> dict[str, str]:
    """Of all that does not say on what it was computed."""
    return {name: digest for name, digest in file_digests(folder).items() if name != MANIFEST_NAME}


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Artifacts by how many experts were solved together; 0: by themselves."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(batch, "ROWS", 32)
        return {
            together: run_plan(planned(source, together), folder / str(together)).out for together in (0, *TOGETHER)
        }


@pytest.mark.parametrize("together", TOGETHER[1:])
def test_how_many_are_solved_together_does_not_show(made, together):
    assert digests(made[together]) == digests(made[1])


def test_they_are_solved_as_by_themselves(made):
    same_figures(made[0], made[2])
    ours, theirs = (load_file(next(made[count].glob("*.safetensors"))) for count in (0, 2))
    packed = [name for name in ours if name.endswith("_packed")]
    moved = [(unpack_levels(ours[name], 4, 64) != unpack_levels(theirs[name], 4, 64)).float().mean() for name in packed]
    assert len(moved) == 3 * (1 + 1 + 4)
    assert max(moved) < 0.15


@pytest.mark.parametrize("strategy", FP8_SCHEMES)
def test_fp8_is_solved_together_as_by_itself(source, tmp_path, strategy):
    """By blocks too, half of each over a whole matrix: gate and up, one over the other, would share one, so each is by itself."""
    alone, together = (
        run_plan(planned(source, count, FP8_SCHEMES[strategy]), tmp_path / str(count)).out for count in (0, 2)
    )
    same_figures(alone, together)
    ours, theirs = (load_file(next(folder.glob("*.safetensors"))) for folder in (alone, together))
    solved = [name for name, tensor in ours.items() if tensor.dtype is torch.float8_e4m3fn]
    assert len(solved) == 3 * (1 + 1 + 4)
    assert max((ours[name] != theirs[name]).float().mean() for name in solved) < 0.15
    assert all(torch.equal(ours[f"{name}_scale"], theirs[f"{name}_scale"]) for name in solved if "down" not in name)


def same_figures(first: Path, second: Path) -> None:
    """What is recorded of matrices that were solved otherwise."""
    alone, together = (json.loads((folder / RECORD_NAME).read_bytes())["matrices"] for folder in (first, second))
    assert alone.keys() == together.keys()
    for module, found in alone.items():
        for key in ("method", "tokens", "borrowed_tokens", "dead_columns", "dampening", "reason"):
            assert together[module][key] == found[key], (module, key)
        assert together[module]["error"] == pytest.approx(found["error"], rel=0.05)
        assert together[module]["rtn_error"] == pytest.approx(found["rtn_error"], rel=0.05)


def test_on_a_device_they_are_run_as_they_were_written(source, made, tmp_path, monkeypatch):
    """There they are not read back, they are written by a thread of their own, and hidden states stay. Killed, the job
    goes on with the latter from disk."""
    plan, out = planned(source, 2), tmp_path / "out"
    plan = replace(plan, needs=replace(plan.needs, resident=True))
    with pretend_device():
        with monkeypatch.context() as context:
            killed_after(context, 4)
            with pytest.raises(Killed):
                run_plan(plan, out, device="cuda")
        run_plan(plan, out, device="cuda")
    assert digests(out) == digests(made[2])


@pytest.mark.parametrize("records", range(2, 7))
def test_killed_anywhere_they_end_in_the_same_bytes(source, made, tmp_path, monkeypatch, records):
    plan, out = planned(source, 2), tmp_path / "out"
    with monkeypatch.context() as context:
        killed_after(context, records)
        with pytest.raises(Killed):
            run_plan(plan, out)
    assert digests(run_plan(plan, out).out) == digests(made[2])


def test_by_both_sides_as_many_are_solved_together_as_by_themselves(source, tmp_path, monkeypatch):
    """Three experts and one more, and the shared expert and a dense MLP as batches of one: no tile is solved by itself."""
    scheme = {**INT4, "gptq": {"two_sided": True, "sweeps": 1}}
    alone = run_plan(planned(source, 0, scheme), tmp_path / "alone").out
    for name in ("solve_tile", "descend_tile"):
        monkeypatch.setattr(two_sided_tiles, name, lambda *_: pytest.fail("a tile was solved by itself"))
    out = run_plan(planned(source, 3, scheme), tmp_path / "together").out
    ours, theirs = (json.loads((folder / RECORD_NAME).read_bytes())["matrices"] for folder in (out, alone))
    assert ours.keys() == theirs.keys()
    for module, found in ours.items():
        sides, expected = found["two_sided"], theirs[module]["two_sided"]
        assert (sides["kept"], sides["dampening"]) == (expected["kept"], expected["dampening"]), module
    for key in ("error", "gptq_error", "rtn_error"):  # of one matrix they differ by what a tie moves
        ratios = [found["two_sided"][key] / theirs[module]["two_sided"][key] for module, found in ours.items()]
        assert math.prod(ratios) ** (1 / len(ratios)) == pytest.approx(1, abs=0.03)
    again = run_plan(planned(source, 1, scheme), tmp_path / "one").out
    assert digests(again) == digests(out)
