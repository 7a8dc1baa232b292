"""One model of memory: what it says of real models, of devices, and of libraries that are loaded."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from l4pack.calibration import batch
from l4pack.checkpoint.open import open_source
from l4pack.errors import BudgetError
from l4pack.model.config import known_config
from l4pack.plan.memory import (
    CUDA_LOADED,
    DIAGONAL,
    FOLIO,
    KERNELS_LOADED,
    MODEL_LOADED,
    PRODUCT_COLUMNS,
    SCALES_ROWS,
    TOGETHER_ROWS,
    Computing,
    Memory,
    Sight,
    measuring,
    solving,
    solving_together,
    walk_within,
)
from l4pack.plan.plan import RunLimits, make_plan
from l4pack.quant import gptq_batch, triangular, two_sided
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe
from l4pack.stream.compute import Compute
from l4pack.work.machine import ASKED, DEVICE, Room

MODELS = ("llama-4-scout", "llama-4-maverick")
SCOUT = known_config("llama-4-scout").text


def computing(model="llama-4-scout", device="cpu", itemsize=4, **others):
    return Computing(known_config(model).text, device, itemsize, 2048, 32 * 2048, **others)


def calibrated(model, recipe="int4", **limits):
    return make_plan(open_source(model), load_recipe(recipe), RunLimits(**limits))


def test_sizes_of_scout_by_hand():
    one = computing()
    assert one.attention == 4 * 5120 * 128 * (40 + 8 + 8 + 40)
    assert one.mlp == 4 * 3 * 5120 * 8192
    assert one.rows == 256
    # Beside its weights: levels, and for gate and up a Hessian, its factor and cross moments.
    by_hand = 3 * 5120 * 8192 // 2 + max(3 * 5120**2, 3 * 5120 * 8192 + 2 * 8192**2, 3 * 8192**2)
    assert solving(SCOUT, 0, 8192, cross=True) == 4 * by_hand
    # By both sides: the layer's gradients, and of gate and up three squares of their outputs, and five matrices.
    gate_up, down = 3 * 5120**2 + 3 * 8192**2 + 5 * 5120 * 8192, 3 * 8192**2 + 2 * 5120**2 + 5 * 5120 * 8192
    by_hand = 3 * 5120 * 8192 // 2 + 5120**2 + max(gate_up, down)
    assert solving(SCOUT, 0, 8192, cross=True, two_sided=True) == 4 * by_hand


def test_experts_together_by_both_sides_by_hand():
    """The pair's Hessian, its factor and cross moments, target and levels; of gate's or up's outputs three squares and what the
    layer's gradients are before down; and three copies of one of them with levels of two kinds. The layer's are there once."""
    matrix, hidden, inner = 5120 * 8192, 5120**2, 8192**2
    levels = 2 * matrix // 4 + matrix // 4
    gate = 3 * hidden + 2 * matrix + levels + 3 * inner + 3 * matrix + 2 * matrix // 4
    assert solving_together(SCOUT, 8192, 8, cross=True, two_sided=True) == 4 * (8 * gate + hidden)
    assert solving_together(SCOUT, 8192, 8, cross=True) < 4 * 8 * gate


@pytest.mark.parametrize(("gigabytes", "together", "resident"), [(12, 2, False), (40, 8, False), (141, 16, True)])
def test_by_both_sides_experts_are_together_before_hidden_states_stay(gigabytes, together, resident):
    free = Room(gigabytes * 10**9, DEVICE)
    plan = calibrated("llama-4-scout", "int4-best", accelerated=True, free_vram=free)
    assert (plan.needs.together, plan.needs.resident) == (together, resident)
    assert plan.needs.most_memory.vram <= free.nbytes
    between = calibrated("llama-4-scout", "int4-best", accelerated=True, free_vram=Room(80 * 10**9, DEVICE))
    assert (between.needs.together, between.needs.resident) == (16, False)


def test_what_is_solved_together_is_cut_as_planned():
    assert two_sided.TILE * 12 == DIAGONAL
    assert (TOGETHER_ROWS, SCALES_ROWS, PRODUCT_COLUMNS) == (batch.ROWS, gptq_batch.ROWS_AT_ONCE, triangular.TILE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("gigabytes", "together", "resident"), [(12, 2, False), (40, 8, False), (141, 16, True)])
def test_as_many_experts_are_solved_together_as_a_device_holds(model, gigabytes, together, resident):
    free = Room(gigabytes * 10**9, DEVICE)
    plan = calibrated(model, accelerated=True, free_vram=free)
    assert (plan.needs.together, plan.needs.resident) == (together, resident)
    assert plan.needs.memory.vram <= free.nbytes
    assert calibrated(model).needs.together == 0


@pytest.mark.parametrize("model", MODELS)
def test_measuring_takes_little_more_than_calibrating(model):
    needed = measuring(computing(model, streams=34), solved=True)
    assert needed.ram < 1.1 * calibrated(model).peak_ram_bytes


@pytest.mark.parametrize("model", MODELS)
def test_a_device_takes_what_the_machine_would(model):
    here, there = calibrated(model), calibrated(model, accelerated=True)
    assert here.peak_vram_bytes == 0
    # A device computes more rows at once, and the machine keeps the libraries and what is on its way.
    assert there.needs.memory.vram > here.peak_ram_bytes - MODEL_LOADED - 10**9
    assert there.needs.memory.ram > MODEL_LOADED + CUDA_LOADED
    walked = computing(model, models=2, streams=2).memory(scored=True)
    half = computing(model, "cuda", itemsize=2, models=2, streams=2).memory(scored=True)
    assert 0 < half.vram < walked.ram


def test_a_limit_on_the_device_is_kept_before_anything_is_read():
    needed = calibrated("llama-4-scout", accelerated=True).peak_vram_bytes
    with pytest.raises(BudgetError, match="of device memory, the limit is") as refused:
        calibrated("llama-4-scout", accelerated=True, max_vram=10**9)
    assert "--max-vram" in refused.value.hint
    assert calibrated("llama-4-scout", accelerated=True, max_vram=needed).peak_vram_bytes <= needed


def test_a_full_device_is_told_before_the_job_begins(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Compute, "device_room", lambda *_: Room(1000, DEVICE))
    plan = make_plan(open_source(str(checkpoint("text"))), load_recipe("int4-rtn"), RunLimits(accelerated=True))
    with pytest.raises(BudgetError, match=f"of device memory, the limit is .*{DEVICE}"):
        run_plan(plan, tmp_path / "out", device="cuda")
    assert not list(tmp_path.iterdir())


def test_a_walk_is_refused_by_either_memory():
    rooms = Room(10, ASKED), Room(10, DEVICE)
    assert walk_within(computing(), lambda _: Memory(10, 10), *rooms) == (Memory(10, 10), True)
    assert walk_within(computing(), lambda one: Memory(11 if one.ahead else 9), *rooms) == (Memory(9), False)
    with pytest.raises(BudgetError, match="--max-ram"):
        walk_within(computing(), lambda _: Memory(11, 10), *rooms)
    with pytest.raises(BudgetError, match=DEVICE):
        walk_within(computing(), lambda _: Memory(10, 11), *rooms)


@pytest.mark.parametrize(
    ("loaded", "modules"),
    [
        (KERNELS_LOADED, "l4pack.quantize.run, l4pack.quant.cpu"),
        (MODEL_LOADED, "l4pack.calibration.run, l4pack.evaluate.evaluate, transformers.models.llama4.modeling_llama4"),
    ],
)
def test_what_is_loaded_is_less_than_planned(loaded, modules):
    # Not getrusage: its maximum outlives exec, and would be that of the process that runs the tests.
    code = f"import {modules}; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 < 0.9 * loaded


def test_narrow_rows_are_planned_with_the_pages_they_map():
    text = known_config("llama-4-scout").text
    few, many = (Computing(text, "cpu", 4, 2048, tokens).memory().ram for tokens in (2048, 2_000_000))
    routed = 3 * 4 * text.num_local_experts * (2_000_000 - 2048)
    computing = Computing(text, "cpu", 4, 2048, 2_000_000)
    mapped = 2 * computing.rows * (computing.row + FOLIO) - 2 * 2048 * computing.row
    assert many - few == routed + min(mapped, many)


@pytest.mark.parametrize(("tiles", "measured"), [(1, 673_410_000), (3, 1_027_162_112)])
def test_seeing_takes_what_was_measured_at_scouts_size(tiles, measured):
    """With a text model of width 128 behind Scout's tower; more tiles are seen a few at a time."""
    config = known_config("llama-4-scout")
    text = config.text.model_copy(update={"hidden_size": 128})
    planned = Sight(config.vision, tiles, 0).running(text, 4)
    assert measured < planned < 1.3 * measured
    most = [Sight(config.vision, count, 0).running(text, 4) for count in (4, 17)]
    assert most[1] - most[0] == 13 * config.vision.patches * 128 * 4
