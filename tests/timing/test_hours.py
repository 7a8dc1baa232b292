"""What commands say of time: phases, price, other devices, and the largest calibration that ends in time."""

from __future__ import annotations

import json

import pytest
import yaml

from l4pack.checkpoint.open import open_source
from l4pack.errors import L4packError, RecipeError, UsageError
from l4pack.model.tensors import Role
from l4pack.plan.plan import make_plan
from l4pack.recipe import load_recipe
from l4pack.timing import kl
from l4pack.timing.jobs import quantizing
from l4pack.timing.named import ASSUMPTIONS, assumptions, named_speeds
from l4pack.timing.speeds import Speeds, predict
from l4pack.timing.tasks import task_seconds
from l4pack.timing.within import largest_calibration
from l4pack.timing.work import Kind, Work
from l4pack.units import parse_duration

PLAN = ("plan", "llama-4-scout", "--recipe", "int4")


@pytest.fixture(scope="module")
def scout():
    return make_plan(open_source("llama-4-scout"), load_recipe("int4"))


def test_work_takes_its_amount_over_the_rate_and_the_disk_hides_behind_it():
    work = Work()
    work.add("one", Kind.PRODUCT, 30)
    work.add("two", Kind.MEMORY, 10)
    work.add("two", Kind.READ, 500)
    speeds = Speeds("x", {Kind.PRODUCT: 10, Kind.MEMORY: 5, Kind.READ: 10}, "known")
    found = predict([work], speeds, price_per_hour=36)
    assert found.phases == {"one": 3, "two": 2, "waiting for the disk": 45}
    assert (found.seconds, found.dollars) == (50, 0.5)
    assert predict([work], Speeds("x", speeds.rates, "known", devices=5)).phases["waiting for the disk"] == 49


def test_the_plan_says_seconds_by_phase(l4pack):
    ended = l4pack(*PLAN, "--on", "h100", "--price", "3.6", "--json")
    predicted = json.loads(ended.out)["predicted"]
    assert predicted["seconds"] == pytest.approx(sum(predicted["phases"].values()))
    assert predicted["dollars"] == pytest.approx(predicted["seconds"] / 1000)
    assert {"moments", "factorization", "columns", "sweeps", "attention", "rounding"} <= predicted["phases"].keys()
    assert predicted["on"] == "h100"
    assert "not measured" in predicted["basis"]


def test_the_plan_says_hours_for_people(l4pack):
    ended = l4pack(*PLAN, "--on", "8xh100", "--price", "20")
    assert "on 8xh100 (assumed" in ended.out
    assert ", $" in ended.out
    assert "on this machine (measured on 2026-01-01)" in l4pack(*PLAN).out


def test_eight_devices_share_what_one_computes():
    work = quantizing(make_plan(open_source("llama-4-scout"), load_recipe("int4")), "cuda")[-1]
    one, eight = (predict([work], named_speeds(name)) for name in ("h100", "8xh100"))
    assert eight.phases["moments"] == pytest.approx(one.phases["moments"] / 8)


