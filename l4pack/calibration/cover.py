"""Expert coverage alone: a text runs through the original model, and routed tokens are counted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4pack import __version__
from l4pack.calibration.coverage import Coverage
from l4pack.checkpoint.apart import refuse_overlap
from l4pack.checkpoint.parts import weight_parts
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError, UsageError
from l4pack.plan.memory import Computing, computing_on, walk_within
from l4pack.recipe import Calibration
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed
from l4pack.stream.identity import text_parts
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.modules import Skeleton
from l4pack.stream.sides import Stream
from l4pack.stream.visitor import Progress, Visit, Visitor
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.text.choice import DEMO_CALIBRATION, TextChoice
from l4pack.text.images import ImageReader
from l4pack.text.sequences import TokenText, load_text
from l4pack.text.tokenizer import load_tokenizer
from l4pack.work import machine
from l4pack.work.folder import owned
from l4pack.work.identity import Identity

WORK_KIND = "coverage"


@dataclass(frozen=True)
class Wanted:
    """The text to count, and the gate; None means what calibration takes by default. Limits of memory are in bytes."""

    text: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None
    max_cold: float = 1.0
    max_ram: int | None = None
    max_vram: int | None = None


@dataclass
class Covered:
    """What was found, and on what."""

    coverage: Coverage
    text: dict[str, Any]
    seconds: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.coverage.record(), "text": self.text, "seconds": self.seconds}


class _Counter(Visitor):
    """Looks on while the model runs."""

    def __init__(self, coverage: Coverage) -> None:
        self._coverage = coverage

    def resume(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Take in what was counted in the layers done before."""
        for layer, record in enumerate(records):
            if "tokens" in record:
                self._coverage.add(layer, record["tokens"])
        return True

    def routed(self, visit: Visit) -> None:
        """Count a layer's routed tokens."""
        for one in visit.passes.values():
            assert one.routing is not None
            self._coverage.add(visit.layer, one.routing.counts())

    def leave(self, layer: int, streams: Mapping[str, Stream]) -> dict[str, Any]:
        """Keep what was counted, for a run that goes on."""
        del streams
        counts = self._coverage.tokens.get(layer)
        return {} if counts is None else {"tokens": list(counts)}


def _job(checkpoint: Checkpoint, text: TokenText, compute: Compute) -> Identity:
    """What decides the counts: an interrupted run goes on only with the same."""
    parts = {"l4pack version": __version__, **text_parts(text.record), **compute.parts()}
    return Identity(parts | weight_parts(checkpoint))


def cover(
    checkpoint: Checkpoint, wanted: Wanted, work: Path, compute: str, progress: Progress, *, restart: bool = False
) -> Covered:
    """Count the tokens of every expert. Raises UsageError (the text, a model without experts), SourceError, BudgetError.

    Hidden states lie in `work` until the end; an interrupted call with the same arguments goes on, to the same counts.
    """
    started = time.monotonic()
    if not checkpoint.config.text.moe_layers:
        raise UsageError(f"{checkpoint.name} has no routed experts", hint="there is nothing to cover")
    if checkpoint.bare:
        raise SourceError(f"{checkpoint.name} is a configuration without weights", hint="give the checkpoint itself")
    if not 0 <= wanted.max_cold <= 1:
        raise UsageError(f"--max-cold {wanted.max_cold:g} is no share", hint="give a number from 0 to 1")
    usual = Calibration()
    choice = TextChoice(
        DEMO_CALIBRATION if wanted.text is None else wanted.text,
        usual.samples if wanted.samples is None else wanted.samples,
        wanted.sequence_length,
        usual.seed if wanted.seed is None else wanted.seed,
    )
    longest = checkpoint.config.text.max_position_embeddings
    text = load_text(choice, load_tokenizer(checkpoint), longest, ImageReader(checkpoint))
    where = Compute.of(compute)
    computing = computing_on(where, checkpoint.config, text.sequences, merging=checkpoint.merging_bytes)
    ram, device = machine.memory(wanted.max_ram), where.device_room(wanted.max_vram)
    _, ahead = walk_within(computing, Computing.memory, ram, device)
    coverage = Coverage.of(checkpoint.config, wanted.max_cold)
    refuse_overlap([checkpoint], work)
    with owned(work, WORK_KIND, restart=restart) as folder, Weights(checkpoint, where.device, where.dtype) as weights:
        model = Model("model", weights, Skeleton(checkpoint.config, where.device, where.dtype))
        lane, job = Lane(model.name, model, Packed(text.sequences)), _job(checkpoint, text, where)
        release = wanted.max_ram is not None
        with Walk([lane], work, job, _Counter(coverage), progress=progress, release=release, ahead=ahead) as walk:
            walk.run()
        folder.remove()
    return Covered(coverage, text.record, time.monotonic() - started)
