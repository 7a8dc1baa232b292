"""`l4pack evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.cluster import cluster_options, joined, planned_workers, slots
from l4pack.cli.evaluation_plan import Planned, asked_of, planned_of, show_plan
from l4pack.cli.hours import (
    Hours,
)
from l4pack.cli.opening import opened_original
from l4pack.cli.options import (
    AgainstOption,
    AsJsonOption,
    AuditedOption,
    BackendOption,
    CompanionsOption,
    ComputeOption,
    DevicesFileOption,
    DryRunOption,
    GpusPerWorkerOption,
    LimitOption,
    LoraOption,
    MaxKlOption,
    MaxPerplexityRatioOption,
    MaxRamOption,
    MaxVramOption,
    MinAgreementOption,
    MinRecoveryOption,
    NeedleOption,
    OnOption,
    PriceOption,
    RayOption,
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
from l4pack.cli.said import sample_talk, sample_view
from l4pack.units import given_size, human_bytes, human_seconds
from l4pack.work.device import chosen

if TYPE_CHECKING:
    from l4pack.artifact.published import Looked
    from l4pack.cluster.cluster import Cluster
    from l4pack.evaluate.inputs import EvaluationSettings


UNREAD = "not read"  # stands for a digest where only the plan is wanted


def evaluate(
    artifact: AuditedOption,
    against: AgainstOption = None,
    companions: CompanionsOption = None,
    lora: LoraOption = None,
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
    ray: RayOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
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
    own, chosen_device = own_path(artifact), chosen(compute)
    hours = Hours(on, devices, price, chosen_device, path_beside(own, "").parent, planned=dry_run)
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
        max_ram=given_size(max_ram),
        max_vram=given_size(max_vram),
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
            workers = planned_workers(ray, gpus_per_worker, chosen_device, computes=True)
            shown = _planned(looked, against, companions, lora, settings, hours, workers)
            show_plan(shown, as_json=as_json)
            return
        with joined(cluster_options(ray, gpus_per_worker, chosen_device), computes=True) as cluster:
            record = _run(looked.folder, against, companions, lora, settings, hours, cluster)
        record["gates"] = judge(record, limits_of(gates, recovery))
        if looked.here:
            write_accuracy(looked.folder, record, gates, recovery)
    console.show_json(record) if as_json else console.show(*accuracy_view(record))
    require(judge(record, limits_of(gates, recovery)))


def _run(
    artifact: Path,
    against: str | None,
    companions: str | None,
    lora: list[str] | None,
    settings: EvaluationSettings,
    hours: Hours,
    cluster: Cluster | None,
) -> dict[str, Any]:
    from l4pack.checkpoint.source import open_folder
    from l4pack.evaluate.evaluate import prepare_evaluation, total_bytes
    from l4pack.stream.visitor import Progress
    from l4pack.timing.jobs import layer_weights
    from l4pack.work.signals import stop_signals

    checkpoint, original = open_folder(artifact), opened_original(against, companions, lora)
    models = [one for one in (None if settings.reference else original, checkpoint) if one is not None]
    said = sample_talk(settings.sample_tokens).walked_bytes(list(map(layer_weights, models)))
    total = total_bytes(*models) + said
    with console.progress("evaluating", total) as bar, stop_signals() as stop:
        prepared = prepare_evaluation(checkpoint, original, settings, Progress.of(bar.shown, stop))
        planned = planned_of([prepared], hours, slots(cluster))
        if cluster is not None:
            cluster.show_on(bar.shown.label, console.warning)
            bar.shown.step(planned.on_cluster())
        record = prepared.run(cluster)
    record["run"]["predicted_seconds"] = planned.seconds
    return record


def _planned(
    looked: Looked,
    against: str | None,
    companions: str | None,
    lora: list[str] | None,
    settings: EvaluationSettings,
    hours: Hours,
    workers: int | None,
) -> Planned:
    """What an evaluation would take; no weight is read."""
    from l4pack.checkpoint.source import open_folder
    from l4pack.evaluate.evaluate import prepare_evaluation

    checkpoint, original = open_folder(looked.folder), opened_original(against, companions, lora)
    prepared = [prepare_evaluation(checkpoint, original, settings, measured=UNREAD)]
    fetched = None if looked.here else looked.fetched_bytes
    return planned_of(prepared, hours, workers, asked_of(prepared[0]), fetched)


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
