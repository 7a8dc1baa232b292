"""`l4pack evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.hours import Hours, hours_view, predicted_record, predicted_seconds
from l4pack.cli.options import (
    AgainstOption,
    AsJsonOption,
    AuditedOption,
    BackendOption,
    ComputeOption,
    DevicesFileOption,
    DryRunOption,
    LimitOption,
    MaxKlOption,
    MaxPerplexityRatioOption,
    MaxRamOption,
    MaxVramOption,
    MinAgreementOption,
    MinRecoveryOption,
    NeedleOption,
    OnOption,
    PriceOption,
    ReferenceOption,
    RestartOption,
    SamplesOption,
    SampleTokensOption,
    SaveReferenceOption,
    SeedOption,
    SequenceLengthOption,
    SuiteOption,
    TaskOption,
    TextOption,
    WeightsOnlyOption,
    WorkOption,
)
from l4pack.cli.said import sample_line, sample_talk, sample_view
from l4pack.units import human_bytes, human_seconds, parse_size
from l4pack.work.device import chosen

if TYPE_CHECKING:
    from l4pack.artifact.published import Looked
    from l4pack.evaluate.evaluate import PreparedEvaluation
    from l4pack.evaluate.harness import CountingScorer
    from l4pack.evaluate.inputs import EvaluationSettings
    from l4pack.timing.jobs import LayerWeights
    from l4pack.timing.speeds import Prediction


UNREAD = "not read"  # stands for a digest where only the plan is wanted


def evaluate(
    artifact: AuditedOption,
    against: AgainstOption = None,
    text: TextOption = "demo",
    samples: SamplesOption = 32,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption[int] = 0,
    task: TaskOption = None,
    suite: SuiteOption = None,
    limit: LimitOption = None,
    backend: BackendOption = "streamed",
    needle: NeedleOption = None,
    sample_tokens: SampleTokensOption[int] = 0,
    max_kl: MaxKlOption = None,
    min_agreement: MinAgreementOption = None,
    max_perplexity_ratio: MaxPerplexityRatioOption = None,
    min_recovery: MinRecoveryOption = None,
    save_reference: SaveReferenceOption = None,
    reference: ReferenceOption = None,
    weights_only: WeightsOnlyOption = False,
    compute: ComputeOption = "auto",
    max_ram: MaxRamOption = None,
    max_vram: MaxVramOption = None,
    work: WorkOption = None,
    restart: RestartOption = False,
    on: OnOption = None,
    devices: DevicesFileOption = None,
    price: PriceOption = None,
    dry_run: DryRunOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Compare an artifact with its original, layer by layer: perplexity, KL divergence, agreement, tasks.

    A repository on the Hub is fetched, and measured as it is published; its record is shown, and kept nowhere.

    Example: `l4pack evaluate demo-int4 --against demo --max-kl 0.05`
    """
    from l4pack.artifact.published import look, own_path
    from l4pack.evaluate.gates import asked_gates, judge, limits_of, parse_recovery, require
    from l4pack.evaluate.inputs import EvaluationSettings, split_tasks
    from l4pack.evaluate.record import read_evaluations, write_accuracy
    from l4pack.text.choice import TextChoice
    from l4pack.work.files import path_beside

    questions, harness = split_tasks(task or ())
    own = own_path(artifact)
    hours = Hours(on, devices, price, chosen(compute), path_beside(own, "").parent, planned=dry_run)
    settings = EvaluationSettings(
        work=work or path_beside(own, ".evaluate.partial"),
        text=TextChoice(text, samples, sequence_length, seed),
        tasks=questions,
        harness=harness,
        backend=backend,
        limit=limit,
        needle=needle,
        sample_tokens=sample_tokens,
        suites=tuple(dict.fromkeys(suite or ())),
        compute=compute,
        max_ram=_size(max_ram),
        max_vram=_size(max_vram),
        weights_only=weights_only,
        restart=restart,
        save_reference=save_reference,
        reference=reference,
    )
    gates = asked_gates(max_kl=max_kl, min_agreement=min_agreement, max_perplexity_ratio=max_perplexity_ratio)
    recovery = parse_recovery(min_recovery or [])
    with look(artifact, weights=not dry_run, say=console.tell) as looked:
        if looked.here:
            read_evaluations(looked.folder)  # what can't be added to is said before the work, not after it
        if dry_run:
            show_plan(*_planned(looked, against, settings, hours), as_json=as_json)
            return
        record = _run(looked.folder, against, settings, hours)
        record["gates"] = judge(record, limits_of(gates, recovery))
        if looked.here:
            write_accuracy(looked.folder, record, gates, recovery)
    console.show_json(record) if as_json else console.show(*accuracy_view(record))
    require(judge(record, limits_of(gates, recovery)))


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)


