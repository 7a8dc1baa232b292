"""What a measurement measures, on what, and what that takes: all that is known before a weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch

from l4pack import __version__
from l4pack.checkpoint.parts import weight_parts
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError, UsageError
from l4pack.gradient.keep import streams_of
from l4pack.measure.changes import (
    Change,
    Mixture,
    Single,
    anchors,
    few_of,
    mixtures_of,
    roles_of,
    singles_of,
    uniform_of,
    waves_of,
)
from l4pack.measure.costs import (
    CHEAP_FLOP,
    PASSES_BACK,
    BackBytes,
    Costs,
    back_bytes,
    back_flop,
    flop_of,
    layer_bytes,
    stream_bytes,
    streams_at_once,
)
from l4pack.measure.options import MeasureOptions, options_for
from l4pack.measure.texts import Texts, load_texts
from l4pack.model.tensors import Role
from l4pack.plan.gradient import held_slopes, walking_back
from l4pack.plan.memory import Computing, Memory, computing_on, measuring, walk_within
from l4pack.recipe import Calibration
from l4pack.stream.compute import Compute
from l4pack.stream.identity import text_parts
from l4pack.stream.layer import Blocks
from l4pack.text.choice import TextChoice
from l4pack.timing.jobs import layer_weights
from l4pack.timing.jobs import measuring as measuring_work
from l4pack.timing.jobs import up_and_down as walk_back_work
from l4pack.timing.work import Work
from l4pack.work import machine
from l4pack.work.identity import Identity, flat


class Direct(StrEnum):
    """Which changes are measured, the rest being predicted."""

    ALL = "all"
    ANCHORS = "anchors"
    FEW = "few"
    AUTO = "auto"


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure, on what, and where."""

    out: Path
    text: TextChoice = field(default_factory=TextChoice)
    calibration: str | None = None
    calibration_samples: int = Calibration().samples
    options: tuple[str, ...] = ()
    direct: Direct = Direct.AUTO
    streams: int | None = None
    compute: str = "auto"
    max_ram: int | None = None
    max_vram: int | None = None
    restart: bool = False

    @property
    def work(self) -> Path:
        """Where hidden states go meanwhile."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def gradients(self) -> Path:
        """Where the walk back works, and keeps its gradients."""
        return self.work / "gradients"


@dataclass(frozen=True)
class PreparedMeasurement:
    """A measurement that can begin: everything read but the weights."""

    checkpoint: Checkpoint
    settings: MeasureSettings
    options: MeasureOptions
    texts: Texts
    compute: Compute
    direct: Direct
    singles: tuple[Single, ...]
    mixtures: tuple[Mixture, ...]
    costs: Costs
    ahead: bool  # whether units are loaded while others compute
    blocks: Blocks

    def first(self) -> list[Change]:
        """The changes that are measured whatever is found."""
        return [*self.mixtures, *_direct(self.checkpoint, self.options, self.singles, self.direct)]

    def work(self, device: str) -> list[Work]:
        """What the measurement does, where it is done on that kind of device."""
        return self._work(self.first(), self.costs.waves, device, 1.0)

    def _work(self, changes: Sequence[Change], waves: int, device: str, share: float) -> list[Work]:
        """Of some changes' streams, with a share of all units that are changed."""
        text, costs = self.checkpoint.config.text, self.costs
        layers, rows = text.num_hidden_layers, (costs.tokens, costs.calibration_tokens)
        walked = [(layers, rows[0]), (layers, rows[1]), *((layers - change.layer, rows[0]) for change in changes)]
        counted = Counter((single.role, self.options.schemes[single.option]) for single in self.singles)
        changed = {unit: share * count for unit, count in counted.items()}
        weights, length = layer_weights(self.checkpoint), self.texts.measured.record["sequence_length"]
        works = measuring_work(text, weights, walked, changed, rows, waves, length, device)
        if self.direct is Direct.FEW:
            works.insert(
                1, walk_back_work(text, weights, rows[0], length, device, len(streams_of(self.checkpoint.config)))
            )
        return works

    def waves(self, changes: Sequence[Change]) -> list[list[Change]]:
        """Changes as a cluster's workers take them."""
        layers = self.checkpoint.config.text.num_hidden_layers
        return waves_of(changes, self.costs.workers, self.costs.streams, layers)

    def wave_works(self, device: str) -> list[list[Work]]:
        """What each of them does: the original on both texts, its streams, the share of units that it changes alone."""
        first = self.first()
        return [self._work(wave, 1, device, len(wave) / len(first)) for wave in self.waves(first)]

    def job(self) -> Identity:
        """What decides the figures: an interrupted measurement goes on only with the same."""
        calibration = self.texts.calibration
        calibrated = {} if calibration is None else calibration.record
        parts = {
            "l4pack version": __version__,
            **text_parts(self.texts.measured.record),
            **text_parts(calibrated, "--calibration", "--calibration-samples"),
            "--direct": self.direct.value,
            **self.compute.parts(),
            **weight_parts(self.checkpoint),
        }
        for name, scheme in self.options.schemes.items():
            parts |= flat(scheme.model_dump(mode="json"), f"--options: {name}")
        return Identity(parts)