@pytest.mark.parametrize(
    ("name", "cores"), [("1-core", 1), ("64-core", 64), ("c7i.16xlarge", 32), ("c7a.xlarge", 4), ("m7i.large", 1)]
)
def test_cores_and_instances(name, cores):
    one, many = named_speeds("1-core"), named_speeds(name)
    assert many.rates[Kind.PRODUCT] == pytest.approx(
        one.rates[Kind.PRODUCT] * (1 + (cores - 1) * assumptions().scaling)
    )
    assert many.rates[Kind.NEAREST_MSE] == one.rates[Kind.NEAREST_MSE]
    assert f"{cores} cores" in many.basis


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--on", "h1000"), "no device is named 'h1000'"),
        (("--on", "gaudi3"), "no speed is known of gaudi3"),
        (("--on", "0-core"), "a host has 1 to 1024 cores"),
        (("--on", "z9.4xlarge"), "no instance is named 'z9.4xlarge'"),
        (("--on", "h100", "--within", "8 hours?"), "'8 hours?' is not a time"),
        (("--on", "h100", "--within", "8"), "'8' is not a time"),
        (("--on", "h100", "--within", "8h", "--calibration-samples", "4"), "--within chooses --calibration-samples"),
        (("--on", "h100", "--price", "-1"), "--price -1 is no price"),
        (("--on", "h100", "--price", "nan"), "--price nan is no price"),
        (("--devices", "mine.yaml"), "--devices goes with --on"),
        (("--on", "h100", "--recipe", "int4-rtn", "--within", "8h"), "recipe int4-rtn needs no calibration"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_can_not_be_meant(l4pack, arguments, error):
    ended = l4pack(*PLAN, *arguments)
    assert ended.code == 2
    first, hint = ended.err.splitlines()
    assert error in first
    assert hint.startswith("hint: ")
    assert ended.out == ""


def test_a_job_that_runs_here_runs_nowhere_else(l4pack, tmp_path):
    ended = l4pack("quantize", "demo", "--out", tmp_path / "out", "--on", "h100")
    assert (ended.code, ended.out) == (2, "")
    assert "--on says where a job would run" in ended.err


def test_a_device_of_the_users_own(l4pack, tmp_path):
    mine = {"title": "Mine", "memory": "80GiB", "source": "me"}
    speed = {"float32": 1e13, "float64": 1e12, "bfloat16": 1e14, "memory": 1e12, "source": "me"}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"devices": {"mine": {**mine, "speed": speed}}}))
    assert "on 2xmine (assumed" in l4pack(*PLAN, "--on", "2xmine", "--devices", file).out
    file.write_text(yaml.safe_dump({"devices": {"mine": {**mine, "speed": {**speed, "float32": -1}}}}))
    ended = l4pack(*PLAN, "--on", "mine", "--devices", file)
    assert ended.code == 2
    assert "devices.mine.speed.float32" in ended.err


@pytest.mark.parametrize(
    "spoil", [{"gpu": {}}, {"scaling": 2}, {"core": {"unknown": {"rate": 1, "why": ""}}}, {"x": 1}]
)
def test_a_bad_file_of_assumptions(tmp_path, spoil):
    file = tmp_path / "assumptions.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(ASSUMPTIONS.read_text()), **spoil}))
    with pytest.raises(RecipeError, match=r"assumptions\.yaml: "):
        assumptions(file)


def test_within_takes_the_most_samples_that_end_in_time(scout):
    speeds = named_speeds("16-core")

    def time(samples):
        return predict(quantizing(scout, tokens=samples * 2048), speeds).seconds

    chosen = largest_calibration(scout, time(100) + 1, speeds)
    assert (chosen.samples, chosen.full) == (100, 256)
    assert time(101) > time(100) + 1
    assert 1 < chosen.cost.least < chosen.cost.most < 1.5
    everything = largest_calibration(scout, time(256) + 1, speeds)
    assert (everything.samples, everything.cost) == (256, kl.Cost(1, 1))


def test_within_says_what_it_took(l4pack):
    command = (*PLAN, "--on", "2-core", "--within", "2d")
    record = json.loads(l4pack(*command, "--json").out)
    found = record["within"]
    assert 1 <= found["calibration_samples"] < found["full_samples"] == 256
    assert record["calibration"]["tokens"] == found["calibration_samples"] * 2048
    assert record["predicted"]["seconds"] <= 2 * 86400
    assert found["expected_kl_factor"][0] <= found["expected_kl_factor"][1]
    assert "as two small stand-ins showed it" in " ".join(l4pack(*command).out.split())


def test_within_less_than_the_least(l4pack):
    ended = l4pack(*PLAN, "--on", "2-core", "--within", "10min")
    assert ended.code == 3
    assert "even one calibration sample takes" in ended.err
    assert "hint: give more time" in ended.err