def _run(artifact: Path, against: str | None, settings: EvaluationSettings, hours: Hours) -> dict[str, Any]:
    from l4pack.checkpoint.open import open_source
    from l4pack.checkpoint.source import open_folder
    from l4pack.evaluate.evaluate import prepare_evaluation, total_bytes
    from l4pack.stream.visitor import Progress
    from l4pack.work.signals import stop_signals

    checkpoint, original = open_folder(artifact), None if against is None else open_source(against)
    total = total_bytes(None if settings.reference else original, checkpoint) * (1 + settings.sample_tokens)
    with console.progress("evaluating", total) as bar, stop_signals() as stop:
        prepared = prepare_evaluation(checkpoint, original, settings, Progress.of(bar.shown, stop))
        prediction = prediction_of([prepared], hours)
        record = prepared.run()
    record["run"]["predicted_seconds"] = predicted_seconds(prediction)
    return record


def _asked(prepared: PreparedEvaluation) -> CountingScorer | None:
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


def prediction_of(
    prepared: Sequence[PreparedEvaluation], hours: Hours, asked: CountingScorer | None = None
) -> Prediction | None:
    """The time of evaluations that walk together, with that of lm-eval's tasks where they were counted."""
    from l4pack.timing.counts import seeing
    from l4pack.timing.jobs import Asked, asking, evaluating, talking

    first, models = prepared[0], _weights(prepared)
    lengths = [len(sequence.tokens) for sequence in first.inputs.sequences]
    text, digested = first.artifact.config.text, sum(one.artifact.weight_bytes for one in prepared)
    work = evaluating(text, models, sum(lengths), max(lengths), hours.kind, digested=digested)
    seen = (sequence.images for sequence in first.inputs.sequences)
    work += [seeing(first.artifact.config, sum(one.tiles for one in seen if one is not None))] * len(models)
    work.append(talking(text, models, sample_talk(first.settings.sample_tokens), hours.kind))
    if asked is not None:
        requests = Asked(asked.tokens, asked.scored, asked.longest, asked.passes)
        work.append(asking(text, models, requests, hours.kind))
    return hours.predict(work, sum(model.nbytes for model in models))


def _weights(prepared: Sequence[PreparedEvaluation]) -> list[LayerWeights]:
    """Those of the models that walk."""
    from l4pack.timing.jobs import layer_weights

    original = None if prepared[0].settings.reference else prepared[0].original
    return [layer_weights(one) for one in (original, *(one.artifact for one in prepared)) if one is not None]


def _planned(
    looked: Looked, against: str | None, settings: EvaluationSettings, hours: Hours
) -> tuple[dict[str, Any], Prediction | None]:
    """What an evaluation would take, as JSON, and its time; no weight is read."""
    from l4pack.checkpoint.open import open_source
    from l4pack.checkpoint.source import open_folder
    from l4pack.evaluate.evaluate import prepare_evaluation

    checkpoint, original = open_folder(looked.folder), None if against is None else open_source(against)
    prepared = [prepare_evaluation(checkpoint, original, settings, measured=UNREAD)]
    asked = _asked(prepared[0])
    prediction = prediction_of(prepared, hours, asked)
    fetched = {} if looked.here else {"fetched_bytes": looked.fetched_bytes}
    return {**plan_record(prepared, prediction, asked), **fetched}, prediction


