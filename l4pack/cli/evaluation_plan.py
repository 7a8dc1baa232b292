"""What an evaluation takes, and evaluations that walk together, as commands say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l4pack.cli import console
from l4pack.cli.hours import (
    Hours,
    hours_view,
    predicted_record,
    predicted_seconds,
    spread_record,
    spread_view,
)
from l4pack.cli.said import sample_line, sample_talk
from l4pack.units import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from l4pack.evaluate.evaluate import PreparedEvaluation
    from l4pack.evaluate.harness import CountingScorer
    from l4pack.timing.jobs import LayerWeights
    from l4pack.timing.speeds import Prediction
    from l4pack.timing.spread import Spread


@dataclass(frozen=True)
class Planned:
    """What evaluations that walk together take: in this process as `prediction` says, or `shared` by a cluster's workers."""

    record: dict[str, Any]
    prediction: Prediction | None
    shared: Spread | None

    @property
    def seconds(self) -> float | None:
        """How long it takes where it runs; None where that is not known."""
        return predicted_seconds(self.prediction) if self.shared is None else self.shared.seconds

    def on_cluster(self) -> str:
        """What every worker must have, in a line."""
        plan = self.record
        return (
            f"{plan['tokens']:,} tokens on {plan['workers']:,} workers, {human_bytes(plan['peak_ram_bytes'])} of memory "
            f"each; hidden states take {human_bytes(plan['disk_bytes'])} of the disk that all share"
        )

    def view(self) -> list[RenderableType]:
        """For people."""
        plan = self.record
        reads, memory, disk = (human_bytes(plan[key]) for key in ("read_bytes", "peak_ram_bytes", "disk_bytes"))
        return [
            f"plan      {plan['tokens']:,} tokens in {plan['sequences']:,} sequences; reads {reads} of weights, takes "
            f"{memory} of memory and {disk} of disk",
            *sample_line(plan["sample"]),
            *_asked_view(plan["lm_eval"]),
            *([f"fetched   {human_bytes(plan['fetched_bytes'])} from the Hub"] if "fetched_bytes" in plan else []),
            *hours_view(self.prediction),
            *spread_view(self.shared),
        ]


def planned_of(
    prepared: Sequence[PreparedEvaluation],
    hours: Hours,
    workers: int | None = None,
    asked: CountingScorer | None = None,
    fetched: int | None = None,
) -> Planned:
    """What evaluations that walk together take, in this process or on so many workers, with lm-eval's tasks where they were
    counted; `fetched` are bytes that come from the Hub."""
    from l4pack.evaluate.evaluate import total_bytes

    first, models = prepared[0], _weights(prepared)
    original, text = None if first.settings.reference else first.original, first.artifact.config.text
    prediction = _prediction(prepared, hours, asked)
    shared = hours.spread_over(text, models, _tokens(first), workers)
    record = {
        "tokens": _tokens(first)[0],
        "sequences": len(first.inputs.sequences),
        "read_bytes": total_bytes(original, *(one.artifact for one in prepared)),
        "peak_ram_bytes": first.planned.ram,
        "disk_bytes": first.disk_bytes(len(models), spread=workers is not None),
        "sample": sample_talk(first.settings.sample_tokens).record(text, models),
        "lm_eval": None if asked is None else _asked_record(first, asked),
        **({} if fetched is None else {"fetched_bytes": fetched}),
        **({} if workers is None else {"workers": workers}),
        **predicted_record(prediction),
        **spread_record(shared),
    }
    return Planned(record, prediction, shared)


def _prediction(
    prepared: Sequence[PreparedEvaluation], hours: Hours, asked: CountingScorer | None
) -> Prediction | None:
    """The time of evaluations that walk together, with that of lm-eval's tasks where they were counted."""
    from l4pack.timing.counts import seeing
    from l4pack.timing.jobs import Asked, asking, evaluating, talking

    first, models = prepared[0], _weights(prepared)
    text, digested = first.artifact.config.text, sum(one.artifact.weight_bytes for one in prepared)
    work = evaluating(text, models, *_tokens(first), hours.kind, digested=digested)
    seen = (sequence.images for sequence in first.inputs.sequences)
    work += [seeing(first.artifact.config, sum(one.tiles for one in seen if one is not None))] * len(models)
    work.append(talking(text, models, sample_talk(first.settings.sample_tokens), hours.kind))
    if asked is not None:
        requests = Asked(asked.tokens, asked.scored, asked.longest, asked.passes)
        work.append(asking(text, models, requests, hours.kind))
    return hours.predict(work, sum(model.nbytes for model in models))


def _tokens(prepared: PreparedEvaluation) -> tuple[int, int]:
    """All of them, and those of the longest sequence."""
    lengths = [len(sequence.tokens) for sequence in prepared.inputs.sequences]
    return sum(lengths), max(lengths)


def _weights(prepared: Sequence[PreparedEvaluation]) -> list[LayerWeights]:
    """Those of the models that walk."""
    from l4pack.timing.jobs import layer_weights

    original = None if prepared[0].settings.reference else prepared[0].original
    return [layer_weights(one) for one in (original, *(one.artifact for one in prepared)) if one is not None]


def show_plan(planned: Planned, *, as_json: bool) -> None:
    """What `--dry-run` answers."""
    console.show_json({"plan": planned.record}) if as_json else console.show(*planned.view())


def asked_of(prepared: PreparedEvaluation) -> CountingScorer | None:
    """What lm-eval's tasks would ask of a streamed model; None where there are none, or an engine runs them."""
    from l4pack.evaluate.harness import counted

    if not prepared.asked.tasks or not prepared.asked.streamed:
        return None
    return counted(prepared.artifact, prepared.asked, prepared.settings.limit, prepared.manager)


def _asked_record(prepared: PreparedEvaluation, asked: CountingScorer) -> dict[str, Any]:
    """The cost of lm-eval's tasks, as JSON."""
    return {
        "requests": asked.requests,
        "tokens": asked.tokens,
        "passes": asked.passes,
        "read_bytes": asked.passes * sum(model.nbytes for model in _weights([prepared])),
        "left_out": [
            one.task for suite in prepared.asked.suites for one in suite.tasks if not prepared.asked.runs(one)
        ],
    }


def _asked_view(asked: dict[str, Any] | None) -> list[str]:
    """The cost of lm-eval's tasks, for people."""
    if asked is None:
        return []
    left = f"; left out, as they generate text: {', '.join(asked['left_out'])}" if asked["left_out"] else ""
    return [
        f"lm-eval   {asked['requests']:,} requests, {asked['tokens']:,} tokens of each model in {asked['passes']:,} "
        f"{'pass' if asked['passes'] == 1 else 'passes'}; reads {human_bytes(asked['read_bytes'])} of weights{console.plain(left)}"
    ]
