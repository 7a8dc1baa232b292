"""`l4pack quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from l4pack.cli import console
from l4pack.cli.cluster import cluster_options, joined, planned_workers
from l4pack.cli.hours import (
    Hours,
    beside_view,
    hours_view,
    predicted_record,
    spread_record,
    spread_view,
    within_record,
    within_time,
    within_view,
)
from l4pack.cli.options import (
    AllowRequantizeOption,
    AsJsonOption,
    CalibrationOption,
    CalibrationSamplesOption,
    CompanionsOption,
    ComputeOption,
    DevicesFileOption,
    DryRunOption,
    EarlierSamplesOption,
    EarlierTextOption,
    FetchAsYouGoOption,
    GpusPerWorkerOption,
    IncludeOption,
    KeepFloat32Option,
    LoraOption,
    MaxRamOption,
    MaxVramOption,
    OnOption,
    OutOption,
    PriceOption,
    RayOption,
    RecipeOption,
    RestartOption,
    SeedOption,
    SequenceLengthOption,
    ShardSizeOption,
    SourceOption,
    WithinOption,
    now_called,
)
from l4pack.cli.plan import plan_view, refusals_record, refusals_view
from l4pack.units import human_bytes, human_seconds
from l4pack.work.device import AUTO, chosen

if TYPE_CHECKING:
    from l4pack.cluster.options import ClusterOptions
    from l4pack.plan.plan import Plan
    from l4pack.quantize.run import RunResult


def quantize(
    source: SourceOption,
    out: OutOption[Path],
    recipe: RecipeOption[str] = "int4",
    lora: LoraOption = None,
    calibration: CalibrationOption = None,
    calibration_samples: CalibrationSamplesOption[int | None] = None,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption[int | None] = None,
    text: EarlierTextOption = None,
    samples: EarlierSamplesOption = None,
    max_ram: MaxRamOption = None,
    max_vram: MaxVramOption = None,
    shard_size: ShardSizeOption = None,
    compute: ComputeOption = AUTO,
    include: IncludeOption = None,
    companions: CompanionsOption = None,
    keep_float32: KeepFloat32Option = False,
    allow_requantize: AllowRequantizeOption = False,
    fetch_as_you_go: FetchAsYouGoOption = False,
    ray: RayOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    restart: RestartOption = False,
    on: OnOption = None,
    devices: DevicesFileOption = None,
    price: PriceOption = None,
    within: WithinOption = None,
    dry_run: DryRunOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Write the quantized artifact; the same command goes on after any interruption.

    Example: `l4pack quantize demo --recipe int4 --out demo-int4`
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.calibration.text import with_text
    from l4pack.plan.plan import make_plan
    from l4pack.plan.summary import plan_record, room_record
    from l4pack.publish.ahead import refused_later
    from l4pack.quantize.run import work_folder
    from l4pack.recipe import load_recipe

    calibration = now_called("--calibration", calibration, "--text", text)
    calibration_samples = now_called("--calibration-samples", calibration_samples, "--samples", samples)
    fetch_folder = work_folder(out) / "fetched" if fetch_as_you_go else None
    device = chosen(compute)
    spread = cluster_options(ray, gpus_per_worker, device)
    hours = Hours(on, devices, price, device, out.parent, planned=dry_run)
    allowed = hours.limits(max_ram, max_vram, shard_size)
    wanted = (
        load_recipe(recipe)
        .keeping(float32=keep_float32)
        .calibrating(calibration is not None, samples=calibration_samples, sequence_length=sequence_length, seed=seed)
    )
    original = open_original(
        source,
        fetch_folder=fetch_folder,
        include=include or (),
        companions=companions,
        requantize=allow_requantize,
        lora=lora or (),
    )
    made = make_plan(original, wanted, allowed)
    made, fitted = within_time(made, allowed, hours, within, calibration_samples)
    made = made if spread is None else made.on_cluster()
    if made.needs is not None and not (dry_run and calibration is None and made.checkpoint.bare):
        made = with_text(made, calibration)
    prediction = hours.quantizing(made)
    refusals = refused_later(made.checkpoint, made.recipe)
    record = {
        **plan_record(made),
        **refusals_record(refusals),
        **room_record(made),
        **predicted_record(prediction),
        **within_record(fitted),
    }
    view = [*plan_view(made), *refusals_view(refusals), *hours_view(prediction), *within_view(fitted)]
    if dry_run:
        workers = planned_workers(ray, gpus_per_worker, device, computes=made.needs is not None)
        shared = hours.spread(made, workers)
        console.show_json(record | spread_record(shared)) if as_json else console.show(*view, *spread_view(shared))
        made.check_servable()
        return
    if not as_json:
        console.talk(*view)
    made.check_servable()
    result = _run(made, out, device, spread, restart)
    if as_json:
        console.show_json({**record, **run_record(result)})
    else:
        whole = None if result.already_done or result.resumed_bytes else prediction
        console.show(*result_view(made, result), *beside_view(whole, result.seconds))


def _run(made: Plan, out: Path, device: str, spread: ClusterOptions | None, restart: bool) -> RunResult:
    from l4pack.quantize.accelerator import quantizer
    from l4pack.quantize.run import run_plan

    with (
        joined(spread, computes=made.needs is not None) as cluster,
        console.progress("quantizing", made.read_bytes) as bar,
    ):
        if cluster is not None:
            cluster.show_on(bar.label, console.warning)
        return run_plan(
            made,
            out,
            restart=restart,
            quantize=quantizer(device),
            shown=bar.shown,
            device=device,
            cluster=cluster,
        )


def run_record(result: RunResult) -> dict[str, object]:
    """What a run did, as JSON."""
    return {
        "out": str(result.out),
        "seconds": result.seconds,
        "bytes_read": result.read_bytes,
        "bytes_resumed": result.resumed_bytes,
        "peak_rss_bytes": result.peak_rss_bytes,
        "already_done": result.already_done,
    }


def result_view(plan: Plan, result: RunResult) -> list[str]:
    """What a run did, for people."""
    where = f"[bold]{console.plain(result.out)}[/bold]"
    if result.already_done:
        return [f"{where} holds this artifact already; nothing was done"]
    rate = human_bytes(result.read_bytes / max(result.seconds, 1e-9))
    lines = [
        f"{where}  {human_bytes(plan.artifact_bytes)} from {human_bytes(plan.source_weight_bytes)} "
        f"in {human_seconds(result.seconds)} ({rate}/s), peak memory {human_bytes(result.peak_rss_bytes)}"
    ]
    if result.resumed_bytes:
        lines.append(f"went on after {human_bytes(result.resumed_bytes)} of the source that were done before")
    merged = "".join(f" --lora {console.plain(adapter.given)}" for adapter in plan.checkpoint.adapters)
    against = f"{console.plain(plan.checkpoint.name)}{merged}"
    return [*lines, f"next: l4pack verify {console.plain(result.out)} --against {against}"]
