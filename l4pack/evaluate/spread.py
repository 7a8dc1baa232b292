"""Evaluating on the workers of a cluster: a layer in a few stages, each done everywhere before the next one begins.

    attention   some batches of sequences a task, in both models      begin    the router, and the MLP of all tokens, of
    feed        an expert, in both models                                      some blocks of rows
    compare     some blocks of the two models' outputs                score    some answers, after the last layer

So the cluster reads every expert once, as one machine does, and whoever dies takes no more than a task along.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from l4pack.checkpoint.everywhere import everywhere
from l4pack.cluster.cluster import Cluster
from l4pack.cluster.options import Share, worker_device
from l4pack.evaluate.answers import Answers, StreamAnswers
from l4pack.evaluate.desk import ForwardDesk, ForwardJob, Given
from l4pack.evaluate.layer_errors import LayerErrors, Squares, difference_blocks
from l4pack.evaluate.outcome import Scored, joined_scores
from l4pack.evaluate.reference import StoredReference
from l4pack.plan.memory import Memory
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import Blocks, LayerPass
from l4pack.stream.rows import TOKENS_SCORED
from l4pack.stream.sides import Stream
from l4pack.stream.spread import Workers, check_seen, check_spreadable, joined
from l4pack.stream.stages import CURRENT, Stage, StageDesk, StageFiles
from l4pack.stream.units import expert_unit, feed_forward_unit
from l4pack.stream.visitor import Progress, Visit, Visitor
from l4pack.stream.walk import Walk


@dataclass(frozen=True)
class Crew:
    """Who runs an evaluation's layers: a cluster whose tasks take so much memory."""

    cluster: Cluster
    memory: Memory

    def share(self) -> Share:
        """What a task takes of a node."""
        return Share(self.cluster.threads, self.cluster.options.gpus, self.memory.ram)


