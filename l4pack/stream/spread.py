"""Giving the stages of a layer out to the workers of a cluster.

Rows are computed in the blocks of one machine, wherever that is, and what is summed up is so in its order: the numbers are
the same, whatever the number of workers.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from l4pack.checkpoint.parts import seen_digest
from l4pack.checkpoint.source import Checkpoint
from l4pack.cluster.cluster import Cluster, Piece, Work
from l4pack.cluster.options import Share
from l4pack.cluster.sight import LIBRARIES, Look, nonce
from l4pack.cluster.worker import Opened
from l4pack.errors import UsageError
from l4pack.model.config import TextConfig
from l4pack.stream.compute import Compute
from l4pack.stream.layer import Routing
from l4pack.stream.stages import Stage

TASKS_A_SLOT = 3  # so that whoever is done early takes over from whoever is late


@dataclass(frozen=True)
class Workers:
    """A cluster, what a task takes of a node, and the job that workers open for it, by a name that no other has."""

    cluster: Cluster
    share: Share
    key: str
    opening: Callable[[Any], Opened]
    job: Any

    def some(self, count: int) -> list[range]:
        """So many batches or blocks shared out."""
        wanted = min(count, TASKS_A_SLOT * max(1, self.cluster.slots(self.share)))
        edges = [number * count // wanted for number in range(wanted + 1)]
        return list(itertools.starmap(range, itertools.pairwise(edges)))

    def run(
        self,
        name: str,
        work: Callable[[Any, Stage], Any],
        stages: Iterable[Stage],
        stop: threading.Event,
        rows: Callable[[Stage], int],
        done: Callable[[Stage, Any], None] = lambda *_: None,
    ) -> list[Any]:
        """Have stages done, those of most rows first; `done` is told of each at once. Returns what came of them, in their
        order. Raises what `Cluster.run` does."""
        found: dict[int, Any] = {}

        def note(piece: Piece, result: Any) -> None:
            number, stage = piece.argument
            found[number] = result
            done(stage, result)

        whole = Work(self.key, self.opening, self.job, partial(_do, work), "{:,.0f} tokens".format, name)
        pieces = [Piece(_name(name, stage), (number, stage), rows(stage)) for number, stage in enumerate(stages)]
        self.cluster.run(whole, pieces, self.share, note, stop)
        return [found[number] for number in sorted(found)]


def _do(work: Callable[[Any, Stage], Any], opened: Any, argument: tuple[int, Stage]) -> Any:
    return work(opened, argument[1])


def _name(name: str, stage: Stage) -> str:
    where = ", ".join(map(str, stage.units)) or (f"layer {stage.layer}" if stage.mark else "answers")
    return f"{name}: {where}" + ("" if stage.some is None else f", {stage.some.start} to {stage.some.stop}")


def joined(parts: Sequence[Routing]) -> Routing:
    """That of some blocks of rows one after another."""
    names = ("logits", "experts", "scores")
    return Routing(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def check_seen(
    cluster: Cluster, share: Share, folder: Path, checkpoints: Sequence[Checkpoint], compute: Compute
) -> None:
    """Refuse nodes that do not see a job's folder and what it reads, or compute otherwise. See `Cluster.check_nodes`."""
    sights = {f"the checkpoint {one.name}": partial(seen_digest, one) for one in checkpoints}
    cluster.check_nodes(Look(LIBRARIES, (nonce(folder),), sights, (compute.parts,)), share)


def check_spreadable(text: TextConfig, itemsize: int, cluster: Cluster) -> None:
    """Raise UsageError where tokens go to several experts, whose outputs would be summed over workers, and where several
    hosts would write into one page of a file."""
    if text.moe_layers and text.num_experts_per_tok != 1:
        raise UsageError("--ray runs models whose tokens go to one expert each", hint="leave --ray out")
    if text.hidden_size * itemsize % mmap.PAGESIZE and cluster.hosts() > 1:
        raise UsageError(
            f"a row of {text.hidden_size} numbers is no whole number of pages of {mmap.PAGESIZE} bytes, "
            "and two hosts must not write into one page",
            hint="take the nodes of one host, or leave --ray out",
        )
