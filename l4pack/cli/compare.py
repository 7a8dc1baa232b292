"""`l4pack compare`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.cluster import cluster_options, joined, planned_workers, slots
from l4pack.cli.evaluate import UNREAD
from l4pack.cli.evaluation_plan import planned_of, show_plan
from l4pack.cli.hours import Hours
from l4pack.cli.opening import opened_original
from l4pack.cli.options import (
    AgainstOption,
    ArtifactsOption,
    AsJsonOption,
    CompanionsOption,
    ComputeOption,
    ContextOption,
    DeviceOption,
    DevicesFileOption,
    DryRunOption,
    GpusPerWorkerOption,
    LoraOption,
    MaxRamOption,
    MaxVramOption,
    OnOption,
    OutOption,
    PriceOption,
    RayOption,
    RestartOption,
    SamplesOption,
    SeedOption,
    SequenceLengthOption,
    TextOption,
    WeightsOnlyOption,
    WorkOption,
)
from l4pack.errors import UsageError
from l4pack.units import given_size, human_bytes, human_gib, human_seconds
from l4pack.work.device import chosen

if TYPE_CHECKING:
    from l4pack.artifact.published import Looked
    from l4pack.checkpoint.source import Checkpoint
    from l4pack.cluster.cluster import Cluster
    from l4pack.evaluate.compare import Comparison
    from l4pack.evaluate.inputs import EvaluationSettings


def compare(
    artifacts: ArtifactsOption,
    against: AgainstOption = None,
    companions: CompanionsOption = None,
    lora: LoraOption = None,
    text: TextOption = "demo",
    samples: SamplesOption = 32,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption[int] = 0,
    out: OutOption[Path | None] = None,
    device: DeviceOption[str] = "h100",
    context: ContextOption = None,
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
    """Compare artifacts of one original with it and with each other: the original is read once for all of them.

    Each folder gets the record that `evaluate` would write; a repository on the Hub is fetched and measured as it is. What sets two apart is measured on the same tokens, so its error bar
    is smaller than theirs. `--out` makes one HTML page of it.

    Example: `l4pack compare demo-int4 demo-fp8 --against demo --out compared.html`
    """
    from l4pack.artifact.published import own_path
    from l4pack.budget.devices import find_host, load_devices
    from l4pack.evaluate.inputs import EvaluationSettings
    from l4pack.text.choice import TextChoice
    from l4pack.work.files import path_beside

    _refuse(artifacts, against)
    find_host(device, load_devices())
    original = opened_original(against, companions, lora)
    assert original is not None
    own, where = own_path(artifacts[0]), chosen(compute)
    hours = Hours(on, devices, price, where, path_beside(own, "").parent, planned=dry_run)
    settings = EvaluationSettings(
        work=work or path_beside(own, ".compare.partial"),
        text=TextChoice(text, samples, sequence_length, seed),
        compute=compute,
        max_ram=given_size(max_ram),
        max_vram=given_size(max_vram),
        weights_only=weights_only,
        restart=restart,
    )
    with _looked(artifacts, weights=not dry_run) as looked:
        if dry_run:
            workers = planned_workers(ray, gpus_per_worker, where, computes=True)
            _plan(looked, original, settings, hours, workers, as_json=as_json)
            return
        with joined(cluster_options(ray, gpus_per_worker, where), computes=True) as cluster:
            found, predicted = _run(looked, original, settings, hours, cluster)
        record = _recorded(found, looked, device, context)
    record["run"]["predicted_seconds"] = predicted
    if out is not None:
        _write_page(record, out)
    console.show_json(record) if as_json else console.show(*comparison_view(record))


def _refuse(artifacts: list[str], against: str | None) -> None:
    """Raise UsageError for what is no comparison."""
    if against is None:
        raise UsageError("compare needs the original", hint="add --against SOURCE")
    if len(artifacts) < 2:
        raise UsageError(
            "there is nothing to compare one artifact with", hint="name two or more, or use l4pack evaluate"
        )
    if len({Path(artifact).resolve() for artifact in artifacts}) < len(artifacts):
        raise UsageError("an artifact is named twice", hint="name each once")


@contextmanager
def _looked(artifacts: list[str], *, weights: bool) -> Iterator[list[Looked]]:
    """All artifacts as folders. Raises UsageError for a record that can't be added to: before the work, not after it."""
    from l4pack.artifact.published import look
    from l4pack.evaluate.record import read_evaluations

    with ExitStack() as stack:
        looked = [stack.enter_context(look(one, weights=weights, say=console.tell)) for one in artifacts]
        for one in looked:
            read_evaluations(one.folder)
        yield looked


def _opened(artifacts: list[Looked]) -> list[Checkpoint]:
    from l4pack.checkpoint.source import open_folder

    return [open_folder(one.folder) for one in artifacts]


def _plan(
    artifacts: list[Looked],
    original: Checkpoint,
    settings: EvaluationSettings,
    hours: Hours,
    workers: int | None,
    *,
    as_json: bool,
) -> None:
    from l4pack.evaluate.compare import prepare_comparison

    prepared = prepare_comparison(_opened(artifacts), original, settings, measured=UNREAD).evaluations
    fetched = None if all(one.here for one in artifacts) else sum(one.fetched_bytes for one in artifacts)
    show_plan(planned_of(prepared, hours, workers, fetched=fetched), as_json=as_json)