class SpreadForward(LayerErrors):
    """Models that walk beside each other, original first, whose layers others run."""

    elsewhere = True

    def __init__(
        self,
        crew: Crew,
        models: Sequence[Model],
        packed: Packed,
        folder: Path,
        compute: Compute,
        progress: Progress,
        *,
        paired: bool,
        round_activations: bool,
        stored: StoredReference | None = None,
    ) -> None:
        """`folder` takes the hidden states, and is this process's. Raises UsageError naming a node that differs, or what
        keeps these models from being spread; BudgetError where no node has what a task takes."""
        config = models[0].weights.checkpoint.config
        super().__init__(config, paired=paired)
        self._config, self._packed, self._progress, self._models = config, packed, progress, models
        self._tokens: list[int] = []  # of each expert in the layer under way
        self._outputs: list[list[Squares]] = []  # how far those of the layer are from the original's, of each artifact
        text, place = config.text, replace(compute, device=_device(compute))
        check_spreadable(text, compute.dtype.itemsize, crew.cluster)
        checkpoints = {model.name: everywhere(model.weights.checkpoint) for model in models}
        self._blocks, self._folder = Blocks.on(compute.device, text.hidden_size), folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = Packed([replace(one, images=None) for one in packed.sequences])  # images are embedded here
        job = ForwardJob(
            tuple(checkpoints.items()), rows, self._folder, self._blocks, place, paired, round_activations, stored
        )
        check_seen(crew.cluster, crew.share(), self._folder, list(checkpoints.values()), place)
        self._workers = Workers(
            crew.cluster, crew.share(), f"evaluating {self._folder} {secrets.token_hex(4)}", ForwardDesk, job
        )
        self._files = StageFiles(folder, list(checkpoints), (packed.rows, text.hidden_size, compute.dtype))

    def spread(self, visits: Sequence[Visit], settle: Callable[[], None]) -> bool:
        """Run a layer, stage by stage."""
        passes = {name: one for visit in visits for name, one in visit.passes.items()}
        first = next(iter(passes.values()))
        layer, config = visits[0].layer, self._config
        stage = self._files.begin(layer, next(iter(visits[0].streams.values())).side)
        self._given("attention", ForwardDesk.attend, self._shared(stage, len(first.batches())))
        settle()
        self._files.outputs(stage)
        everyones = feed_forward_unit(config, layer).part.value.replace("_", " ")
        begun = self._given(everyones, ForwardDesk.begin, self._shared(stage, len(first.row_blocks())))
        if first.moe:
            self._feed(self._routed(stage, visits, passes, begun), passes)
        self._outputs = self._compared(stage)
        self._files.finish(stage)
        return True

    @property
    def visitor(self) -> Visitor:
        """See `forward.Forward`."""
        return self

    @contextmanager
    def answers(self, walk: Walk) -> Iterator[Sequence[Answers]]:
        """See `forward.Forward`."""
        desk = StageDesk(self._folder, [Lane(one.name, one, self._packed) for one in self._models], self._blocks)
        with desk.rows(_ended(walk), CURRENT) as rows:
            yield [StreamAnswers(model, rows[model.name]) for model in self._models]

    def score(self, walk: Walk) -> list[Scored]:
        """See `forward.Forward`."""
        blocks = math.ceil(len(self._packed.scored_rows()) / TOKENS_SCORED)
        stages = self._shared(_ended(walk), blocks)
        found = self._run("scoring", ForwardDesk.score, stages)
        return [joined_scores(parts) for parts in zip(*found, strict=True)]

    def _residual(self, streams: Mapping[str, Stream], model: int) -> Sequence[Squares]:
        del streams
        return self._outputs[model - 1]

    def _shared(self, stage: Stage, count: int) -> list[Stage]:
        """A stage of so many batches or blocks, shared out."""
        return [replace(stage, some=some) for some in self._workers.some(count)]

    def _run(self, name: str, work: Callable[[ForwardDesk, Stage], Any], stages: Sequence[Stage]) -> list[Any]:
        return self._workers.run(name, work, stages, self._progress.stop, self._rows)

    def _given(self, name: str, work: Callable[[ForwardDesk, Stage], Given], stages: Sequence[Stage]) -> list[Given]:
        """What came of units, errors noted as of one machine."""
        found: list[Given] = self._run(f"layer {stages[0].layer + 1}, {name}", work, stages)
        for model, unit in dict.fromkeys(key for one in found for key in one.errors):
            self._note(model, unit, [squares for one in found for squares in one.errors.get((model, unit), ())])
        return found

    def _routed(
        self, stage: Stage, visits: Sequence[Visit], passes: Mapping[str, LayerPass], begun: Sequence[Given]
    ) -> Stage:
        """The stage with where each model's router sends every row."""
        whole = {name: joined([one.routing[name] for one in begun]) for name in passes}
        for name, routing in whole.items():
            passes[name].routing = routing
        for visit in visits:
            self.routed(visit)
        return replace(stage, routing=self._workers.cluster.parcel(whole))

    def _feed(self, stage: Stage, passes: Mapping[str, LayerPass]) -> None:
        """Give every expert that has tokens of any model its own."""
        counts = [one.routing.counts() for one in passes.values() if one.routing is not None]
        self._tokens = [sum(models) for models in zip(*counts, strict=True)]
        used = [expert_unit(stage.layer, expert) for expert, tokens in enumerate(self._tokens) if tokens]
        self._given("experts", ForwardDesk.feed, [replace(stage, units=(unit,)) for unit in used])

    def _compared(self, stage: Stage) -> list[list[Squares]]:
        """How far each artifact's outputs are from the original's, by blocks, where that walks."""
        if not self._paired:
            return []
        stages = self._shared(stage, difference_blocks(self._packed.rows))
        found = self._run(f"layer {stage.layer + 1}, comparing", ForwardDesk.compare, stages)
        return [[squares for part in parts for squares in part] for parts in zip(*found, strict=True)]

    def _rows(self, stage: Stage) -> int:
        """About how many rows a task goes through."""
        if stage.units:
            return sum(self._tokens[unit.expert] for unit in stage.units if unit.expert is not None)
        return self._packed.rows if stage.some is None else len(stage.some)


def _ended(walk: Walk) -> Stage:
    """What comes after the last layer."""
    return Stage(len(walk.order), next(iter(walk.streams.values())).side, "")


def _device(compute: Compute) -> torch.device:
    """The same kind of device as a worker calls its own."""
    return torch.device(worker_device(str(compute.device)))
