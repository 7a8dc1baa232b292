"""Expert coverage alone: a text runs through the original model, and routed tokens are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from l4pack import __version__
from l4pack.calibration.coverage import Coverage
from l4pack.checkpoint.apart import refuse_overlap
from l4pack.checkpoint.parts import weight_parts
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError, UsageError
from l4pack.recipe import Calibration
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed
from l4pack.stream.identity import text_parts
from l4pack.stream.layer import LayerPass, Routing, Stream
from l4pack.stream.memory import check_memory
from l4pack.stream.modules import Skeleton
from l4pack.stream.units import Unit
from l4pack.stream.walk import Model, Progress, Walk
from l4pack.stream.weights import Weights
from l4pack.text.choice import DEMO_CALIBRATION, TextChoice
from l4pack.text.sequences import TokenText, load_text
from l4pack.text.tokenizer import load_tokenizer
from l4pack.work.folder import owned
from l4pack.work.identity import Identity

WORK_KIND = "coverage"


@dataclass(frozen=True)
class Wanted:
    """The text to count, and the gate; None means what calibration takes by default."""

    text: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None
    max_cold: float = 1.0


@dataclass
class Covered:
    """What was found, and on what."""

    coverage: Coverage
    text: dict[str, Any]
    seconds: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.coverage.record(), "text": self.text, "seconds": self.seconds}


@dataclass
class _Counter:
    """Looks on while the model runs."""

    coverage: Coverage
    started: float = field(default_factory=time.monotonic)

    def unit(self, model: int, unit: Unit, layer_pass: LayerPass, forward: Callable[[Tensor], Tensor]) -> None:
        """Nothing to see."""

    def routed(self, model: int, layer: int, routing: Routing) -> None:
        """Count a layer's routed tokens."""
        del model
        self.coverage.add(layer, routing.counts())

    def layer(self, layer: int, streams: Sequence[Stream]) -> dict[str, Any]:
        """Keep what was counted, for a run that goes on."""
        del streams
        counts = self.coverage.tokens.get(layer)
        return {} if counts is None else {"tokens": list(counts)}


def _job(checkpoint: Checkpoint, text: TokenText, compute: Compute) -> Identity:
    """What decides the counts: an interrupted run goes on only with the same."""
    parts = {"l4pack version": __version__, **text_parts(text.record), **compute.parts()}
    return Identity(parts | weight_parts(checkpoint))


def cover(checkpoint: Checkpoint, wanted: Wanted, work: Path, compute: str, progress: Progress) -> Covered:
    """Count the tokens of every expert. Raises UsageError (the text, a model without experts), SourceError."""
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
    text = load_text(choice, load_tokenizer(checkpoint), checkpoint.config.text.max_position_embeddings)
    where = Compute.of(compute)
    check_memory(checkpoint.config.text, where, where.room(None, None))
    counter = _Counter(Coverage.of(checkpoint.config, wanted.max_cold))
    refuse_overlap([checkpoint], work)
    with owned(work, WORK_KIND) as folder, Weights(checkpoint, where.device, where.dtype) as weights:
        model = Model("model", weights, Skeleton(checkpoint.config, where.device, where.dtype))
        job = _job(checkpoint, text, where)
        with Walk([model], Packed(text.sequences), work, job, observer=counter, progress=progress) as walk:
            for layer, record in enumerate(walk.records):
                if "tokens" in record:
                    counter.coverage.add(layer, record["tokens"])
            walk.run()
        folder.remove()
    return Covered(counter.coverage, text.record, time.monotonic() - counter.started)
