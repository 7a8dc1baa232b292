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
import torch
from conftest import file_digests, quick_plan
from killing import Killed, killed_after
from ray_nodes import three_nodes
from ray_tasks import Nothing, colour_of_this_node, die, fail, late_colour, where

from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.cluster.cluster import Piece, Work
from l4pack.cluster.connect import connected
from l4pack.cluster.options import ClusterOptions, Share
from l4pack.cluster.sight import Look
from l4pack.errors import BudgetError, ClusterError, L4packError, StoppedError, UsageError
from l4pack.evaluate.evaluate import prepare_evaluation
from l4pack.evaluate.inputs import EvaluationSettings
from l4pack.evaluate.spread import SpreadForward
from l4pack.measure.measure import measure
from l4pack.measure.prepare import MeasureSettings, prepare_measurement
from l4pack.measure.spread import SpreadWaves
from l4pack.measure.state import State
from l4pack.quantize import spread
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe
from l4pack.stream.hidden import Buffer
from l4pack.stream.layer import Blocks
from l4pack.stream.stages import StageFiles
from l4pack.text.choice import TextChoice
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


@pytest.fixture
def looked_at(cluster):
    """The cluster, its nodes seen to be fit for tasks that need see nothing."""
    cluster.check_nodes(Look(("l4pack",), ()), SMALL)
    return cluster


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
        {"roles": ["attention", "routed_expert", "shared_expert", "dense_mlp"], "scheme": "int4"},
        {"roles": "all", "scheme": "keep"},
    ],
}
TWO_SIDED = {
    "schemes": {"int4": {**GPTQ, "gptq": {"sweeps": 1, "two_sided": True}}},
    "rules": [{"roles": ["routed_expert", "dense_mlp"], "scheme": "int4"}, {"roles": "all", "scheme": "keep"}],
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
    for name, values in {"int4": INT4, "two-sided": TWO_SIDED, "static": STATIC}.items()
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


def test_workers_read_what_the_walk_back_has_found(cluster, little, calibrated_alone, tmp_path):
    run_plan(quick_plan(little, RECIPES["two-sided"]), tmp_path / "out", cluster=cluster)
    assert file_digests(tmp_path / "out") == calibrated_alone["two-sided"]


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


# Evaluating and measuring: the same numbers to the last bit, and the same file.

LITTLE_RTN = {
    "title": "Little", "name": "little-rtn",
    "schemes": {"int4": {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32}},
    "rules": INT4["rules"],
}  # fmt: skip
WORDS = " ".join(f"{number * 7919 % 1000:03} is followed by {number * 104729 % 997}" for number in range(60))


@pytest.fixture(scope="module")
def little_rtn(little, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rtn")
    (folder / "text.txt").write_text(WORDS)
    return run_plan(quick_plan(little, Recipe.model_validate(LITTLE_RTN)), folder / "out").out


def evaluation(little, artifact, work):
    text = TextChoice(str(artifact.parent / "text.txt"), 9, 40, 0)
    settings = EvaluationSettings(work=work, text=text, compute="cpu")
    return prepare_evaluation(open_folder(artifact), open_source(str(little)), settings, measured="known")


def found_by(record):
    """An evaluation without how long it took."""
    return {key: value for key, value in record.items() if key not in ("run", "resumed_layers")}


@pytest.fixture(scope="module")
def evaluated_alone(little, little_rtn, tmp_path_factory):
    return evaluation(little, little_rtn, tmp_path_factory.mktemp("evaluated") / "work").run()


def test_an_evaluation_is_that_of_one_machine_whoever_is_killed(
    nodes, cluster, little, little_rtn, evaluated_alone, tmp_path
):
    """A worker is killed once an expert's outputs are written, and a node at what it writes first."""
    told = []
    cluster.show_on(told.append)
    with (
        nodes.trick("kill at flush", "layer 2, experts") as file,
        nodes.trick("kill node at flush", "layer") as other,
    ):
        record = evaluation(little, little_rtn, tmp_path / "work").run(cluster)
        assert not file.read_text()
        assert not other.read_text(), "somebody lives on"
    nodes.replace("second")
    assert found_by(record) == found_by(evaluated_alone)
    assert record["kl_mean"] > 0
    assert any(line.startswith("layer 2, experts, 2 of 2 tasks, ") for line in told)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("again_on_the_cluster", [True, False])
def test_an_evaluation_goes_on_after_its_driver_is_killed(
    cluster, little, little_rtn, evaluated_alone, tmp_path, monkeypatch, again_on_the_cluster
):
    with monkeypatch.context() as patch:
        patch.setattr(SpreadForward, "_routed", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            evaluation(little, little_rtn, tmp_path / "work").run(cluster)
    record = evaluation(little, little_rtn, tmp_path / "work").run(cluster if again_on_the_cluster else None)
    assert record["resumed_layers"] == 1
    assert found_by(record) == found_by(evaluated_alone)


def measurement(little, text, out, workers=None):
    settings = MeasureSettings(
        out=out, text=TextChoice(str(text), 9, 40, 0), options=("int8-g32", "fp8"), compute="cpu"
    )
    return prepare_measurement(open_source(str(little)), settings, workers)


@pytest.fixture(scope="module")
def measured_alone(little, little_rtn, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "out.json"
    measure(measurement(little, little_rtn.parent / "text.txt", out))
    return out.read_bytes()


def test_a_measurement_is_that_of_one_machine_whoever_is_killed(
    nodes, cluster, little, little_rtn, measured_alone, tmp_path
):
    """A worker is killed when it has a layer behind it, and a node where it has begun."""
    prepared = measurement(little, little_rtn.parent / "text.txt", tmp_path / "out.json", 5)
    assert prepared.costs.waves == 5
    with nodes.trick("kill at flush", "wave@4") as file, nodes.trick("kill node at flush", "wave") as other:
        measure(prepared, cluster=cluster)
        assert not file.read_text()
        assert not other.read_text(), "somebody lives on"
    nodes.replace("second")
    assert (tmp_path / "out.json").read_bytes() == measured_alone
    assert not prepared.settings.work.exists()


def test_a_measurement_goes_on_after_its_driver_is_killed(
    cluster, little, little_rtn, measured_alone, tmp_path, monkeypatch
):
    prepared = measurement(little, little_rtn.parent / "text.txt", tmp_path / "out.json", 3)
    write, written = State.wave_done, []

    def dying(state, *found):
        if written:
            raise Killed
        written.append(found)
        write(state, *found)

    with monkeypatch.context() as patch:
        patch.setattr(State, "wave_done", dying)
        with pytest.raises(Killed):
            measure(prepared, cluster=cluster)
    begun = []
    monkeypatch.setattr(SpreadWaves, "run", _telling(SpreadWaves.run, begun))
    measure(prepared, cluster=cluster)
    assert [len(waves) for waves in begun] == [2], "a wave that is measured is measured again"
    assert (tmp_path / "out.json").read_bytes() == measured_alone


def _telling(run, begun):
    def told(self, waves, *others):
        begun.append(waves)
        return run(self, waves, *others)

    return told


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


def test_a_node_that_differs_is_named_and_later_tasks_are_not_asked_for_that(cluster):
    look = Look(("l4pack",), (), {"the colour": colour_of_this_node})
    with pytest.raises(UsageError, match=r"^node \S+ \((\w+)\) differs: the colour is \1 there and none here"):
        cluster.check_nodes(look, SMALL)
    assert cluster.submit(Work("after", Nothing, None, fail), Piece("one", 1), SMALL).result() == 1


def test_a_share_that_no_node_has_is_refused(cluster):
    with pytest.raises(BudgetError, match=r"no node has 64 cores, 2 GPUs and 1\.05 MB of memory"):
        cluster.slots(replace(SMALL, cpus=64, gpus=2))
    assert cluster.slots(SMALL) == 3


def test_what_a_task_raises_is_raised_here_once_others_have_ended(looked_at):
    found = []
    work = Work("failing", Nothing, None, fail)
    pieces = [Piece(str(number), number, cost=100 - number) for number in range(99)]
    with pytest.raises(L4packError, match="the second") as told:
        looked_at.run(work, pieces, SMALL, lambda piece, result: found.append(result), threading.Event())
    assert told.value.hint == "none"
    assert sorted(found) == [0, 1, *range(3, len(found) + 1)], "the costliest come first, and end"
    assert len(found) < 98
    with pytest.raises(L4packError, match="the second"):
        looked_at.submit(work, pieces[2], SMALL).result()


def test_who_is_asked_to_stop_begins_nothing_more(looked_at):
    stop, found = threading.Event(), []
    pieces = [Piece(str(number), number) for number in range(3, 20)]

    def done(piece: Piece, result: int) -> None:
        found.append(result)
        stop.set()

    with pytest.raises(StoppedError):
        looked_at.run(Work("stopping", Nothing, None, fail), pieces, SMALL, done, stop)
    assert 0 < len(found) < 8


def test_a_task_that_kills_whoever_does_it_is_given_up(looked_at, monkeypatch):
    monkeypatch.setattr("l4pack.cluster.cluster.RETRIES", 1)
    with pytest.raises(ClusterError, match="was lost with its worker more than 1 times"):
        looked_at.run(Work("deadly", Nothing, None, die), [Piece("one", 1)], SMALL, lambda *_: None, threading.Event())


def test_a_source_that_is_fetched_is_refused(plan):
    fetched = replace(plan, checkpoint=replace(plan.checkpoint, store=None))
    with pytest.raises(UsageError, match="every node can read"):
        spread.spread_job(fetched, Path("shards"), None, "cpu")


def test_a_node_that_joins_late_and_differs_gets_no_task(nodes, cluster):
    """It is asked before its first task; whoever is there goes on."""
    look, warned, found, stop = Look(("l4pack",), (), {"the colour": late_colour}), [], [], threading.Event()
    cluster.check_nodes(look, SMALL)
    cluster.show_on(lambda _: None, warned.append)

    def done(piece: Piece, node: str) -> None:
        found.append(node)
        if warned:
            stop.set()

    pieces = [Piece(str(number), number) for number in range(1000)]
    with nodes.another("late"), pytest.raises(StoppedError):
        cluster.run(Work("joining", Nothing, None, where), pieces, SMALL, done, stop)
    assert set(found) <= {"head", "second", "third"}
    assert len(warned) == 1
    assert "differs: the colour is late there and none here: it joined late, and gets no task" in warned[0]


# What was given up as lost may live on: files of hidden states are those of one layer of one run.


def test_who_comes_late_finds_no_file_of_a_layer_that_is_done(tmp_path):
    files = StageFiles(tmp_path, ["one"], (4, 1024, torch.float32))
    Buffer(tmp_path / "one-0.hidden", 4, 1024, torch.float32).close()
    stage = files.begin(0, 0)
    late = Buffer(tmp_path / "stages" / stage.mark / "one-middle.hidden", 4, 1024, torch.float32, kept=True)
    files.outputs(stage)
    following = Buffer(tmp_path / "stages" / stage.mark / "one-following.hidden", 4, 1024, torch.float32, kept=True)
    following.data[:] = 1
    files.finish(stage)
    later = files.begin(1, 1)
    late.data[:] = 7
    for name in ("stages/" + later.mark + "/one-middle", "one-1"):
        now = Buffer(tmp_path / f"{name}.hidden", 4, 1024, torch.float32, kept=True)
        assert not (now.data == 7).any()
        now.close()
    assert (following.data == 1).all()
    with pytest.raises(FileNotFoundError):
        Buffer(tmp_path / "stages" / stage.mark / "one-middle.hidden", 4, 1024, torch.float32, kept=True)
    again = StageFiles(tmp_path, ["one"], (4, 1024, torch.float32)).begin(1, 1)
    assert again.mark != later.mark