def test_kl_of_stand_ins_is_what_was_measured():
    """The figures in full are those of the benchmark."""
    from pathlib import Path

    measured = json.loads((Path(__file__).parents[2] / "benchmarks" / "kl-by-samples.json").read_text())
    assert kl.stand_ins().keys() == measured.keys()
    for name, one in kl.stand_ins().items():
        points = {point["samples"] * point["length"]: point["kl_mean"] for point in measured[name]}
        assert one.kl == pytest.approx({tokens: points[tokens] for tokens in one.kl}, rel=1e-3)
        assert [one.at(tokens / one.experts / one.hidden) for tokens in points] == pytest.approx(
            list(one.kl.values()), rel=1e-6
        )


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("90min", 5400), ("1h30m", 5400), ("2d", 172800), ("0.5h", 1800), ("45s", 45)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "h", "8 hours?", "-1h", "0s", "1e3s", "9999d", "1h2"])
def test_what_is_no_duration(text):
    with pytest.raises(UsageError, match="is not a time"):
        parse_duration(text)


def test_an_unknown_name_is_one_of_ours():
    with pytest.raises(L4packError):
        named_speeds("nothing at all")


def test_tasks_take_what_the_job_takes(scout):
    """All tasks one after another are the job's phases, but for loading, reading back and writing."""
    speeds = named_speeds("16-core")
    tasks, phases = task_seconds(scout, speeds), predict(quantizing(scout), speeds).phases
    assert tasks.rounding == pytest.approx(phases["rounding"])
    assert 48 * tasks.attention == pytest.approx(phases["attention"])
    others = {"starting", "rounding", "attention", "loading", "reading back", "writing", "waiting for the disk"}
    computing = sum(seconds for name, seconds in phases.items() if name not in others)
    mlps = 48 * (tasks.mlps[Role.SHARED_EXPERT] + 16 * tasks.mlps[Role.ROUTED_EXPERT])
    assert mlps == pytest.approx(computing)


def test_what_needs_no_text_has_no_other_tasks():
    plan = make_plan(open_source("llama-4-scout"), load_recipe("int4-rtn"))
    found = task_seconds(plan, named_speeds("16-core"))
    assert found.rounding > 0
    assert (found.attention, found.mlps) == (0, {})


def test_evaluating_and_building_say_their_time_before_they_begin(l4pack, artifact, checkpoint, tmp_path):
    source, made = checkpoint(), artifact("int4-rtn")
    few = ("--samples", 2, "--sequence-length", 40)
    ended = l4pack("evaluate", made, "--against", source, *few, "--dry-run", "--json")
    plan = json.loads(ended.out)["plan"]
    assert (plan["tokens"], plan["sequences"]) == (80, 2)
    assert plan["read_bytes"] > 0
    assert plan["predicted"]["phases"].keys() >= {"attention", "experts", "scoring", "digesting"}
    shown = l4pack("evaluate", made, "--against", source, *few, "--dry-run", "--on", "h100", "--price", 3)
    assert "80 tokens in 2 sequences" in shown.out
    assert "on h100 (assumed" in shown.out
    assert not list(made.parent.glob("*.partial"))
    ended = l4pack("build", source, "--recipe", "int4-rtn", "--out", tmp_path / "out", *few, "--dry-run", "--json")
    predicted = json.loads(ended.out)["plan"]["predicted"]
    assert predicted["phases"].keys() >= {"rounding", "verifying", "scoring"}


def test_what_was_done_stands_beside_what_was_predicted(l4pack, checkpoint, tmp_path):
    source, out = checkpoint(), tmp_path / "out"
    command = ("build", source, "--recipe", "int4-rtn", "--out", out, "--samples", 2, "--sequence-length", 40)
    steps = json.loads(l4pack(*command, "--json").out)
    for step in ("quantize", "verify", "evaluate"):
        assert steps[step]["predicted_seconds"] > 0
        assert steps[step]["seconds"] > 0
    assert "Predicted" in l4pack(*command).out
    ended = l4pack("evaluate", out, "--against", source, "--samples", 3, "--sequence-length", 40, "--json")
    run = json.loads(ended.out)["run"]
    assert run["predicted_seconds"] > 0
    assert run["seconds"] > 0
