"""A job on a cluster: tasks given out the longest first, and what workers wait for one another."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from l4pack.checkpoint.open import open_source
from l4pack.cli.hours import Hours
from l4pack.plan.plan import make_plan
from l4pack.recipe import load_recipe
from l4pack.timing.jobs import both_weights
from l4pack.timing.named import named_speeds
from l4pack.timing.spread import makespan, spread
from l4pack.timing.spread_evaluation import Evaluated, spread_evaluation

PLAN = ("plan", "llama-4-scout", "--recipe", "int4", "--on", "h100")


@pytest.fixture(scope="module")
def scout():
    limits = Hours("h100", None, None, "cpu", Path.cwd()).limits(None, None, None)
    return make_plan(open_source("llama-4-scout"), load_recipe("int4"), limits)


@pytest.mark.parametrize("tasks", [[5, 4, 3, 3, 3], [7, 7, 6, 6, 5, 5, 4, 4, 4], [1], [9, 1, 1, 1, 1]])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_longest_first_is_a_third_above_the_best_at_most(tasks, workers):
    best = min(
        max(
            sum(task for task, owner in zip(tasks, owners, strict=True) if owner == worker) for worker in range(workers)
        )
        for owners in itertools.product(range(workers), repeat=len(tasks))
    )
    assert best <= makespan(tasks, workers) <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9
    assert makespan(tasks, 1) == sum(tasks)


@pytest.mark.parametrize("recipe", ["int4", "int4-rtn"])
def test_more_workers_take_less_and_wait_more(recipe):
    plan, speeds = make_plan(open_source("llama-4-maverick"), load_recipe(recipe)), named_speeds("h100")
    found = [spread(plan, workers, speeds) for workers in (1, 8, 64)]
    assert found[0].waiting_share == pytest.approx(0, abs=1e-9)
    assert found[0].seconds == pytest.approx(found[0].alone_seconds)
    for fewer, more in itertools.pairwise(found):
        assert more.seconds < fewer.seconds
        assert more.waiting_share >= fewer.waiting_share
        assert more.read_bytes < fewer.read_bytes
        assert more.seconds * more.workers >= more.alone_seconds * (1 - 1e-9)
    assert (found[2].layer_barrier_seconds > 0) is (recipe == "int4")


def test_an_evaluation_on_more_workers_takes_less_and_each_reads_less():
    plan, speeds = make_plan(open_source("llama-4-maverick"), load_recipe("int4")), named_speeds("h100")
    job = Evaluated(plan.checkpoint.config.text, both_weights(plan), 65536, 2048, 2)
    one, eight, many = (spread_evaluation(job, workers, speeds) for workers in (1, 8, 64))
    assert one.seconds == pytest.approx(one.alone_seconds)
    assert one.seconds > eight.seconds > many.seconds
    assert one.waiting_share == pytest.approx(0, abs=1e-9)
    assert eight.waiting_share <= many.waiting_share
    weights = sum(model.nbytes for model in job.models)
    assert one.read_bytes == weights + 5 * 2 * 65536 * 5120 * 2 * 48
    assert weights / 64 < many.read_bytes < eight.read_bytes < one.read_bytes


def test_the_disk_of_a_cluster_is_a_third_more(scout):
    there = scout.on_cluster()
    assert there.needs.disk_bytes * 3 == scout.needs.disk_bytes * 4
    assert there.on_cluster() == there
    assert there.disk_bytes - scout.disk_bytes == scout.needs.disk_bytes // 3


def test_the_plan_says_what_a_cluster_takes(l4pack, scout):
    record = json.loads(l4pack(*PLAN, "--ray", 8, "--json").out)["cluster"]
    evaluated = record.pop("evaluate")
    assert 0 < evaluated["seconds"] < evaluated["seconds_alone"]
    assert record == json.loads(json.dumps(spread(scout, 8, named_speeds("h100")).record()))
    ended = l4pack(*PLAN, "--ray", 8)
    assert "of computing on 8 such workers" in ended.out
    assert "ends of stages cost" in ended.out


@pytest.mark.parametrize("workers", ["0", "auto", "1e9", "20000"])
def test_a_plan_is_asked_for_a_number_of_workers(l4pack, workers):
    ended = l4pack(*PLAN, "--ray", workers)
    assert (ended.code, ended.err.splitlines()[0]) == (2, f"error: --ray {workers} is no number of workers")


def test_evaluating_and_measuring_say_what_a_cluster_takes(l4pack, artifact, checkpoint, tmp_path):
    """Memory of each worker, the disk that they share, and the time; more workers, more waves side by side."""
    made, source = artifact("int4-rtn"), checkpoint("scout")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, 0123456789 times. " * 8)
    chosen = ("--text", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 48, "--dry-run", "--compute", "cpu")
    alone, shared = (
        json.loads(l4pack("evaluate", made, "--against", source, *chosen, *more, "--json").out)["plan"]
        for more in ((), ("--ray", 4))
    )
    assert shared["disk_bytes"] * 3 == alone["disk_bytes"] * 4
    assert shared["peak_ram_bytes"] == alone["peak_ram_bytes"]
    assert (shared["workers"], shared["cluster"]["workers"]) == (4, 4)
    assert "of computing on 4 such workers" in l4pack("evaluate", made, "--against", source, *chosen, "--ray", 4).out
    options = ("--options", "int8-g64", "--out", tmp_path / "out.json", *chosen)
    alone, shared = (
        json.loads(l4pack("measure", source, *options, *more, "--json").out)["plan"] for more in ((), ("--ray", 4))
    )
    assert (alone["workers"], alone["waves"]) == (1, 1)
    assert (shared["workers"], shared["waves"], shared["cluster"]["workers"]) == (4, 4, 4)
    assert shared["read_bytes"] == 4 * alone["read_bytes"]
    assert shared["disk_bytes"] > alone["disk_bytes"]


def test_building_says_what_a_cluster_takes(l4pack, checkpoint, tmp_path):
    """Of quantizing, and of evaluating after it unless that is left out."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, 0123456789 times. " * 8)
    command = ("build", checkpoint("scout"), "--recipe", "int4-rtn", "--out", tmp_path / "out")
    chosen = ("--text", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 48, "--dry-run", "--compute", "cpu")
    found = json.loads(l4pack(*command, *chosen, "--ray", 4, "--json").out)["cluster"]
    assert (found["workers"], found["evaluate"]["workers"]) == (4, 4)
    assert (
        "evaluate"
        not in json.loads(l4pack(*command, "--dry-run", "--skip-evaluate", "--ray", 4, "--json").out)["cluster"]
    )
    assert "cluster" not in json.loads(l4pack(*command, *chosen, "--json").out)
    assert "of computing on 4 such workers" in l4pack(*command, *chosen, "--ray", 4).out
