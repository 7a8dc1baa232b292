"""A calibrated job that is killed or stopped anywhere goes on, and ends in the bytes of one never disturbed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import file_digests
from killing import TEXT, Killed, killed_after
from models import build
from spoil import SPOILS

from l4pack.calibration.run import CalibrationRun
from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.writer import ShardWriter
from l4pack.errors import BudgetError
from l4pack.plan import plan as plan_module
from l4pack.plan.plan import Plan, make_plan
from l4pack.quant import gptq
from l4pack.quantize.run import run_plan, work_folder
from l4pack.recipe import load_recipe
from l4pack.stream.walk import Walk

UNITS = 2 * 1 + 2 * (1 + 8)
COMMAND = ["quantize", "--recipe", "int4-uniform", "--calibration-samples", 4, "--sequence-length", 64]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("resumed") / "tiny-maverick", "maverick")


def planned(source: Path, text: Path) -> Plan:
    recipe = load_recipe("int4-uniform").calibrating(samples=4, sequence_length=64)
    return with_text(make_plan(open_source(str(source)), recipe), str(text))


@pytest.fixture(scope="module")
def undisturbed(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return file_digests(run_plan(planned(source, text), tmp_path_factory.mktemp("undisturbed") / "out").out)


@pytest.mark.parametrize("records", [1, 3, 5, 8, 15, 22])
def test_killed_at_a_layer_or_expert_it_ends_in_the_same_bytes(
    source, text, undisturbed, tmp_path, monkeypatch, records
):
    plan, out = planned(source, text), tmp_path / "out"
    with monkeypatch.context() as context:
        killed_after(context, records)
        with pytest.raises(Killed):
            run_plan(plan, out)
    assert not out.exists()
    solved, solve = [], gptq.prepare_problem
    monkeypatch.setattr(
        "l4pack.calibration.mlp.gptq.prepare_problem", lambda *a, **k: solved.append(None) or solve(*a, **k)
    )
    assert file_digests(run_plan(plan, out).out) == undisturbed
    assert len(solved) // 2 < UNITS if records > 3 else len(solved) // 2 <= UNITS


@pytest.fixture(scope="module")
def half_done(source, text, tmp_path_factory) -> Path:
    """The work folder of a job that was killed in its fourth layer."""
    out = tmp_path_factory.mktemp("half-done") / "out"
    with pytest.MonkeyPatch.context() as context:
        killed_after(context, 17)
        with pytest.raises(Killed):
            run_plan(planned(source, text), out)
    return work_folder(out)


LEFT = {
    "quantized-1.hidden": ("zeroed", "flipped", "swapped"),
    "original-1.hidden": ("removed", "halved"),
    "original-0.hidden": ("emptied",),
    "quantized-middle.hidden": ("zeroed",),
}


@pytest.mark.parametrize(("file", "kind"), [(file, kind) for file, kinds in LEFT.items() for kind in kinds])
def test_whatever_became_of_its_hidden_states_it_ends_in_the_same_bytes(
    source, text, undisturbed, half_done, tmp_path, monkeypatch, file, kind
):
    out, solved, solve = tmp_path / "out", [], gptq.prepare_problem
    shutil.copytree(half_done, work_folder(out))
    SPOILS[kind](work_folder(out) / "hidden" / file)
    monkeypatch.setattr(
        "l4pack.calibration.mlp.gptq.prepare_problem", lambda *a, **k: solved.append(None) or solve(*a, **k)
    )
    assert file_digests(run_plan(planned(source, text), out).out) == undisturbed
    assert len(solved) // 2 < UNITS  # what was solved is read back


def test_killed_again_while_walking_again_it_ends_in_the_same_bytes(
    source, text, undisturbed, half_done, tmp_path, monkeypatch
):
    out, layers, layer = tmp_path / "out", [], Walk._layer
    shutil.copytree(half_done, work_folder(out))
    SPOILS["zeroed"](work_folder(out) / "hidden" / "quantized-1.hidden")
    with monkeypatch.context() as context:
        killed_after(context, 3)
        with pytest.raises(Killed):
            run_plan(planned(source, text), out)
    monkeypatch.setattr(Walk, "_layer", lambda self, step, ready: layers.append(step) or layer(self, step, ready))
    assert file_digests(run_plan(planned(source, text), out).out) == undisturbed
    assert layers[0] > 0


@pytest.mark.parametrize("what", ["solved layer", "solved expert", "rounded", "journal"])
def test_what_was_changed_since_the_kill_is_made_again(source, text, undisturbed, half_done, tmp_path, what):
    plan, out = planned(source, text), tmp_path / "out"
    work = shutil.copytree(half_done, work_folder(out))
    finished = (work / "journal.jsonl").read_text()
    assert json.loads((work / "hidden" / "state.json").read_text())["state"]["found"]["layers"] == 3
    assert '"layer 3, shared expert":' in finished
    if what == "journal":
        (work / "journal.jsonl").write_text(finished.replace('"tokens":[', '"tokens":[9'))
    else:
        module = {"solved layer": "layers.0.feed_forward.", "solved expert": "experts.0.", "rounded": "lm_head"}[what]
        place = next(place for name, place in plan.places.items() if module in name)
        with (work / "artifact" / place.file).open("r+b") as stream:
            stream.seek(place.start)
            stream.write(bytes(place.nbytes))
    assert file_digests(run_plan(plan, out).out) == undisturbed


def test_killed_by_the_system_it_ends_in_the_same_bytes(source, text, undisturbed, tmp_path):
    script = (
        "import os, sys, signal, torch; torch.set_num_threads(1)\n"
        "import test_calibration_resume as t\n"
        "from l4pack.calibration.run import CalibrationRun\n"
        "solve, seen = CalibrationRun._solve, []\n"
        "def dying(self, *rest):\n"
        "    seen.append(None)\n"
        "    if len(seen) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return solve(self, *rest)\n"
        "CalibrationRun._solve = dying\n"
        "t.run_plan(t.planned(t.Path(sys.argv[1]), t.Path(sys.argv[2])), t.Path(sys.argv[3]))\n"
    )
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", script, source, text, out],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert '"layer 1, routed expert 1"' in (work_folder(out) / "journal.jsonl").read_text()
    assert file_digests(run_plan(planned(source, text), out).out) == undisturbed


def test_a_signal_stops_between_experts_and_the_same_command_goes_on(
    source, text, undisturbed, tmp_path, monkeypatch, l4pack
):

    solve, seen = CalibrationRun._solve, []

    def interrupted(self, *rest):
        seen.append(None)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return solve(self, *rest)

    command = [*COMMAND, source, "--calibration", text, "--out", tmp_path / "out"]
    with monkeypatch.context() as context:
        context.setattr(CalibrationRun, "_solve", interrupted)
        ended = l4pack(*command)
    assert ended.code == 75, ended.err
    assert ended.err.endswith("error: stopped; what is finished is kept\nhint: run the same command again to go on\n")
    ended = l4pack(*command)
    assert ended.code == 0, ended.err
    assert file_digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("write", [2, 9])
def test_a_disk_that_fills_up(source, text, undisturbed, tmp_path, monkeypatch, l4pack, write):
    put, seen = ShardWriter.write, []

    def full(self, name, offset, data):
        if "packed" in name:
            seen.append(None)
            if len(seen) > write:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        put(self, name, offset, data)

    command = [*COMMAND, source, "--calibration", text, "--out", tmp_path / "out"]
    with monkeypatch.context() as context:
        context.setattr(ShardWriter, "write", full)
        ended = l4pack(*command)
    assert ended.code not in (0, 75)
    error, hint = (line for line in ended.err.splitlines() if not line.startswith("quantizing: "))
    assert (error[:7], hint[:6]) == ("error: ", "hint: ")
    assert l4pack(*command).code == 0
    assert file_digests(tmp_path / "out") == undisturbed


def test_no_room_for_hidden_states(source, text, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BudgetError, match="no room for"):
        run_plan(planned(source, text), tmp_path / "out")


def test_a_job_begun_under_earlier_names_of_options_goes_on(source, text, undisturbed, tmp_path, monkeypatch, l4pack):
    """Both a command typed with them, and a journal that says them."""
    new = [*COMMAND, source, "--calibration", text, "--out", tmp_path / "out"]
    names = {"--calibration": "--text", "--calibration-samples": "--samples"}
    with monkeypatch.context() as context:
        options = plan_module.text_options
        context.setattr(
            plan_module, "text_options", lambda *given: {names.get(k, k): v for k, v in options(*given).items()}
        )
        context.setattr(plan_module, "EARLIER_OPTIONS", {})
        killed_after(context, 4)
        with pytest.raises(Killed):
            l4pack(*(names.get(word, word) for word in new))
    assert '"--text"' in (tmp_path / "out.partial" / "journal.jsonl").read_text()
    ended = l4pack(*(names.get(word, word) for word in new), "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["bytes_resumed"] > 0
    assert file_digests(tmp_path / "out") == undisturbed
    assert json.loads(l4pack(*new, "--json").out)["already_done"]


def test_other_tokens_are_another_job(source, text, tmp_path, monkeypatch, l4pack):
    out = tmp_path / "out"
    command = [
        "quantize",
        source,
        "--calibration",
        text,
        "--sequence-length",
        64,
        "--out",
        out,
        "--calibration-samples",
    ]
    with monkeypatch.context() as context:
        killed_after(context, 4)
        with pytest.raises(Killed):
            l4pack(*command, 4)
    ended = l4pack(*command, 3)
    assert ended.code == 2
    assert "--restart" in ended.err
    assert l4pack(*command, 3, "--restart").code == 0
