"""What a worker of a cluster does of an evaluation: some sequences, some rows, some experts, or some answers of all models."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from l4pack.checkpoint.source import Checkpoint
from l4pack.evaluate.answers import StreamAnswers
from l4pack.evaluate.layer_errors import Samples, Squares, block_difference
from l4pack.evaluate.outcome import Scored, score_models
from l4pack.evaluate.reference import StoredReference
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import Blocks, Routing
from l4pack.stream.modules import Skeleton
from l4pack.stream.rows import TOKENS_SCORED
from l4pack.stream.stages import ATTENDING, CURRENT, FEEDING, FOLLOWING, Stage, StageDesk
from l4pack.stream.units import Part, Unit, UnitWeights, feed_forward_unit, load_unit
from l4pack.stream.weights import Weights


@dataclass(frozen=True)
class ForwardJob:
    """What a worker opens: models by name, the original first where it is `paired` with artifacts, and the folder of hidden
    states. `stored` are the original's answers where they were kept.
    """

    models: tuple[tuple[str, Checkpoint], ...]
    packed: Packed
    hidden: Path
    blocks: Blocks
    compute: Compute
    paired: bool
    round_activations: bool
    stored: StoredReference | None = None


@dataclass(frozen=True)
class Given:
    """What came of rows that went through units: where each model's router sends them, and how far units of each model, by
    its number, are from the original's."""

    routing: dict[str, Routing]
    errors: dict[tuple[int, Unit], list[Squares]]


def model_of(
    name: str, checkpoint: Checkpoint, compute: Compute, stack: ExitStack, *, round_activations: bool
) -> Model:
    """A model whose files are open until the stack is left."""
    device, dtype, tiled = compute.device, compute.dtype, compute.tiles > 0
    weights = Weights(checkpoint, device, dtype, round_activations=round_activations, tiled=tiled)
    return Model(name, stack.enter_context(weights), Skeleton(checkpoint.config, device, dtype))


class ForwardDesk:
    """An evaluation as a worker has it open."""

    def __init__(self, job: ForwardJob) -> None:
        self._job, self._open = job, ExitStack()
        models = [
            model_of(name, one, job.compute, self._open, round_activations=job.round_activations)
            for name, one in job.models
        ]
        self._models = {model.name: model for model in models}
        self._files = StageDesk(job.hidden, [Lane(one.name, one, job.packed) for one in models], job.blocks)
        self._samples = Samples(models[0].weights.checkpoint.config)

    def close(self) -> None:
        """Close all files."""
        self._open.close()

    def attend(self, stage: Stage) -> Given:
        """Attention of some batches of sequences."""
        return self._given(stage, ATTENDING, (Unit(stage.layer, Part.ATTENTION),))

    def begin(self, stage: Stage) -> Given:
        """Ask the router about some blocks of rows, and give them to the MLP of all tokens."""
        config = next(iter(self._models.values())).weights.checkpoint.config
        return self._given(stage, FEEDING, (feed_forward_unit(config, stage.layer),), route=True)

    def feed(self, stage: Stage) -> Given:
        """Give experts their rows."""
        return self._given(stage, FEEDING, stage.units)

    def _given(self, stage: Stage, opens: tuple[str, ...], units: tuple[Unit, ...], *, route: bool = False) -> Given:
        before = 0 if stage.some is None else stage.some.start * self._job.blocks.rows
        given, paired = Given({}, {}), self._job.paired
        self._samples.clear()
        with self._files.passes(stage, opens, writes=True) as passes:
            for number, (name, one) in enumerate(passes.items()):
                if route and (routing := one.route()) is not None:
                    given.routing[name] = routing
                for unit in units:
                    if not one.count(unit) and not (paired and number):
                        continue
                    weights = self._load(name, unit)
                    if not paired:
                        one.run(unit, weights)
                    elif not number:
                        self._samples.run(unit, one, weights, before)
                    else:
                        given.errors[number, unit] = self._samples.compare(unit, one.run(unit, weights))
        return given

    def _load(self, name: str, unit: Unit) -> UnitWeights:
        return load_unit(self._models[name].weights, unit)

    def compare(self, stage: Stage) -> list[list[Squares]]:
        """How far each artifact's outputs are from the original's, in some blocks of rows."""
        assert stage.some is not None
        with self._files.rows(stage, FOLLOWING) as rows:
            original, *artifacts = (one.data for one in rows.values())
            return [[block_difference(original, one, number) for number in stage.some] for one in artifacts]

    def score(self, stage: Stage) -> list[Scored]:
        """Score the answers to some blocks of scored tokens, once all layers have run."""
        assert stage.some is not None
        some = slice(stage.some.start * TOKENS_SCORED, stage.some.stop * TOKENS_SCORED)
        with self._files.rows(stage, CURRENT) as rows:
            answers = [StreamAnswers(model, rows[name]) for name, model in self._models.items()]
            return score_models(answers, self._job.stored, self._job.packed, some)