def prepare_measurement(
    checkpoint: Checkpoint, settings: MeasureSettings, workers: int | None = None
) -> PreparedMeasurement:
    """Check and plan everything that can be without reading a weight; for so many `workers` of a cluster, if any.

    Raises SourceError (quantized already, no weights, no tokenizer), UsageError (options, text), BudgetError.
    """
    _check_source(checkpoint)
    _check_out(settings.out)
    options = options_for(checkpoint.config, settings.options)
    texts = load_texts(
        checkpoint, settings.text, settings.calibration, settings.calibration_samples, needed=options.calibrated
    )
    compute = replace(Compute.of(settings.compute), dtype=torch.float32)  # BF16 would drown the smallest changes
    text = checkpoint.config.text
    singles = singles_of(checkpoint.config, options)
    rows = _tokens(texts)
    length = texts.measured.record["sequence_length"]
    direct = _resolved(settings.direct, checkpoint, singles, rows[0], length)
    mixtures = (uniform_of if direct is Direct.FEW else mixtures_of)(checkpoint.config, options)
    back = back_bytes(text, rows[0]) if direct is Direct.FEW else BackBytes()
    streams = streams_at_once(text, rows, compute.dtype, settings.streams, settings.work, workers or 1, back.kept)
    changes: list[Change] = [*mixtures, *_direct(checkpoint, options, singles, direct)]
    waves = None if workers is None else waves_of(changes, workers, streams, text.num_hidden_layers)
    streams = min(streams, len(changes)) if waves is None else max(map(len, waves))
    needed, ahead = _memory(checkpoint, settings, compute, texts, options, streams, back=direct is Direct.FEW)
    passes = math.ceil(len(changes) / streams) if waves is None else len(waves)
    kept = sum(rows) * text.hidden_size * compute.dtype.itemsize if waves is None and passes > 1 else 0
    at_once = min(workers or 1, passes)
    costs = Costs(
        changes=len(singles),
        direct=len(changes) - len(mixtures),
        joint=len(mixtures),
        streams=streams,
        waves=passes,
        tokens=rows[0],
        calibration_tokens=rows[1],
        flop=flop_of(text, text.num_hidden_layers, sum(rows), length)
        + _flop(checkpoint, changes, rows[0], length)
        + (back_flop(text, rows[0], length) if direct is Direct.FEW else 0),
        read_bytes=(passes + (PASSES_BACK if direct is Direct.FEW else 0)) * layer_bytes(checkpoint),
        disk_bytes=max(
            back.most,
            back.kept + at_once * stream_bytes(text, (streams + 2) * rows[0] + rows[1], compute.dtype) + kept,
        ),
        workers=at_once,
        walk_back_disk_bytes=back.most,
        peak_ram_bytes=needed.ram,
    )
    return PreparedMeasurement(
        checkpoint, settings, options, texts, compute, direct, tuple(singles), tuple(mixtures), costs, ahead,
        Blocks.on(compute.device, text.hidden_size),
    )  # fmt: skip


