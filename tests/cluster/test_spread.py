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
from killing import Killed, killed_after
from ray_nodes import three_nodes
from ray_tasks import Nothing, colour_of_this_node, die, fail

from l4pack.cluster.cluster import Piece, Work
from l4pack.cluster.connect import connected
from l4pack.cluster.options import ClusterOptions, Share
from l4pack.cluster.sight import Look
from l4pack.errors import BudgetError, ClusterError, L4packError, StoppedError, UsageError
from l4pack.quantize import spread
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe
from l4pack.stream.layer import Blocks
from l4pack.work.progress import Shown

SMALL = Share(1, 0, 1 << 20)


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
    monkeypatch.setattr(spread, "PIECE_BYTES", 1 << 16)


def journal_of(out):
    return out.with_name(f"{out.name}.partial") / "journal.jsonl"


def test_three_nodes_make_the_bytes_of_one_machine(cluster, plan, alone, tmp_path):
    told, done = [], []
    cluster.show_on(told.append)
    result = run_plan(plan, tmp_path / "out", shown=Shown(done.append), cluster=cluster)
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


# Calibrating: several stages a layer, hidden states in files that all workers write.

LITTLE = {
    "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 2,
}  # fmt: skip
GPTQ = {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32, "method": "gptq",
        "gptq": {"act_order": True, "asymmetric": 1.0, "sweeps": 1}}  # fmt: skip
INT4 = {
    "schemes": {"int4": GPTQ},
    "rules": [
        {"roles": ["routed_expert", "shared_expert", "dense_mlp"], "scheme": "int4"},
        {"roles": "all", "scheme": "keep"},
    ],
}
STATIC = load_recipe("fp8-static").model_dump(mode="json") | {"kv_cache": {"dtype": "fp8", "strategy": "head"}}
RECIPES = {
    name: Recipe.model_validate(
        {
            "title": "Little",
            **values,
            "name": name,
            "calibration": {"samples": 4, "sequence_length": 40, "max_cold_experts": 1.0, "max_fallbacks": 1.0},
        }
    )
    for name, values in {"int4": INT4, "static": STATIC}.items()
}


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Many batches of sequences and blocks of rows, although there are few; as many wherever a job runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blocks, "on", classmethod(lambda cls, *_: cls(attention=48, rows=32)))
        yield


@pytest.fixture(scope="module")
def little(checkpoint):
    return checkpoint("text", **LITTLE)


@pytest.fixture(scope="module")
def calibrated_alone(little, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: file_digests(run_plan(quick_plan(little, recipe), folder / name).out) for name, recipe in RECIPES.items()
    }


def test_calibrating_ends_in_the_bytes_of_one_machine_whoever_is_killed(
    nodes, cluster, little, calibrated_alone, tmp_path
):
    """Killed while an expert is written, and once its outputs are: neither may count twice."""
    with nodes.trick("kill at flush", "running experts") as file, nodes.trick("kill worker") as other:
        run_plan(quick_plan(little, RECIPES["int4"]), tmp_path / "out", cluster=cluster)
        assert not file.read_text(), "somebody lives on"
        assert not other.exists()
    assert file_digests(tmp_path / "out") == calibrated_alone["int4"]


def test_scales_of_inputs_and_of_the_cache_are_those_of_one_machine(cluster, little, calibrated_alone, tmp_path):
    run_plan(quick_plan(little, RECIPES["static"]), tmp_path / "out", cluster=cluster)
    assert file_digests(tmp_path / "out") == calibrated_alone["static"]


@pytest.mark.parametrize("again_on_the_cluster", [True, False])
def test_calibrating_goes_on_after_its_driver_is_killed(
    cluster, little, calibrated_alone, tmp_path, monkeypatch, again_on_the_cluster
):
    plan, out = quick_plan(little, RECIPES["int4"]), tmp_path / "out"
    with monkeypatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(Killed):
            run_plan(plan, out, cluster=cluster)
    assert '"results"' in journal_of(out).read_text()
    run_plan(plan, out, cluster=cluster if again_on_the_cluster else None)
    assert file_digests(out) == calibrated_alone["int4"]


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
        cluster.check_nodes(look, SMALL)


def test_a_share_that_no_node_has_is_refused(cluster):
    with pytest.raises(BudgetError, match=r"no node has 64 cores, 2 GPUs and 1\.05 MB of memory"):
        cluster.slots(replace(SMALL, cpus=64, gpus=2))
    assert cluster.slots(SMALL) == 3


def test_what_a_task_raises_is_raised_here_once_others_have_ended(cluster):
    found = []
    work = Work("failing", Nothing, None, fail)
    pieces = [Piece(str(number), number, cost=10 - number) for number in range(9)]
    with pytest.raises(L4packError, match="the second") as told:
        cluster.run(work, pieces, SMALL, lambda piece, result: found.append(result), threading.Event())
    assert told.value.hint == "none"
    assert found[0] == 0, "the costliest comes first"
    assert 1 < len(found) < 8
    with pytest.raises(L4packError, match="the second"):
        cluster.submit(work, pieces[2], SMALL).result()


def test_who_is_asked_to_stop_begins_nothing_more(cluster):
    stop, found = threading.Event(), []
    pieces = [Piece(str(number), number) for number in range(3, 20)]

    def done(piece: Piece, result: int) -> None:
        found.append(result)
        stop.set()

    with pytest.raises(StoppedError):
        cluster.run(Work("stopping", Nothing, None, fail), pieces, SMALL, done, stop)
    assert 0 < len(found) < 8


def test_a_task_that_kills_whoever_does_it_is_given_up(cluster, monkeypatch):
    monkeypatch.setattr("l4pack.cluster.cluster.RETRIES", 1)
    with pytest.raises(ClusterError, match="was lost with its worker more than 1 times"):
        cluster.run(Work("deadly", Nothing, None, die), [Piece("one", 1)], SMALL, lambda *_: None, threading.Event())


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
