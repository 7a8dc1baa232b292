"""What a job must not harm, and must not believe: its source, a second starter, files that change while it runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import file_digests, quick_plan

from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.checkpoint.open import open_source
from l4pack.errors import L4packError, SourceError, UsageError
from l4pack.plan.plan import make_plan
from l4pack.quantize import run
from l4pack.quantize.execute import Executor
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe
from l4pack.work.folder import WorkFolder, claim
from l4pack.work.signals import stop_signals

SHARD = "model.safetensors"


@pytest.fixture
def source(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint("scout"), tmp_path / "source")


def planned(source: Path):
    return make_plan(open_source(str(source)), load_recipe("int4-rtn"))


# The source stays as it is.


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    "where", ["work", "artifact", "linked artifact", "linked shard", "hard-linked shard", "linked lock"]
)
def test_a_source_in_the_work_folder_is_never_touched(checkpoint, tmp_path, l4pack, where, marked, restart):
    work = tmp_path / "out.partial"
    claim(work, "quantize") if marked else work.mkdir()
    source = {"work": work / "source", "artifact": work / "artifact"}.get(where, tmp_path / "source")
    shutil.copytree(checkpoint("scout"), source)
    before = file_digests(source)
    if where == "linked artifact":
        (work / "artifact").symlink_to(source)
    elif "shard" in where:
        (work / "artifact").mkdir()
        link = work / "artifact" / SHARD
        link.symlink_to(source / SHARD) if where == "linked shard" else link.hardlink_to(source / SHARD)
    elif where == "linked lock":
        (work / "lock").symlink_to(source / SHARD)
    options = ["--restart"] if restart else []
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "out", *options)
    assert ended.code == (0 if restart and marked and where not in ("work", "artifact", "linked lock") else ended.code)
    assert ended.code in (0, 1, 2)
    assert ended.err.count("\n") in (0, 2)
    assert file_digests(source) == before


@pytest.mark.parametrize("out", ["source", "source/out", "source/deep/out", "link/out"])
def test_nothing_is_written_into_a_source(source, tmp_path, l4pack, out):
    (tmp_path / "link").symlink_to(source)
    before = sorted(path.name for path in source.iterdir())
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / out)
    assert ended.code == 2
    assert "which is written" in ended.err
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_source_whose_shard_is_a_link_into_the_work_folder_is_refused(source, tmp_path):
    claim(tmp_path / "out.partial", "quantize")
    (tmp_path / "out.partial" / "artifact").mkdir()
    (source / SHARD).rename(tmp_path / "out.partial" / "artifact" / SHARD)
    (source / SHARD).symlink_to(tmp_path / "out.partial" / "artifact" / SHARD)
    with pytest.raises(UsageError, match="which is read, lies in"):
        run_plan(planned(source), tmp_path / "out", restart=True)
    assert (source / SHARD).exists()


# A second starter.


@pytest.mark.parametrize("moment", ["before", "after"])
def test_one_that_starts_while_the_other_finishes_does_no_harm(checkpoint, tmp_path, monkeypatch, moment):
    plan, out, told = planned(checkpoint("scout")), tmp_path / "out", []
    remove = WorkFolder.remove

    def meanwhile(folder: WorkFolder) -> None:
        if moment == "after":
            remove(folder)
        if not told:
            told.append(None)
            told.append(run_plan(plan, out).already_done)
        if moment == "before":
            remove(folder)

    monkeypatch.setattr(WorkFolder, "remove", meanwhile)
    assert not run_plan(plan, out).already_done
    assert told == [None, True]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_that_waited_at_the_door_finds_the_finished_artifact(checkpoint, tmp_path, monkeypatch):
    """It saw no artifact, and the other one finished before it held the folder."""
    plan, out = planned(checkpoint("scout")), tmp_path / "out"
    owned, first = run.owned, []

    def late(*arguments, **options):
        if not first:
            first.append(None)
            assert not run_plan(plan, out).already_done
        return owned(*arguments, **options)

    monkeypatch.setattr(run, "owned", late)
    made = run_plan(plan, out)
    assert made.already_done
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_that_starts_while_the_other_works_is_told_so(checkpoint, tmp_path, monkeypatch):
    plan, out, told, task = planned(checkpoint("scout")), tmp_path / "out", [], Executor.run
    lock = threading.Lock()

    def meanwhile(executor, one):
        with lock:
            first = not told
            told.append("")
        if first:
            with pytest.raises(L4packError, match="another run is working") as caught:
                run_plan(plan, out, restart=True)
            told.append(caught.value.exit_code)
        task(executor, one)

    monkeypatch.setattr(Executor, "run", meanwhile)
    run_plan(plan, out)
    assert 1 in told
    assert out.is_dir()


def test_two_started_at_once_end_with_one_artifact(checkpoint, tmp_path, artifact):
    source = checkpoint("scout")
    command = [sys.executable, "-m", "l4pack", "quantize", source, "--recipe", "int4-rtn", "--compute", "cpu", "--out"]
    runs = [
        subprocess.Popen([*command, tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [(run.communicate(timeout=120)[1], run.returncode) for run in runs]
    assert {code for _, code in ended} <= {0, 1}
    assert all("another run is working" in err for err, code in ended if code)
    assert file_digests(tmp_path / "out") == file_digests(artifact("int4-rtn", "scout"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What changes while a job runs.


def replaced(path: Path) -> None:
    """Another file of the same size and time under the same name."""
    status, raw = path.stat(), bytearray(path.read_bytes())
    raw[-1] ^= 1
    other = path.with_name("other")
    other.write_bytes(raw)
    other.replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewritten(path: Path) -> None:
    """Other bytes in the same file, which keeps its time."""
    status, raw = path.stat(), bytearray(path.read_bytes())
    raw[-1] ^= 1
    with path.open("r+b") as stream:
        stream.write(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, rewritten])
@pytest.mark.parametrize("file", [SHARD, "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_file_that_changes_while_the_job_runs_is_named(source, tmp_path, monkeypatch, file, change):
    task, changed, lock = Executor.run, [], threading.Lock()

    def meanwhile(executor, one):
        with lock:
            if not changed:
                changed.append(change(source / file))
        task(executor, one)

    monkeypatch.setattr(Executor, "run", meanwhile)
    with pytest.raises(SourceError, match=f"was changed while the job ran: source {file} has changed"):
        run_plan(planned(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_put_back_while_the_job_runs_is_noticed(source, tmp_path, monkeypatch):
    """The job had opened the other one."""
    shutil.copy2(source / SHARD, tmp_path / "kept")
    record, done, lock = run.forget_damaged, [], threading.Lock()

    def before(*arguments):
        (source / SHARD).rename(tmp_path / "original")
        shutil.copy2(tmp_path / "kept", source / SHARD)
        record(*arguments)

    task = Executor.run

    def meanwhile(executor, one):
        task(executor, one)
        with lock:
            if not done:
                done.append((tmp_path / "original").replace(source / SHARD))

    monkeypatch.setattr(run, "forget_damaged", before)
    monkeypatch.setattr(Executor, "run", meanwhile)
    with pytest.raises(SourceError, match="was changed while the job ran"):
        run_plan(planned(source), tmp_path / "out")


@pytest.mark.parametrize("file", [SHARD, "tokenizer.json", "config.json"])
def test_a_file_that_changed_since_the_kill_is_named(source, tmp_path, monkeypatch, file):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_write_beside", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(planned(source), tmp_path / "out")
    if file == "config.json":
        value = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps(value, indent=7))
    else:
        replaced(source / file)
    with pytest.raises(UsageError, match=f"was begun as another job: source {file} has changed") as caught:
        run_plan(planned(source), tmp_path / "out")
    assert "--restart" in caught.value.hint
    run_plan(planned(source), tmp_path / "out", restart=True)


@pytest.mark.parametrize("file", [SHARD, "config.json"])
def test_a_source_that_changed_since_it_was_opened_is_refused(source, checkpoint, tmp_path, file):
    plan = planned(source)
    other = checkpoint("scout", intermediate_size=384)
    shutil.copyfile(other / file, source / file)
    with pytest.raises(SourceError, match="was changed while the job ran"):
        run_plan(plan, tmp_path / "out")


# What decides a job.


def test_a_calibrated_job_names_what_computes_it(checkpoint, tmp_path, monkeypatch):
    import torch

    plan, out = quick_plan(checkpoint("scout"), "int4"), tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_write_beside", stop)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, out)
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        with pytest.raises(UsageError, match=f"another job: threads was {threads} and is {threads + 1}$"):
            run_plan(plan, out)
    run_plan(plan, out)
    job = json.loads((out / MANIFEST_NAME).read_text())["job"]
    assert job["options"] == {
        "--recipe": "int4.yaml",  # its gates were changed
        "--calibration": "calibration.txt",
        "--calibration-samples": 2,
        "--sequence-length": 48,
        "--seed": 0,
    }
    assert job["computed_on"]["--compute"] == "cpu"
    assert job["computed_on"]["threads"] == threads
    assert job["computed_on"]["torch version"].startswith("2.")
    assert (out / MANIFEST_NAME).stat().st_size == plan.files[MANIFEST_NAME]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert run_plan(plan, out).already_done  # it is there, and says what made it


def test_a_rounded_job_is_the_same_anywhere(checkpoint, artifact):
    plan = make_plan(open_source(str(checkpoint("scout"))), load_recipe("int4-rtn"))
    assert not {"threads", "--compute", "torch version"} & plan.identity().parts.keys()
    job = json.loads((artifact("int4-rtn", "scout") / MANIFEST_NAME).read_text())["job"]
    assert job == {"options": {"--recipe": "int4-rtn"}}


def test_a_refusal_prints_the_earlier_command(checkpoint, tmp_path):
    command = [sys.executable, "-m", "l4pack", "quantize", str(checkpoint("scout")), "--out", str(tmp_path / "my out")]
    slow = [
        sys.executable,
        str(Path(__file__).parents[1] / "support" / "slow_run.py"),
        "0.05",
        *command[3:],
        "--recipe",
        "int4-rtn",
    ]
    process = subprocess.Popen([*slow, "--compute", "cpu"], stderr=subprocess.DEVNULL)
    journal = tmp_path / "my out.partial" / "journal.jsonl"
    while not journal.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 75
    refused = subprocess.run([*command, "--recipe", "fp8"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "another job: --recipe was int4-rtn and is fp8; " in refused.stderr
    assert f"hint: repeat the earlier command, l4pack quantize {command[4]} --out '{command[6]}' " in refused.stderr
    assert refused.stderr.count("\n") == 2


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_place_where_the_artifact_could_not_appear_is_noticed_at_once(checkpoint, tmp_path, monkeypatch, l4pack):
    ran = []

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(run, "check_writable", refuse)
    monkeypatch.setattr(Executor, "run", lambda *_: ran.append(None))
    ended = l4pack("quantize", checkpoint("scout"), "--recipe", "int4-rtn", "--out", tmp_path / "out")
    assert (ended.code, ran) == (1, [])
    assert ended.err == f"error: {tmp_path}: Permission denied\nhint: choose a folder you may write to\n"
