"""Options: each is declared once and means the same everywhere; what had another name before still works."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
from typer.main import get_command

from l4pack.cli.app import app

CLI = Path(__file__).parents[2] / "l4pack" / "cli"
INT4 = ("--recipe", "int4", "--sequence-length", 64, "--dry-run", "--json")
EARLIER = {"EarlierText": "--text", "EarlierSamples": "--samples"}


def declared(file):
    """The flags that a module declares options by."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    options = [call for call in calls if ast.unparse(call.func) == "typer.Option"]
    return [arg.value for call in options for arg in call.args if isinstance(arg, ast.Constant)]


def test_options_are_declared_in_one_place_and_once():
    for file in CLI.glob("*.py"):
        assert declared(file) == (["--version"] if file.name == "app.py" else []), file
    counts = Counter(name for file in CLI.glob("options/*.py") for name in declared(file))
    counts.subtract(EARLIER.values())
    assert {name for name, count in counts.items() if count != 1} == {"--fit"}  # to choose by it, and what it said


def test_the_command_line_modules_take_options_from_there_alone():
    for file in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("l4pack.cli."):
                names = [alias.name for alias in node.names if alias.name.endswith("Option")]
                assert not names or node.module == "l4pack.cli.options", (file, names)


def test_texts_are_named_alike_in_every_command():
    commands = {
        name: {param.name: param for param in command.params} for name, command in get_command(app).commands.items()
    }
    solve, measure = {"calibration", "calibration_samples"}, {"text", "samples"}
    for name in ("plan", "quantize", "coverage", "measure", "build"):
        assert solve <= commands[name].keys(), name
    for name in ("evaluate", "measure", "build"):
        assert not any(commands[name][option].hidden for option in measure), name
    for name in ("quantize", "coverage"):
        assert all(commands[name][option].hidden for option in measure), name
    missing = commands["quantize"].keys() - commands["build"].keys()
    assert not missing, "build takes what quantize takes"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a text. " * 200)
    return path


def planned(ended):
    """What a plan says, but for how much memory is free just now."""
    return {key: value for key, value in json.loads(ended.out).items() if key != "memory_limit_bytes"}


def test_earlier_names_work_and_say_the_new_ones(l4pack, text, tmp_path):
    command = ["quantize", "demo", *INT4, "--out", tmp_path / "out"]
    now = l4pack(*command, "--calibration", text, "--calibration-samples", 3)
    before = l4pack(*command, "--text", text, "--samples", 3)
    assert (now.code, now.err) == (0, "")
    assert (
        before.err
        == "warning: --text is called --calibration now\nwarning: --samples is called --calibration-samples now\n"
    )
    assert planned(before) == planned(now)


def test_an_option_under_both_names_is_refused(l4pack, text):
    ended = l4pack("coverage", "demo", "--text", text, "--calibration", text)
    assert ended.code == 2
    assert ended.err.startswith("error: --calibration and --text, what it was called before, are both given\nhint: ")


def test_a_plan_knows_the_text_that_quantize_will_take(l4pack, text, tmp_path):
    options = ["--recipe", "int4", "--calibration", text, "--calibration-samples", 3, "--sequence-length", 64, "--json"]
    plan = l4pack("plan", "demo", *options)
    assert plan.code == 0, plan.err
    assert planned(plan) == planned(l4pack("quantize", "demo", *options, "--out", tmp_path / "x", "--dry-run"))


BUILD = ["build", "demo", "--recipe", "int4-rtn", "--skip-evaluate", "--compute", "cpu"]


def test_build_shows_its_plan_and_stops(l4pack, tmp_path):
    command = [*BUILD, "--out", tmp_path / "out", "--dry-run"]
    record = json.loads(l4pack(*command, "--json").out)
    assert list(record) == ["plan"]
    assert (
        record["plan"]["artifact_bytes"]
        == json.loads(l4pack("plan", "demo", "-r", "int4-rtn", "--json").out)["artifact_bytes"]
    )
    assert "the job   peak memory" in l4pack(*command).out
    assert not [*tmp_path.iterdir()]


def test_build_cuts_shards_as_it_is_told(l4pack, tmp_path):
    record = json.loads(l4pack(*BUILD, "--out", tmp_path / "out", "--shard-size", "1MB", "--json").out)
    assert record["quantize"]["outcome"] == "done"
    assert record["verify"]["ok"]
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 5


def test_build_says_what_belongs_to_an_upload(l4pack, tmp_path):
    for options in (["--public"], ["--tag", "v1"]):
        ended = l4pack(*BUILD, "--out", tmp_path / "out", *options)
        assert ended.code == 2
        assert ended.err.startswith("error: --public and --tag go with --push")


def test_build_refuses_a_calibration_that_means_nothing(l4pack, tmp_path):
    ended = l4pack(*BUILD, "--out", tmp_path / "out", "--calibration-samples", 3)
    assert ended.code == 2
    assert "--calibration-samples means nothing to it" in ended.err


def test_build_calibrates_on_the_text_it_is_given(l4pack, text, tmp_path):
    command = ["build", "demo", *INT4, "--out", tmp_path / "out"]
    record = json.loads(l4pack(*command, "--calibration", text, "--calibration-samples", 3, "--seed", 5).out)
    quantize = ["quantize", *command[1:], "--calibration", text, "--calibration-samples", 3, "--seed", 5]
    assert record["plan"]["peak_ram_bytes"] == json.loads(l4pack(*quantize).out)["peak_ram_bytes"]
