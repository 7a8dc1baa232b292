"""The lanes of a walk, and their hidden states: what they begin with, where they lie, which a later walk begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l4pack.stream.embed import embed
from l4pack.stream.hidden import Buffer, Elsewhere, Packed, Rows
from l4pack.stream.modules import Skeleton
from l4pack.stream.sides import Stream, StreamFiles, copy_rows, side_file
from l4pack.stream.weights import Weights
from l4pack.work.seal import Span

if TYPE_CHECKING:
    import torch

COPY_ENDING = "-kept.hidden"
NEVER = 1 << 31  # steps


@dataclass(frozen=True)
class Model:
    """A checkpoint on the walk."""

    name: str
    weights: Weights
    skeleton: Skeleton


@dataclass(frozen=True)
class Lane:
    """Sequences on their way through a model: the walk runs them through the whole of the steps in `begins` … `ends`.

    A lane that begins at step 0 is embedded; what one that begins later starts from, the visitor writes. Lanes of the
    same sequences that name the same `files` lie in them together. `kept` ones are copied for a later walk, see `Walk`.
    """

    name: str
    model: Model
    packed: Packed
    begins: int = 0
    ends: int = NEVER
    files: str | None = None
    kept: bool = False

    def walks(self, step: int) -> bool:
        """Whether it goes through the whole of that step's layer."""
        return self.begins <= step < self.ends

    def alive(self, done: int) -> bool:
        """Whether its hidden states after so many steps are what it, or somebody after it, goes on from."""
        return self.begins <= done <= self.ends


class Lanes:
    """The hidden states of lanes in a folder."""

    def __init__(self, folder: Path, lanes: Sequence[Lane], *, resident: bool = False, elsewhere: bool = False) -> None:
        """Nothing is made or opened yet; `resident` ones stay on their model's device, and those `elsewhere` are read and
        written by other processes, see `stages`."""
        self._folder, self.lanes, self._elsewhere = folder, tuple(lanes), elsewhere
        self.streams: dict[str, Stream] = {}
        self._files: dict[str, StreamFiles] = {}
        together: dict[str, list[Lane]] = {}
        for lane in lanes:
            together.setdefault(lane.files or lane.name, []).append(lane)
        for name, group in together.items():
            device = group[0].model.skeleton.device if resident else None
            self._files[name] = StreamFiles(folder, name, [lane.name for lane in group], shape_of(group[0]), device)

    def open(self, side: int, *, kept: bool) -> None:
        """Make the files, or with `kept` those of the other side; see `StreamFiles.open`."""
        if self._elsewhere:
            nowhere = Elsewhere()
            self.streams = {lane.name: Stream(lane.name, (nowhere, nowhere), nowhere, side) for lane in self.lanes}
            return
        for files in self._files.values():
            self.streams |= files.open(side, kept=kept)

    def close(self) -> None:
        """Close the files, which stay."""
        self.streams.clear()
        for files in self._files.values():
            files.close()

    def advance(self) -> None:
        """Take the outputs as the next layer's inputs."""
        for stream in self.streams.values():
            stream.side = 1 - stream.side

    def flush(self, side: int, *, release: bool) -> None:
        """Wait until one side is on disk; with `release` its pages go."""
        for files in () if self._elsewhere else self._files.values():
            files.flush(side)
            if release:
                files.release()

    def spans(self, done: int) -> list[Span]:
        """Where the outputs of the last of so many steps lie, of the lanes that are alive then."""
        alive = {lane.name for lane in self.lanes if lane.alive(done)}
        return [files.span(name, done % 2) for files in self._files.values() for name in files.names if name in alive]

    def embed(self) -> None:
        """Make embeddings the inputs of every lane that begins with them; those of the same sequences are made once."""
        if self._elsewhere:
            self._embed_for_others()
            return
        made: dict[tuple[int, int], Rows] = {}
        for lane in self.lanes:
            target, key = self.streams[lane.name].current, (id(lane.model), id(lane.packed))
            if not lane.alive(0):
                continue
            if key in made:
                copy_rows(target, made[key])
            else:
                embed(lane.model.weights, lane.model.skeleton, lane.packed, target)
            made[key] = target

    def _embed_for_others(self) -> None:
        for lane in self.lanes:
            buffer = Buffer(self._folder / side_file(lane.name, 0), *shape_of(lane))
            embed(lane.model.weights, lane.model.skeleton, lane.packed, Rows(buffer))
            buffer.flush()
            buffer.close()

    def copies(self, step: int) -> list[Span]:
        """Where copies of a step's inputs lie, of lanes that are kept."""
        return [Span(_copy_name(lane), 0, _nbytes(lane)) for lane in self._kept(step)]

    def copy(self, step: int) -> None:
        """Copy a step's inputs to where the next layers don't overwrite them, on disk."""
        for lane in self._kept(step):
            copy = self._copy(lane)
            copy_rows(Rows(copy), self.streams[lane.name].side_of(step))
            copy.flush()
            copy.close()

    def restore(self, step: int) -> None:
        """Take the copies as that step's inputs."""
        for lane in self._kept(step):
            copy = self._copy(lane, made=True)
            copy_rows(self.streams[lane.name].side_of(step), Rows(copy))
            copy.close()

    def _kept(self, step: int) -> list[Lane]:
        return [lane for lane in self.lanes if lane.kept and lane.alive(step)]

    def _copy(self, lane: Lane, *, made: bool = False) -> Buffer:
        return Buffer(self._folder / _copy_name(lane), *shape_of(lane), kept=made)


def shape_of(lane: Lane) -> tuple[int, int, torch.dtype]:
    """Rows, width and dtype of its hidden states."""
    skeleton = lane.model.skeleton
    return lane.packed.rows, int(skeleton.text.hidden_size), skeleton.dtype


def _nbytes(lane: Lane) -> int:
    rows, width, dtype = shape_of(lane)
    return rows * width * dtype.itemsize


def _copy_name(lane: Lane) -> str:
    return f"{lane.name}{COPY_ENDING}"