def _run(
    artifacts: list[Looked], original: Checkpoint, settings: EvaluationSettings, hours: Hours, cluster: Cluster | None
) -> tuple[Comparison, float | None]:
    """The comparison, and the seconds it was to take."""
    from l4pack.evaluate.compare import prepare_comparison
    from l4pack.evaluate.evaluate import total_bytes
    from l4pack.stream.visitor import Progress
    from l4pack.work.signals import stop_signals

    checkpoints = _opened(artifacts)
    with console.progress("comparing", total_bytes(original, *checkpoints)) as bar, stop_signals() as stop:
        prepared = prepare_comparison(checkpoints, original, settings, Progress.of(bar.shown, stop))
        planned = planned_of(prepared.evaluations, hours, slots(cluster))
        console.talk(*planned.view())
        if cluster is not None:
            cluster.show_on(bar.shown.label, console.warning)
            bar.shown.step(planned.on_cluster())
        return prepared.run(cluster), planned.seconds


def _recorded(found: Comparison, artifacts: list[Looked], device: str, context: int | None) -> dict[str, Any]:
    """What was found, once every artifact that lies here has the record that is its own."""
    from l4pack.evaluate.record import write_accuracy
    from l4pack.recipe import Gates
    from l4pack.report.comparison import comparison_record

    for artifact, record in zip(artifacts, found.records, strict=True):
        if artifact.here:
            write_accuracy(artifact.folder, record, Gates(), {})
    return comparison_record(found, artifacts, device, context)


def _write_page(record: dict[str, Any], out: Path) -> None:
    from l4pack.report.comparison_page import render_comparison
    from l4pack.work.files import write_atomic

    write_atomic(out, render_comparison(record, datetime.now(UTC).date().isoformat()).encode())


def comparison_view(record: dict[str, Any]) -> list[RenderableType]:
    """A comparison for people."""
    from l4pack.text.describe import text_lines

    run = record["run"]
    return [
        f"{len(record['artifacts'])} artifacts against [bold]{console.plain(record['against'])}[/bold]: "
        f"{record['tokens']:,} tokens scored, {run['dtype']} on {console.plain(run['device'])}, activations "
        f"{run['activations']}",
        *map(console.plain, text_lines(record["text"])),
        "",
        _closeness(record),
        "",
        _differences(record),
        *_tasks(record),
        "",
        _costs(record),
        f"{human_seconds(run['seconds'])}, peak memory {human_bytes(run['peak_rss_bytes'])}",
    ]


def _closeness(record: dict[str, Any]) -> RenderableType:
    table = console.table("Artifact", ">Bytes", ">KL, mean", ">Same likeliest token", ">Perplexity ratio")
    for one in record["artifacts"]:
        table.add_row(
            console.plain(one["artifact"]),
            human_bytes(one["artifact_bytes"] or one["weight_bytes"]),
            spread(one["kl_mean"], one["kl_standard_error"]),
            spread(one["top1_agreement"], one["top1_agreement_standard_error"]),
            spread(one["perplexity_ratio"], one["perplexity_ratio_standard_error"]),
        )
    return table


def _differences(record: dict[str, Any]) -> RenderableType:
    table = console.table("Artifact", "Than", ">KL, more", ">Same likeliest token, more")
    for one in record["differences"]:
        table.add_row(
            console.plain(one["artifact"]),
            console.plain(one["than"]),
            spread(one["kl_difference"], one["kl_difference_standard_error"], sign="+"),
            spread(one["top1_agreement_difference"], one["top1_agreement_difference_standard_error"], sign="+"),
        )
    return table


def _tasks(record: dict[str, Any]) -> list[RenderableType]:
    """What the artifacts' own records have of tasks."""
    table = console.table("Task", "Artifact", ">Accuracy", ">Original", ">Recovery")
    for one in record["artifacts"]:
        for name, task in one["tasks"].items():
            original, recovery = task["accuracy_reference"], task["recovery"]
            table.add_row(
                console.plain(name),
                console.plain(one["artifact"]),
                spread(task["accuracy"]["value"], task["accuracy"]["standard_error"]),
                "" if original is None else f"{original['value']:.4g}",
                "" if recovery is None else f"{recovery:.4g}",
            )
    return ["", table] if table.row_count else []


def _costs(record: dict[str, Any]) -> RenderableType:
    table = console.table("Artifact", "Recipe", f"On {record['device']}", ">To spare", ">Largest context", ">Made in")
    for one in record["artifacts"]:
        memory, seconds = one["memory"], one["made_seconds"]
        known = "error" not in memory
        table.add_row(
            console.plain(one["artifact"]),
            console.plain(one["recipe"] or "not known"),
            memory["verdict"].replace("_", " ") if known else console.plain(memory["error"]),
            human_gib(memory["headroom_bytes"]) if known else "",
            f"{memory['max_context']:,}" if known else "",
            "not recorded" if seconds is None else human_seconds(seconds),
        )
    return table


def spread(value: float, error: float | None, sign: str = "") -> str:
    """A figure and its standard error: `0.00970 ± 0.00026`."""
    return f"{value:{sign}.4g}" + ("" if error is None else f" ± {error:.2g}")