def plan_record(
    prepared: Sequence[PreparedEvaluation], prediction: Prediction | None, asked: CountingScorer | None = None
) -> dict[str, Any]:
    """What evaluations that walk together would take, as JSON."""
    from l4pack.evaluate.evaluate import total_bytes

    first = prepared[0]
    original = None if first.settings.reference else first.original
    return {
        "tokens": sum(len(sequence.tokens) for sequence in first.inputs.sequences),
        "sequences": len(first.inputs.sequences),
        "read_bytes": total_bytes(original, *(one.artifact for one in prepared)),
        "peak_ram_bytes": first.planned.ram,
        "sample": sample_talk(first.settings.sample_tokens).record(first.artifact.config.text, _weights(prepared)),
        "lm_eval": None if asked is None else _asked_record(first, asked),
        **predicted_record(prediction),
    }


def show_plan(plan: dict[str, Any], prediction: Prediction | None, *, as_json: bool) -> None:
    """What `--dry-run` answers."""
    console.show_json({"plan": plan}) if as_json else console.show(*plan_view(plan, prediction))


def plan_view(plan: dict[str, Any], prediction: Prediction | None) -> list[RenderableType]:
    """A plan of an evaluation for people."""
    reads, memory = human_bytes(plan["read_bytes"]), human_bytes(plan["peak_ram_bytes"])
    return [
        f"plan      {plan['tokens']:,} tokens in {plan['sequences']:,} sequences; reads {reads} of weights, takes "
        f"{memory} of memory",
        *sample_line(plan["sample"]),
        *_asked_view(plan["lm_eval"]),
        *([f"fetched   {human_bytes(plan['fetched_bytes'])} from the Hub"] if "fetched_bytes" in plan else []),
        *hours_view(prediction),
    ]


def _asked_view(asked: dict[str, Any] | None) -> list[str]:
    """The cost of lm-eval's tasks, for people."""
    if asked is None:
        return []
    left = f"; left out, as they generate text: {', '.join(asked['left_out'])}" if asked["left_out"] else ""
    return [
        f"lm-eval   {asked['requests']:,} requests, {asked['tokens']:,} tokens of each model in {asked['passes']:,} "
        f"{'pass' if asked['passes'] == 1 else 'passes'}; reads {human_bytes(asked['read_bytes'])} of weights{console.plain(left)}"
    ]


def accuracy_view(record: dict[str, Any]) -> list[RenderableType]:
    """An evaluation for people."""
    from l4pack.text.describe import text_lines

    text, run = record["text"], record["run"]
    lines: list[RenderableType] = [
        f"[bold]{console.plain(record['artifact'])}[/bold]"
        + (f" against [bold]{console.plain(record['against'])}[/bold]" if record["against"] else ""),
        f"{record['tokens']:,} tokens scored, sequences of at most {text['sequence_length']}, {run['dtype']} on "
        f"{console.plain(run['device'])}, activations {run['activations']}",
        *map(console.plain, text_lines(text)),
        "",
        _measures(record),
    ]
    lines += _layers_view(record)
    for name, task in record["tasks"].items():
        lines.append(_task_line(name, task))
    for name, suite in record.get("suites", {}).items():
        lines.append(_suite_line(name, suite))
    if "needle" in record:
        lines.append(_needle_line(record["needle"]))
    lines += sample_view(record)
    if "refusals" in record:
        lines += _refusals_view(record["refusals"])
    for gate in record["gates"]:
        mark = "[green]passed[/green]" if gate["ok"] else "[red]missed[/red]"
        value = "not measured" if gate["value"] is None else f"{gate['value']:.6g}"
        lines.append(f"gate {console.plain(gate['gate'])} {gate['limit']:g}: {value}, {mark}")
    predicted = run.get("predicted_seconds")
    beside = "" if predicted is None else f" ({human_seconds(predicted)} were predicted)"
    lines.append(f"{human_seconds(run['seconds'])}{beside}, peak memory {human_bytes(run['peak_rss_bytes'])}")
    return lines


