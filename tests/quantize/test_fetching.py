"""Calibrating a Hub source that comes and goes file by file: the bytes of a local run, each file once, no more disk."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import file_digests
from hub_repository import REPO, own_cache  # noqa: F401
from hub_server import HubServer, running_hub
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from killing import TEXT, Killed, killed_after
from models import build, write_weights
from safetensors.torch import load_file
from whole_model import one_thread  # noqa: F401

from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.calibration.text import with_text
from l4pack.checkpoint.hub import HubStore, open_hub
from l4pack.checkpoint.source import Checkpoint, open_folder
from l4pack.errors import HubError
from l4pack.plan.itinerary import Itinerary, file_sizes
from l4pack.plan.plan import Plan, make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe

ORDERED = 9


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


def split_in_order(folder: Path, shards: int) -> None:
    """The one file of a checkpoint as several, tensors in the model's order, as real checkpoints have them."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    layers = sorted(name for name in state if "language_model.model.layers" in name)
    names = [name for name in state if name not in layers] + layers
    sizes = [len(names) * number // shards for number in range(shards + 1)]
    weight_map = {}
    for number, (start, stop) in enumerate(pairwise(sizes)):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[start:stop]}
        write_weights(folder, part)
        (folder / "model.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by layers, as published, and one tensor here and one there, so that every layer needs every file."""
    root = tmp_path_factory.mktemp("sources")
    ordered = build(root / "ordered", "maverick")
    split_in_order(ordered, ORDERED)
    return {"ordered": ordered, "scattered": build(root / "scattered", "maverick", shards=4)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(TEXT)
    return path


def recipe(name: str) -> Recipe:
    """`kv` rounds, and needs a walk for its cache alone."""
    values = load_recipe("int4-rtn" if name == "kv" else name).model_dump()
    values["calibration"] = {"samples": 2, "sequence_length": 64, "max_cold_experts": 1, "max_fallbacks": 1}
    values["kv_cache"] = {"dtype": "fp8"} if name == "kv" else None
    return Recipe.model_validate(values)


def planned(checkpoint: Checkpoint, name: str, text: Path) -> Plan:
    return with_text(make_plan(checkpoint, recipe(name)), str(text))


@pytest.fixture
def remote(hub: HubServer, sources: dict[str, Path], tmp_path: Path) -> Callable[[str], Checkpoint]:
    """Opens a source on the Hub, to be fetched into `tmp_path/out.partial/fetched`."""

    def open_it(kind: str) -> Checkpoint:
        if REPO not in hub.repos:
            hub.add(REPO, {path.name: path.read_bytes() for path in sources[kind].iterdir()})
        folder = tmp_path / "out.partial" / "fetched"
        return open_hub(REPO, endpoint=hub.endpoint, fetch_as_you_go=True, folder=folder)

    return open_it


def downloads(hub: HubServer) -> list[str]:
    """Every whole shard that was asked for, without what signs the address anew each time."""
    return [seen.path.partition("?")[0] for seen in hub.requests("^/large/") if seen.byte_range is None]


def same_but_for_the_source(found: Path, wanted: Path) -> bool:
    one, other = file_digests(found), file_digests(wanted)
    tensors = [json.loads((folder / MANIFEST_NAME).read_bytes())["tensors"] for folder in (found, wanted)]
    return {**one, MANIFEST_NAME: ""} == {**other, MANIFEST_NAME: ""} and tensors[0] == tensors[1]


class Watch:
    """The most bytes of shards that lay in the private folder at once, looked at whenever one came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak, self.files, lock = 0, 0, threading.Lock()
        fetch = HubStore._fetch

        def look(store: HubStore) -> None:
            with lock:
                sizes = []
                for path in store.folder.glob("*.safetensors"):
                    with suppress(FileNotFoundError):  # another thread dropped it meanwhile
                        sizes.append(path.stat().st_size)
                self.peak, self.files = max(self.peak, sum(sizes)), max(self.files, len(sizes))

        def watched(store, file):
            path = fetch(store, file)
            if file.endswith(".safetensors"):
                look(store)
            return path

        monkeypatch.setattr(HubStore, "_fetch", watched)


@pytest.mark.parametrize("name", ["int4", "fp8-static", "kv"])
@pytest.mark.parametrize("kind", ["ordered", "scattered"])
def test_the_bytes_of_a_local_run_with_each_file_fetched_once(
    hub, remote, sources, text, tmp_path, monkeypatch, kind, name
):
    local = run_plan(planned(open_folder(sources[kind]), name, text), tmp_path / "local").out
    watch = Watch(monkeypatch)
    plan = planned(remote(kind), name, text)
    out = run_plan(plan, tmp_path / "out").out
    assert same_but_for_the_source(out, local)
    assert len(downloads(hub)) == len(set(downloads(hub))) == len(plan.checkpoint.shards)
    allowed = plan.disk_bytes - plan.artifact_bytes - plan.needs.disk_bytes
    headers = sum((sources[kind] / file).stat().st_size for file in plan.checkpoint.shards) - sum(
        file_sizes(plan.checkpoint).values()
    )
    assert watch.peak <= allowed + headers
    if kind == "ordered":
        assert watch.files < ORDERED
        assert allowed < plan.source_weight_bytes
    else:
        assert allowed == plan.source_weight_bytes
    assert not list(tmp_path.glob("out.partial"))


@pytest.mark.parametrize("name", ["int4", "kv"])
@pytest.mark.parametrize("records", [2, 5, 9])
def test_killed_anywhere_it_ends_in_the_same_bytes(hub, remote, sources, text, tmp_path, monkeypatch, name, records):
    local = run_plan(planned(open_folder(sources["ordered"]), name, text), tmp_path / "local").out
    with monkeypatch.context() as context:
        killed_after(context, records)
        with pytest.raises(Killed):
            run_plan(planned(remote("ordered"), name, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert same_but_for_the_source(run_plan(planned(remote("ordered"), name, text), tmp_path / "out").out, local)
    again = Counter(downloads(hub))
    assert set(again.values()) <= {1, 2}
    assert sum(again.values()) < 2 * ORDERED  # the layer it was killed in is read again, not the whole source


def test_what_an_earlier_run_left_behind_is_dropped(remote, text, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        killed_after(context, 9)
        context.setattr(HubStore, "release", lambda store, file: None)
        with pytest.raises(Killed):
            run_plan(planned(remote("ordered"), "int4", text), tmp_path / "out")
    left = len(list((tmp_path / "out.partial" / "fetched").glob("*.safetensors")))
    plan = planned(remote("ordered"), "int4", text)
    watch = Watch(monkeypatch)
    run_plan(plan, tmp_path / "out")
    assert left >= 8
    assert watch.files <= 4


def test_a_hub_that_fails_meanwhile_is_told_and_the_same_command_goes_on(
    hub, remote, sources, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("l4pack.hub.client.time.sleep", lambda _: None)
    plan = planned(remote("ordered"), "int4", text)
    last = max(plan.checkpoint.shards)
    blob = hub.repos[REPO].files()[last].sha256
    fault = hub.fault("GET", f"^/large/.*{blob}", times=99, status=502)
    with pytest.raises(HubError, match="502"):
        run_plan(plan, tmp_path / "out")
    assert fault.hits > 1
    fault.times = 0
    done = run_plan(planned(remote("ordered"), "int4", text), tmp_path / "out")
    assert done.resumed_bytes > 0
    local = run_plan(planned(open_folder(sources["ordered"]), "int4", text), tmp_path / "local").out
    assert same_but_for_the_source(done.out, local)


def test_quantize_takes_the_option_with_a_calibrated_recipe(hub, sources, text, tmp_path, monkeypatch, l4pack):
    hub.add(REPO, {path.name: path.read_bytes() for path in sources["ordered"].iterdir()})
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    command = ["quantize", REPO, "--out", tmp_path / "out", "--fetch-as-you-go", "--calibration", text, "--calibration-samples", 4,
               "--sequence-length", 64]  # fmt: skip
    dry = l4pack(*command, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    ended = l4pack(*command, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["disk_bytes"] <= json.loads(dry.out)["disk_bytes"]


def test_build_fetches_for_every_step_and_leaves_nothing(hub, sources, tmp_path, monkeypatch, l4pack):
    hub.add(REPO, {path.name: path.read_bytes() for path in sources["ordered"].iterdir()})
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    out = tmp_path / "out"
    ended = l4pack(
        "build", REPO, "--recipe", "int4-rtn", "--out", out, "--fetch-as-you-go", "--skip-evaluate", "--json"
    )
    record = json.loads(ended.out)
    assert record["quantize"]["outcome"] == record["verify"]["outcome"] == "done", ended.err
    unsigned = [path.partition("?")[0] for path in downloads(hub)]
    assert set(Counter(unsigned).values()) == {2}  # to quantize, and to verify
    assert {path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "local"} <= {
        "out",
        "out.fetched",
    }
    assert not list((tmp_path / "out.fetched").glob("*.safetensors"))


# When which file is there.


@given(
    st.lists(st.frozensets(st.integers(0, 5).map(str), max_size=4), min_size=1, max_size=6),
    st.lists(st.integers(1, 99), min_size=6, max_size=6),
)
def test_files_stay_from_the_first_step_that_reads_them_to_the_last(steps, numbers):
    walk = Itinerary(tuple(steps))
    sizes = dict(zip("012345", numbers, strict=True))
    used = {file: [step for step, files in enumerate(steps) if file in files] for file in sizes}
    there = [{file for file, at in used.items() if at and at[0] <= step <= at[-1]} for step in range(len(steps))]
    come = [{file for file, at in used.items() if at and at[0] == step} for step in range(len(steps) + 1)]
    for step in range(len(steps)):
        assert walk.arriving(step) == come[step]
        assert walk.leaving(step) == {file for file, at in used.items() if at and at[-1] == step}
        assert walk.arriving(step, step) == steps[step]
    assert walk.walked() == set().union(*there)
    assert walk.peak_bytes(sizes) == max(
        sum(sizes[file] for file in there[step] | come[step + 1]) for step in range(len(steps))
    )
