"""A walk back that is killed anywhere goes on to the same bytes, and nothing damaged is gone on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import copied
from spoil import SPOILS
from streaming import stream_model, token_rows
from whole_model import one_thread  # noqa: F401

from l4pack.errors import StoppedError, UsageError
from l4pack.gradient.moments import GradientMoments, MomentsKeeper
from l4pack.gradient.walk import STATE_NAME, BackwardWalk
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Model
from l4pack.stream.visitor import Progress
from l4pack.work.identity import Identity

LITTLE = {
    "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "no_rope_layers": [1, 0, 1],
    "interleave_moe_layer_step": 2,
}  # fmt: skip
JOB = Identity({"job": "gradient"})
PACKED = Packed([TokenSequence(tuple(ids)) for ids in token_rows()])


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Iterator[Model]:
    found = stream_model(checkpoint("text", **LITTLE))
    with found.weights:
        yield found


def walk(model: Model, work: Path, progress: Progress | None = None, job: Identity = JOB, seed: int = 0) -> list[bytes]:
    """What every file of moments holds."""
    keeper = MomentsKeeper(GradientMoments(work, model.skeleton.text.hidden_size), seed)
    BackwardWalk(model, PACKED, work, job, seed, keeper, progress=progress).walk()
    assert {path.name for path in work.iterdir()} == {STATE_NAME, *(f"moments-{layer}.float32" for layer in range(3))}
    return [(work / f"moments-{layer}.float32").read_bytes() for layer in range(3)]


@pytest.fixture(scope="module")
def wanted(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return walk(model, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def killed(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """The folder as a kill would leave it, before each unit and after each layer, up and down."""
    work, taken = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("killed")
    found: list[tuple[str, Path]] = []

    def take(what: str) -> None:
        found.append((what, taken / str(len(found))))
        copied(work, found[-1][1])

    walk(model, work, Progress(label=take, step=take))
    return found


def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    model: Model, killed: list[tuple[str, Path]], wanted: list[bytes], tmp_path: Path
) -> None:
    assert len({what for what, _ in killed}) > 20
    for what, left in killed[::3]:
        work = tmp_path / left.name
        shutil.copytree(left, work)
        assert walk(model, work) == wanted, what


def test_it_goes_on_where_it_was(model: Model, killed: list[tuple[str, Path]], tmp_path: Path) -> None:
    """Not from the beginning, and progress ends where it would have."""
    left = next(left for what, left in killed if what == "layer 2 of 3 backwards, attention")
    told: list[str] = []
    read = {"whole": 0, "again": 0}

    def counting(name: str) -> Callable[[int], None]:
        return lambda count: read.__setitem__(name, read[name] + count)

    walk(model, tmp_path / "whole", Progress(advance=counting("whole")))
    shutil.copytree(left, tmp_path / "again")
    walk(model, tmp_path / "again", Progress(step=told.append, advance=counting("again")))
    assert told == ["layer 2 of 3 done backwards", "layer 1 of 3 done backwards"]
    assert read["again"] == read["whole"] > 0


def test_stopped_it_goes_on(model: Model, wanted: list[bytes], tmp_path: Path) -> None:
    for at in ("layer 2 of 3, attention", "gradient of the answers", "layer 2 of 3 backwards, attention"):
        progress = Progress()
        progress.label = lambda what, at=at, progress=progress: progress.stop.set() if what == at else None
        with pytest.raises(StoppedError):
            walk(model, tmp_path, progress)
    assert walk(model, tmp_path) == wanted


@pytest.mark.parametrize("way", ["removed", "flipped"])
def test_what_was_damaged_is_made_again(
    model: Model, killed: list[tuple[str, Path]], wanted: list[bytes], tmp_path: Path, way: str
) -> None:
    for stage in ("gradient of the answers", "layer 2 of 3 backwards, attention"):
        left = next(left for what, left in killed if what == stage)
        for path in filter(Path.is_file, sorted(left.rglob("*"))):
            work = tmp_path / f"{left.name}-{path.name}"
            shutil.copytree(left, work)
            SPOILS[way](work / path.relative_to(left))
            assert walk(model, work) == wanted, (stage, path.name)


def test_another_jobs_folder_is_refused(model: Model, tmp_path: Path) -> None:
    walk(model, tmp_path)
    with pytest.raises(UsageError, match="job was gradient and is another"):
        walk(model, tmp_path, job=Identity({"job": "another"}))


def test_the_seed_draws_the_labels(model: Model, wanted: list[bytes], tmp_path: Path) -> None:
    assert walk(model, tmp_path, seed=1) != wanted