def _measures(record: dict[str, Any]) -> RenderableType:
    table = console.table("Measure", ">Value", ">Standard error")
    rows = [
        ("perplexity, original", "perplexity_reference", "perplexity_reference_standard_error"),
        ("perplexity, artifact", "perplexity_artifact", "perplexity_artifact_standard_error"),
        ("perplexity ratio", "perplexity_ratio", "perplexity_ratio_standard_error"),
        ("KL(original || artifact), mean", "kl_mean", "kl_standard_error"),
        ("KL, median", "kl_median", ""),
        ("KL, 99th percentile", "kl_p99", ""),
        ("KL, largest", "kl_max", ""),
        ("same likeliest token", "top1_agreement", "top1_agreement_standard_error"),
    ]
    for label, key, error in rows:
        if key in record:
            spread = record.get(error)
            table.add_row(label, f"{record[key]:.6g}", "" if spread is None else f"{spread:.2g}")
    if "true_token_probability" in record:
        table.add_row("true token's probability, RMS change", f"{record['true_token_probability']['rms']:.6g}", "")
    return table


def _layers_view(record: dict[str, Any]) -> list[RenderableType]:
    if not record["worst"]:
        return []
    table = console.table("Hurts most", ">Relative error", title=None)
    for unit in record["worst"]:
        expert = f" {unit['expert']}" if "expert" in unit else ""
        table.add_row(f"layer {unit['layer']}, {unit['block'].replace('_', ' ')}{expert}", f"{unit['error']:.4g}")
    moved = [layer["routing_agreement"] for layer in record["layers"] if "routing_agreement" in layer]
    last = record["layers"][-1].get("residual_error")
    lines: list[RenderableType] = ["", table]
    if last is not None:
        lines.append(f"residual stream after the last layer: relative error {last:.4g}")
    if moved:
        lines.append(
            f"routed like the original: {100 * sum(moved) / len(moved):.2f} % of tokens, least {100 * min(moved):.2f} % in a layer"
        )
    return lines


def _task_line(name: str, task: dict[str, Any]) -> str:
    artifact, original = task["accuracy"], task.get("accuracy_reference")
    line = (
        f"task {console.plain(name)}: {task.get('metric', 'accuracy')} {artifact['value']:.4f} on {task['questions']}"
    )
    if original is not None:
        recovery = "" if task["recovery"] is None else f", recovery {task['recovery']:.4f}"
        alike = "" if "same_choice" not in task else f", same choice {task['same_choice']:.4f}"
        line += f", original {original['value']:.4f}{recovery}{alike}"
    return line


def _suite_line(name: str, suite: dict[str, Any]) -> str:
    line = f"suite {console.plain(name)}: mean {suite['mean']:.4f} of {len(suite['tasks'])} tasks"
    if "mean_reference" in suite:
        percent = suite["recovery_percent"]
        line += f", original {suite['mean_reference']:.4f}" + ("" if percent is None else f", recovery {percent:.1f} %")
    left = ", ".join(suite["left_out"])
    return line + (f"; not run: {console.plain(left)}" if left else "")


def _refusals_view(found: dict[str, Any]) -> list[RenderableType]:
    """How probable refusals are, a row for each kind of request."""
    from l4pack.evaluate.refusal_text import refusal_lines, refusal_rows

    table = console.table("Refusals", ">Original", ">Artifact", ">Change")
    for row in refusal_rows(found):
        table.add_row(*row)
    return ["", table, *(console.plain(line) for line in refusal_lines(found))]


def _needle_line(needle: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {one['retrieved']:.2f}" for name, one in needle.items())
    length = needle["artifact"]["length"]
    return f"needles retrieved in {length:,} tokens: {shares}"
