"""Jobs on a cluster of three nodes end in the bytes of one machine, whoever dies, and refuse what could not end so."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import file_digests, quick_plan
from ray_nodes import three_nodes
from ray_tasks import Nothing, colour_of_this_node, die, fail

from l4pack.cluster.cluster import Piece, Work
from l4pack.cluster.connect import connected
from l4pack.cluster.options import ClusterOptions, Share
from l4pack.cluster.sight import Look
from l4pack.errors import BudgetError, ClusterError, L4packError, StoppedError, UsageError
from l4pack.quantize import spread
from l4pack.quantize.run import run_plan

LITTLE = Share(1, 0, 1 << 20)


@pytest.fixture(scope="module")
def nodes():
    with three_nodes() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(nodes):
    """One connection for all tests: starting workers is what takes long."""
    with connected(ClusterOptions(nodes.address), threads=1) as joined:
        yield joined


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("maverick", shards=3)


@pytest.fixture
def plan(source):
    return quick_plan(source, "int4-rtn")


@pytest.fixture(scope="module")
def alone(artifact):
    return file_digests(artifact("int4-rtn", "maverick", shards=3))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Many tasks, although the model is tiny."""
    monkeypatch.setattr("l4pack.quantize.spread.PIECE_BYTES", 1 << 16)


def journal_of(out):
    return out.with_name(f"{out.name}.partial") / "journal.jsonl"


def test_three_nodes_make_the_bytes_of_one_machine(cluster, plan, alone, tmp_path):
    told, done = [], []
    cluster.show_on(told.append)
    result = run_plan(plan, tmp_path / "out", advance=done.append, cluster=cluster)
    assert file_digests(tmp_path / "out") == alone
    assert not journal_of(tmp_path / "out").parent.exists()
    assert sum(done) == result.read_bytes == plan.read_bytes
    assert told[-1].startswith("3 workers: ")


@pytest.mark.parametrize("trick", ["kill worker", "kill node"])
def test_whoever_is_killed_the_bytes_are_the_same(nodes, cluster, plan, alone, tmp_path, trick):
    with nodes.trick(trick, "second") as file:
        run_plan(plan, tmp_path / "out", cluster=cluster)
        assert not file.exists(), "nobody was killed"
    assert file_digests(tmp_path / "out") == alone
    if trick == "kill node":
        nodes.replace("second")


def test_a_slow_node_holds_up_nobody_but_itself(nodes, cluster, plan, alone, tmp_path):
    with nodes.trick("slow", "third"):
        run_plan(plan, tmp_path / "out", cluster=cluster)
    assert file_digests(tmp_path / "out") == alone


def test_a_full_disk_on_a_node_ends_the_job_and_it_goes_on_with_or_without_the_cluster(
    nodes, cluster, plan, alone, tmp_path
):
    with nodes.trick("full disk", "third"), pytest.raises(OSError, match="No space") as failed:
        run_plan(plan, tmp_path / "out", cluster=cluster)
    assert failed.value.errno == errno.ENOSPC
    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    for name, crew in (("out", cluster), ("other", None)):
        assert run_plan(plan, tmp_path / name, cluster=crew).resumed_bytes > 0
        assert file_digests(tmp_path / name) == alone


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_driver_that_is_killed_or_stopped_goes_on(nodes, cluster, source, plan, alone, tmp_path, number, code):
    out = tmp_path / "out"
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'l4pack'; "
               "from l4pack.quantize import spread; spread.PIECE_BYTES = 1 << 16; "
               "from l4pack.__main__ import main; main()"]  # fmt: skip
    options = ["--recipe", "int4-rtn", "--compute", "cpu", "--ray", nodes.address]
    with nodes.trick("slow"):
        driver = subprocess.Popen([*command, "quantize", str(source), "--out", str(out), *options])
        while driver.poll() is None and not (journal_of(out).exists() and '"finished"' in journal_of(out).read_text()):
            time.sleep(0.05)
        driver.send_signal(number)
        assert driver.wait(60) == code
    assert not out.exists()
    assert run_plan(plan, out, cluster=cluster).resumed_bytes > 0
    assert file_digests(out) == alone


# What could not end so is refused, and says which node lacks what.