def _memory(
    checkpoint: Checkpoint,
    settings: MeasureSettings,
    compute: Compute,
    texts: Texts,
    options: MeasureOptions,
    streams: int,
    *,
    back: bool,
) -> tuple[Memory, bool]:
    """Of altered streams beside the original's own, over both texts, and of the walk back where there is one; and whether
    units are loaded ahead. Raises BudgetError."""
    sequences = [*texts.measured.sequences, *(texts.calibration.sequences if texts.calibration else ())]
    computing = computing_on(
        compute, checkpoint.config, sequences, streams=streams + 2, merging=checkpoint.merging_bytes
    )
    ram, device = machine.memory(settings.max_ram), compute.device_room(settings.max_vram)
    if not back:
        return walk_within(computing, partial(measuring, solved=options.calibrated), ram, device)
    measured = sum(len(sequence.tokens) for sequence in texts.measured.sequences)
    changes = max(sum(len(options.by_role.get(role, ())) for role in roles) for roles in _roles(checkpoint))

    def both(computing: Computing) -> Memory:
        held = held_slopes(computing, measured, changes)
        backwards = walking_back(replace(computing, tokens=measured, streams=1))
        return measuring(computing, solved=options.calibrated, held=held).most(backwards)

    return walk_within(computing, both, ram, device)


def _roles(checkpoint: Checkpoint) -> list[tuple[Role, ...]]:
    """The roles of each layer."""
    return [roles_of(checkpoint.config, layer) for layer in range(checkpoint.config.text.num_hidden_layers)]


def _check_source(checkpoint: Checkpoint) -> None:
    if checkpoint.config.quantized:
        raise SourceError(
            f"{checkpoint.name} is quantized already",
            hint="measure the original checkpoint: its answers are the measure",
        )


def _check_out(out: Path) -> None:
    if out.is_dir() or not out.parent.is_dir():
        reason = "is a folder" if out.is_dir() else "lies in a folder that is not there"
        raise UsageError(f"--out {out} {reason}", hint="give the name of a file to write")


def _resolved(asked: Direct, checkpoint: Checkpoint, singles: Sequence[Single], tokens: int, length: int) -> Direct:
    """`auto` measures everything where that is cheap."""
    if asked is Direct.AUTO and _flop(checkpoint, singles, tokens, length) <= CHEAP_FLOP:
        return Direct.ALL
    return asked


def _flop(checkpoint: Checkpoint, changes: Iterable[Change], tokens: int, length: int) -> float:
    """Operations of running altered streams from where they begin."""
    text = checkpoint.config.text
    return flop_of(text, sum(text.num_hidden_layers - change.layer for change in changes), tokens, length)


def _direct(checkpoint: Checkpoint, options: MeasureOptions, singles: Iterable[Single], direct: Direct) -> list[Single]:
    """Single changes to measure at first: of anchors, all in the first, middle and last layer, to test predictions; a few
    that stand for all, where gradients predict."""
    if direct is Direct.ALL:
        return list(singles)
    if direct is Direct.FEW:
        return few_of(checkpoint.config, options)
    last = checkpoint.config.text.num_hidden_layers - 1
    probed = {0, last // 2, last}
    return [single for single in singles if single.layer in probed or single.option in anchors(options, single.role)]


def _tokens(texts: Texts) -> tuple[int, int]:
    calibration = texts.calibration
    return texts.measured.record["tokens"], 0 if calibration is None else calibration.record["tokens"]
