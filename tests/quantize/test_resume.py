"""Interruptions of every kind: nothing that looks finished appears, and going on ends in the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import file_digests
from dying_run import DyingRuns
from safetensors.torch import load_file, save_file

from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.writer import ShardWriter
from l4pack.errors import StoppedError, UsageError
from l4pack.plan import plan as planning
from l4pack.plan.extents import task_extents
from l4pack.plan.plan import make_plan
from l4pack.quantize.execute import Executor
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe
from l4pack.work import threads
from l4pack.work.files import write_atomic
from l4pack.work.identity import Identity
from l4pack.work.progress import Shown

SLOW_RUN = Path(__file__).parents[1] / "support" / "slow_run.py"
KILLS = 20


@pytest.fixture(scope="module")
def die_in():
    runs = DyingRuns()
    yield runs.die_in
    runs.close()


@pytest.fixture
def source(checkpoint):
    return checkpoint("maverick", shards=3)


@pytest.fixture
def plan(source):
    return make_plan(open_source(str(source)), load_recipe("int4-rtn"))


@pytest.fixture
def undisturbed(artifact):
    return file_digests(artifact("int4-rtn", "maverick", shards=3))


def start(source, out, *options, pause=0.01, recipe="int4-rtn"):
    command = [sys.executable, str(SLOW_RUN), str(pause), "quantize", str(source), "--recipe", recipe]
    return subprocess.Popen(
        [*command, "--out", str(out), "--compute", "cpu", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def journal_of(out):
    return out.with_name(f"{out.name}.partial") / "journal.jsonl"


def finished_tasks(out):
    path = journal_of(out)
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(len(json.loads(line).get("finished", ())) for line in lines if line.endswith("}"))


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_random_and_gone_on_it_ends_in_the_same_bytes(die_in, source, plan, undisturbed, tmp_path, seed):
    out = tmp_path / "maverick-int4-rtn"
    dice = random.Random(seed)
    for _ in range(dice.randint(1, 3)):
        left = len(plan.tasks) - finished_tasks(out)
        moment = dice.choice(["task, before", "task, after"])
        assert die_in(moment, dice.randrange(left) if left else 0, source, "int4-rtn", out) in (-signal.SIGKILL, 0)
        if out.exists():  # only when no task was left to die in
            assert not left
            break
        if dice.random() < 0.5:  # a power cut tears the last line
            written = journal_of(out).read_bytes()
            journal_of(out).write_bytes(written[: max(len(written) - dice.randint(1, 30), 0)])
    result = run_plan(plan, out)
    assert file_digests(out) == undisturbed
    assert result.already_done or result.read_bytes + result.resumed_bytes == plan.read_bytes
    assert not journal_of(out).parent.exists()


@pytest.mark.parametrize(
    ("point", "after", "appeared"),
    [
        ("task, before", 0, False),
        ("small file, before", 0, False),
        *(("small file, after", number, False) for number in range(5)),
        ("appearance, before", 0, False),
        ("appearance, before", 6, False),
        ("tidying, before", 0, True),
        ("tidying, after", 0, True),
        ("removal, before", 0, True),
    ],
)
def test_killed_while_finishing(die_in, source, plan, undisturbed, tmp_path, point, after, appeared):
    out = tmp_path / "maverick-int4-rtn"
    assert die_in(point, after, source, "int4-rtn", out) == -signal.SIGKILL
    assert out.exists() is appeared
    result = run_plan(plan, out)
    assert result.already_done is appeared
    assert file_digests(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.fixture
def stop_half_way(monkeypatch):
    """Run a plan and ask it to stop as soon as something of it is journalled."""

    def stop(plan, out):
        run_task, asked = Executor.run, []

        def ask(nbytes: int) -> None:
            if nbytes and not asked:  # a second signal would end the tests
                asked.append(nbytes)
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(threads, "SYNC_SECONDS", 0.001)
            patch.setattr(Executor, "run", lambda self, task: (time.sleep(0.01), run_task(self, task)))
            with pytest.raises(StoppedError, match="what is finished is kept"):
                run_plan(plan, out, shown=Shown(ask))

    return stop


def test_what_was_done_is_not_read_again(stop_half_way, plan, undisturbed, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "out"
    stop_half_way(plan, out)
    assert signal.getsignal(signal.SIGINT) is before
    assert not out.exists()
    done, ran = finished_tasks(out), []
    run_task = Executor.run
    monkeypatch.setattr(Executor, "run", lambda self, task: (ran.append(task), run_task(self, task)))
    result = run_plan(plan, out)
    assert done > 0
    assert len(ran) == len(plan.tasks) - done
    assert result.resumed_bytes > 0
    assert result.read_bytes == sum(task.read_bytes for task in ran)
    assert file_digests(out) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_safely(source, plan, undisturbed, tmp_path, number):
    out = tmp_path / "out"
    process = start(source, out)
    wait_until(lambda: finished_tasks(out) > 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == "error: stopped; what is finished is kept\nhint: run the same command again to go on\n"
    assert not out.exists()
    assert 3 < finished_tasks(out) < len(plan.tasks)
    assert run_plan(plan, out).resumed_bytes
    assert file_digests(out) == undisturbed


def test_two_runs_into_one_folder(source, plan, tmp_path, l4pack):
    out = tmp_path / "out"
    process = start(source, out, pause=0.3)
    wait_until(lambda: journal_of(out).exists(), process)
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", out)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert ended.code == 1
    assert ended.err.startswith(f"error: another run is working in {out}.partial\nhint: ")
    assert process.returncode == 75


@pytest.mark.parametrize("change", ["recipe", "source", "version", "shard size"])
def test_a_changed_job_is_refused_unless_restarted(die_in, source, plan, tmp_path, l4pack, monkeypatch, change):
    out, copy = tmp_path / "out", shutil.copytree(source, tmp_path / "tiny-maverick")
    die_in("task, after", 20, copy, "int4-rtn", out)
    begun = journal_of(out).read_bytes()
    named = {
        "recipe": "--recipe was int4-rtn and is fp8; recipe: ",
        "source": "source tokenizer_config.json has changed\n",
        "version": "l4pack version was ",
        "shard size": "--shard-size was not given and is 300000B; layout has changed\n",
    }
    command = ["quantize", copy, "--out", out, "--recipe", "fp8" if change == "recipe" else "int4-rtn"]
    if change == "source":
        (copy / "tokenizer_config.json").write_text("{}")
    elif change == "version":
        monkeypatch.setattr(planning, "__version__", "9.9")
    elif change == "shard size":
        command += ["--shard-size", "300kB"]
    refused = l4pack(*command)
    assert refused.code == 2
    assert refused.err.startswith(f"error: {out}.partial was begun as another job: {named[change]}")
    assert refused.err.count("\n") == 2
    assert "--restart" in refused.err
    assert journal_of(out).read_bytes() == begun
    assert not out.exists()
    assert l4pack(*command, "--restart").code == 0
    assert out.is_dir()


def test_a_finished_job_is_known(source, tmp_path, l4pack):
    command = ["quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "out"]
    assert l4pack(*command).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = l4pack(*command)
    assert again.code == 0
    assert "holds this artifact already; nothing was done" in again.out
    assert json.loads(l4pack(*command, "--json").out)["already_done"] is True
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    other = l4pack("quantize", source, "--recipe", "fp8", "--out", tmp_path / "out")
    assert other.code == 2
    assert "exists and is not this artifact" in other.err


def flip(path, place):
    """Another bit, the same size."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("file", "place", "said"),
    [("model.safetensors", -1, "a tensor"), ("model.safetensors", 400_000, "a tensor"),
     ("tokenizer.json", 300, "tokenizer.json"), ("generation_config.json", 20, "generation_config.json"),
     ("l4pack-manifest.json", -90, "a tensor")],
)  # fmt: skip
def test_a_finished_job_whose_bytes_have_changed_is_not_done(source, tmp_path, l4pack, file, place, said):
    command = ["quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "out"]
    assert l4pack(*command).code == 0
    flip(tmp_path / "out" / file, place)
    again = l4pack(*command)
    assert (again.code, again.out) == (2, "")
    assert f"is this artifact, but {said} is not as it was written" in again.err


def test_a_finished_job_whose_source_was_trained_on_is_another(source, tmp_path, l4pack):
    """The same names, sizes and headers, other weights: "nothing was done" would be a lie."""
    again = Path(shutil.copytree(source, tmp_path / "source"))
    command = ["quantize", again, "--recipe", "int4-rtn", "--out", tmp_path / "out"]
    assert l4pack(*command).code == 0
    shards = {path: load_file(path) for path in again.glob("*.safetensors")}
    path, name = next(
        (path, name) for path, state in shards.items() for name in state if name.endswith("experts.down_proj")
    )
    shards[path][name][1] *= 1.01
    save_file(shards[path], path, {"format": "pt"})
    ended = l4pack(*command)
    assert (ended.code, ended.out) == (2, "")
    assert "when it had other weights" in ended.err


def test_an_empty_folder_may_be_filled_and_a_full_one_not(source, plan, tmp_path):
    (tmp_path / "empty").mkdir()
    run_plan(plan, tmp_path / "empty")
    for make in (lambda path: path.write_text("x"), lambda path: path.mkdir() or (path / "notes").write_text("x")):
        out = tmp_path / f"taken{len(list(tmp_path.iterdir()))}"
        make(out)
        with pytest.raises(UsageError, match="exists and is not this artifact"):
            run_plan(plan, out)


@pytest.mark.parametrize("damage", ["gone", "shorter", "zeroed", "one bit"])
def test_begun_shards_that_somebody_changed_are_made_again(stop_half_way, plan, undisturbed, tmp_path, damage):
    out = tmp_path / "out"
    stop_half_way(plan, out)
    written = {extent for task in plan.tasks if task.key in finished_keys(out) for extent in written_by(plan, task)}
    place = plan.places[written.pop().tensor]
    shard = tmp_path / "out.partial" / "artifact" / place.file
    raw = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    elif damage == "shorter":
        shard.write_bytes(raw[: place.start])
    elif damage == "zeroed":
        shard.write_bytes(bytes(len(raw)))
    else:
        raw[place.start] ^= 1
        shard.write_bytes(raw)
    run_plan(plan, out)
    assert file_digests(out) == undisturbed


def written_by(plan, task):
    return task_extents(task, plan.recipe)


def finished_keys(out):
    lines = journal_of(out).read_text().splitlines()
    return {key for line in lines for key in json.loads(line).get("finished", ())}


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8", "fp8-block", "meta-fp8"])
def test_the_journal_knows_the_bytes_of_every_task(checkpoint, tmp_path, recipe, monkeypatch):
    """In slices too: what a task says it writes is what it writes, in that order."""
    monkeypatch.setattr(planning, "SLAB_LIMITS", (1,))
    plan = make_plan(open_source(str(checkpoint("maverick", intermediate_size=384))), load_recipe(recipe))
    kept, close = [], ShardWriter.close

    def look(writer):
        kept.append({task.key: writer.digest(written_by(plan, task)) for task in plan.tasks})
        close(writer)

    journals, record = {}, Journal.record
    monkeypatch.setattr(ShardWriter, "close", look)
    monkeypatch.setattr(
        Journal, "record", lambda self, **given: (record(self, **given), journals.update(self.finished))
    )
    run_plan(plan, tmp_path / "out")
    assert kept == [journals]
    sizes = Counter(plan.places[extent.tensor].file for task in plan.tasks for extent in written_by(plan, task))
    assert sizes


def test_what_a_task_wrote_is_checked_even_when_its_shard_was_complete(die_in, source, plan, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert die_in("small file, before", 0, source, "int4-rtn", out) == -signal.SIGKILL
    for shard in (tmp_path / "out.partial" / "artifact").glob("*.safetensors"):
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 128
        shard.write_bytes(raw)
    result = run_plan(plan, out)
    assert 0 < result.resumed_bytes < plan.read_bytes
    assert file_digests(out) == undisturbed


@pytest.mark.parametrize("out", [".", "/", "..", "link"])
def test_places_where_no_folder_can_appear(source, plan, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(UsageError, match="can't be made in one step"):
        run_plan(plan, Path(out))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_dry_run_writes_nothing(source, tmp_path, l4pack):
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "out", "--dry-run", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["artifact_bytes"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("calls", [0, 5, 60])
def test_a_disk_that_fills_up(source, undisturbed, tmp_path, l4pack, monkeypatch, calls):
    command = ["quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "out", "--compute", "cpu"]
    write, written = os.pwrite, []

    def full(descriptor, data, offset):
        written.append(offset)
        if len(written) > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        ended = l4pack(*command)
    assert ended.code == 3
    assert ended.err == "error: No space left on device\nhint: free some space, then run the same command again\n"
    assert not (tmp_path / "out").exists()
    assert l4pack(*command).code == 0
    assert file_digests(tmp_path / "out") == undisturbed


def test_a_journal_that_cannot_be_written_stops_the_job_at_once(plan, tmp_path, monkeypatch):
    ran = []
    run_task = Executor.run
    monkeypatch.setattr(Executor, "run", lambda self, task: (ran.append(task), time.sleep(0.01), run_task(self, task)))
    monkeypatch.setattr(threads, "SYNC_SECONDS", 0.01)

    def full(self, **_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "record", full)
    with pytest.raises(OSError, match="No space left"):
        run_plan(plan, tmp_path / "out")
    assert len(ran) < len(plan.tasks) / 2


FULL_DISK = """
set -e
mount -t tmpfs -o size={size} tmpfs {disk}
set +e
{command} --out {disk}/out 2> {folder}/full.err
echo $? > {folder}/full.code
ls {disk} > {folder}/full.ls
set -e
mount -o remount,size=64m {disk}
{command} --out {disk}/out --json > {folder}/resumed.json
cp -r {disk}/out {folder}/out
"""


@pytest.mark.parametrize("size", ["64k", "1m"])
def test_a_disk_that_is_really_full(source, plan, undisturbed, tmp_path, size):
    """On a small file system of its own; a kernel that gives users none runs the same job under a file size limit."""
    command = f"{sys.executable} -m l4pack quantize {source} --recipe int4-rtn --compute cpu"
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        limited = subprocess.run(
            ["sh", "-c", f"ulimit -f 64; {command} --out {tmp_path}/out"], capture_output=True, text=True
        )
        assert (limited.returncode, limited.stderr.count("\n")) == (3, 2)
        return
    script = FULL_DISK.format(size=size, disk=disk, folder=tmp_path, command=command)
    subprocess.run(["unshare", "-rm", "sh", "-c", script], check=True, timeout=120)
    assert (tmp_path / "full.code").read_text() == "3\n"
    error, hint = (tmp_path / "full.err").read_text().splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: free some space")
    assert (tmp_path / "full.ls").read_text() == "out.partial\n"
    assert file_digests(tmp_path / "out") == undisturbed


def test_a_job_too_large_for_the_disk_does_not_begin(plan, tmp_path, monkeypatch, l4pack, source):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "out")
    assert ended.code == 3
    assert "more disk, 1.00 kB are free\nhint: free some space" in ended.err


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch, l4pack, code):
    def refuse(self, *_, **__):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "out")
    assert ended.code == 1
    assert ended.err == f"error: {tmp_path}/out.partial: {os.strerror(code)}\nhint: choose a folder you may write to\n"


JOB = Identity({"--seed": 0})


def test_the_journal_drops_what_a_crash_tore(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, JOB)
    journal.record({"a": "1", "b": "2"}, {"t": "0"})
    journal.record({"c": "3"})
    journal.close()
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {*range(0, len(whole), 11), *ends, *(end + 1 for end in ends)}:
        path.write_bytes(whole[:cut])
        again = Journal(path, JOB)
        again.record({"d": "4"})
        again.close()
        kept = Journal(path, JOB)
        kept.close()
        lines = whole[:cut].count(b"\n")
        first = {"a": "1", "b": "2"} if lines > 1 else {}
        assert kept.finished == {"d": "4"} | first | ({"c": "3"} if lines > 2 else {})
        assert kept.digests == ({"t": "0"} if lines > 1 else {})


def test_the_journal_ends_where_somebody_wrote_in_it(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, JOB)
    for key in "abc":
        journal.record({key: key}, results={key: {"tokens": [1, 2.5, None, "\u2028é"]}})
    journal.close()
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 32]) + whole[place + 1 :])
        again = Journal(path, JOB)
        again.close()
        assert list(again.finished) == list("abc")[: max(whole[:place].count(b"\n") - 1, 0)]


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"finished": 5}',
        b"0" * 9,
    ],
)
def test_lines_that_are_no_entries_end_the_reading(tmp_path, line):
    """Even if they bear the digest that a line must."""
    path = tmp_path / "journal.jsonl"
    Journal(path, JOB).close()
    head = path.read_bytes()
    for body in (line, line.removesuffix(b"}")):
        chained = hashlib.sha256(head[-67:-3] + body).hexdigest().encode()
        for bad in (line + b"\n", body + b',"chain":"' + chained + b'"}\n'):
            path.write_bytes(head + bad)
            again = Journal(path, JOB)
            again.close()
            assert (again.finished, again.digests, again.results) == ({}, {}, {})
            assert path.read_bytes() == head