def test_a_folder_that_a_node_does_not_see_is_named(nodes, cluster, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("/proc/self/cwd/out")  # each process sees its own
    with pytest.raises(
        UsageError, match=r"^node \S+ \(\w+\) does not see the folder /proc/self/cwd/out\.partial as"
    ) as told:
        run_plan(plan, out, cluster=cluster)
    assert "mounted at the same path" in told.value.hint


def test_a_source_that_a_node_does_not_see_is_named(cluster, source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    plan = quick_plan(Path("/proc/self/cwd/source"), "int4-rtn")
    with pytest.raises(UsageError, match="does not see the source, /proc/self/cwd/source, as"):
        run_plan(plan, tmp_path / "out", cluster=cluster)


def test_a_node_that_differs_is_named(cluster):
    look = Look(("l4pack",), (), {"the colour": colour_of_this_node})
    with pytest.raises(UsageError, match=r"^node \S+ \((\w+)\) differs: the colour is \1 there and none here"):
        cluster.check_nodes(look, LITTLE)


def test_a_share_that_no_node_has_is_refused(cluster):
    with pytest.raises(BudgetError, match=r"no node has 64 cores, 2 GPUs and 1\.05 MB of memory"):
        cluster.slots(replace(LITTLE, cpus=64, gpus=2))
    assert cluster.slots(LITTLE) == 3


def test_what_a_task_raises_is_raised_here_once_others_have_ended(cluster):
    found = []
    work = Work("failing", Nothing, None, fail)
    pieces = [Piece(str(number), number, cost=10 - number) for number in range(9)]
    with pytest.raises(L4packError, match="the second") as told:
        cluster.run(work, pieces, LITTLE, lambda piece, result: found.append(result), threading.Event())
    assert told.value.hint == "none"
    assert found[0] == 0, "the costliest comes first"
    assert 1 < len(found) < 8
    with pytest.raises(L4packError, match="the second"):
        cluster.submit(work, pieces[2], LITTLE).result()


def test_who_is_asked_to_stop_begins_nothing_more(cluster):
    stop, found = threading.Event(), []
    pieces = [Piece(str(number), number) for number in range(3, 20)]

    def done(piece: Piece, result: int) -> None:
        found.append(result)
        stop.set()

    with pytest.raises(StoppedError):
        cluster.run(Work("stopping", Nothing, None, fail), pieces, LITTLE, done, stop)
    assert 0 < len(found) < 8


def test_a_task_that_kills_whoever_does_it_is_given_up(cluster, monkeypatch):
    monkeypatch.setattr("l4pack.cluster.cluster.RETRIES", 1)
    with pytest.raises(ClusterError, match="was lost with its worker more than 1 times"):
        cluster.run(Work("deadly", Nothing, None, die), [Piece("one", 1)], LITTLE, lambda *_: None, threading.Event())


def test_a_source_that_is_fetched_is_refused(plan):
    fetched = replace(plan, checkpoint=replace(plan.checkpoint, store=None))
    with pytest.raises(UsageError, match="every node can read"):
        spread.spread_job(fetched, Path("shards"), None, "cpu")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--ray", "127.0.0.1:1"], 5, "no Ray cluster answers at 127.0.0.1:1: Connection refused"),
        (["--ray", "somewhere"], 2, "--ray somewhere is no address"),
        (["--ray", "auto", "--gpus-per-worker", 1], 2, "--gpus-per-worker is for devices"),
        (["--gpus-per-worker", 1], 2, "--gpus-per-worker goes with --ray"),
    ],
)
def test_what_was_typed_is_refused_in_a_line(l4pack, source, tmp_path, options, code, message):
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "o", "--compute", "cpu", *options)
    assert ended.code == code
    error, hint = ended.err.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")
    assert not (tmp_path / "o.partial").exists()


@pytest.mark.parametrize("gpus", [0, -1, 1.5])
def test_a_worker_takes_whole_devices_or_a_share_of_one(gpus):
    with pytest.raises(UsageError, match="is no share of a device"):
        ClusterOptions.of("auto", gpus, accelerated=True)


def test_without_ray_it_is_said_how_to_get_it(l4pack, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "o", "--ray", "auto")
    assert (ended.code, ended.err.splitlines()[0]) == (2, "error: --ray needs Ray: pip install 'l4pack[ray]'")