def test_a_journal_without_an_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("l4pack.checkpoint.journal.MAX_LINE_BYTES", 1000)
    path = tmp_path / "journal.jsonl"
    Journal(path, JOB).close()
    with path.open("ab") as stream:
        stream.write(b" " * 100_000)
    Journal(path, JOB).close()
    assert path.stat().st_size < 1000


def test_the_journal_forgets(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, JOB)
    journal.record({"a": "1", "b": "2"}, {"t": "0", "u": "0"})
    journal.forget({"a"}, {"t"})
    journal.record({"c": "3"})
    journal.close()
    again = Journal(path, JOB)
    again.close()
    assert (again.finished, again.digests) == ({"b": "2", "c": "3"}, {"u": "0"})


def test_a_short_write_of_the_journal_is_an_error(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl", JOB)
    monkeypatch.setattr(os, "write", lambda _, raw: len(raw) - 1)
    with pytest.raises(OSError, match="No space left"):
        journal.record({"a": "1"})


def test_a_journal_of_another_job_names_what_changed_and_the_command(tmp_path):
    path = tmp_path / "journal.jsonl"
    command = "l4pack quantize 'my model' --out x"
    Journal(path, Identity({f"--{name}": 0 for name in "abcde"}), command).close()
    with pytest.raises(UsageError) as caught:
        Journal(path, Identity({f"--{name}": 1 for name in "abcde"}))
    assert caught.value.message == (
        f"{tmp_path} was begun as another job: --a was 0 and is 1; --b was 0 and is 1; --c was 0 and is 1; and 2 more"
    )
    assert caught.value.hint == f"repeat the earlier command, {command}; or add --restart to begin again"


def test_a_journal_never_keeps_a_token(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, JOB, "l4pack quantize https://user:hf_abcDEF123@hub").close()
    assert b"abcDEF123" not in path.read_bytes()


def test_a_small_file_is_old_or_new_and_never_half(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
