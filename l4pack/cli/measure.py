"""`l4pack measure`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.cluster import cluster_options, joined, planned_workers, slots
from l4pack.cli.hours import (
    Hours,
    beside_view,
    hours_view,
    predicted_record,
    predicted_seconds,
    spread_record,
    spread_view,
)
from l4pack.cli.options import (
    AsJsonOption,
    CalibrationOption,
    CalibrationSamplesOption,
    CompanionsOption,
    ComputeOption,
    DevicesFileOption,
    DirectOption,
    DryRunOption,
    GpusPerWorkerOption,
    LoraOption,
    MaxRamOption,
    MaxVramOption,
    MeasuredOptionsOption,
    OnOption,
    OutOption,
    PriceOption,
    RayOption,
    RestartOption,
    SamplesOption,
    SeedOption,
    SequenceLengthOption,
    SourceOption,
    StreamsOption,
    TextOption,
)
from l4pack.errors import UsageError
from l4pack.units import given_size, human_bytes, human_seconds
from l4pack.work.device import chosen

if TYPE_CHECKING:
    from l4pack.cluster.cluster import Cluster
    from l4pack.measure.prepare import PreparedMeasurement
    from l4pack.timing.speeds import Prediction

WORST = 8


def measure(
    source: SourceOption,
    companions: CompanionsOption = None,
    lora: LoraOption = None,
    out: OutOption[Path] = Path("sensitivity.json"),
    text: TextOption = "demo",
    samples: SamplesOption = 32,
    calibration: CalibrationOption = None,
    calibration_samples: CalibrationSamplesOption[int] = 256,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption[int] = 0,
    options: MeasuredOptionsOption = None,
    direct: DirectOption = "auto",
    streams: StreamsOption = None,
    compute: ComputeOption = "auto",
    max_ram: MaxRamOption = None,
    max_vram: MaxVramOption = None,
    ray: RayOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    restart: RestartOption = False,
    on: OnOption = None,
    devices: DevicesFileOption = None,
    price: PriceOption = None,
    dry_run: DryRunOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Measure what quantizing each part of a model costs: every unit alone, with every option a runtime can serve.

    Example: `l4pack measure demo --samples 8 --out sensitivity.json`
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.measure.prepare import Direct as Way
    from l4pack.measure.prepare import MeasureSettings, prepare_measurement
    from l4pack.text.choice import TextChoice

    if direct not in list(Way):
        raise UsageError(f"--direct {direct} is not known", hint=f"choose {', '.join(Way)}")
    settings = MeasureSettings(
        out=out,
        text=TextChoice(text, samples, sequence_length, seed),
        calibration=calibration,
        calibration_samples=calibration_samples,
        options=tuple(name.strip() for name in options.split(",")) if options is not None else (),
        direct=Way(direct),
        streams=streams,
        compute=compute,
        max_ram=given_size(max_ram),
        max_vram=given_size(max_vram),
        restart=restart,
    )
    device = chosen(compute)
    hours = Hours(on, devices, price, device, out.parent, planned=dry_run)
    checkpoint = open_original(source, companions=companions, lora=lora or ())
    if dry_run:
        workers = planned_workers(ray, gpus_per_worker, device, computes=True)
        prepared = prepare_measurement(checkpoint, settings, workers)
        plan, view, _ = _planned(prepared, hours, spread=ray is not None)
        console.show_json({"plan": plan}) if as_json else console.show(*view)
        return
    with joined(cluster_options(ray, gpus_per_worker, device), computes=True) as cluster:
        prepared = prepare_measurement(checkpoint, settings, slots(cluster))
        plan, view, prediction = _planned(prepared, hours, spread=cluster is not None)
        if not as_json:
            console.talk(*view)
        record, run = _run(prepared, cluster)
    run["predicted_seconds"] = plan["cluster"]["seconds"] if "cluster" in plan else predicted_seconds(prediction)
    if as_json:
        console.show_json({**record, "plan": plan, "run": run})
    else:
        console.show(*record_view(record), f"{out}: {human_seconds(run['seconds'])}, "
                     f"peak memory {human_bytes(run['peak_rss_bytes'])}",
                     *beside_view(prediction, run["seconds"]))  # fmt: skip


def _planned(
    prepared: PreparedMeasurement, hours: Hours, *, spread: bool
) -> tuple[dict[str, Any], list[RenderableType], Prediction | None]:
    """What a measurement takes, as JSON and for people, and its time where one machine does it."""
    texts = [text for text in (prepared.texts.measured, prepared.texts.calibration) if text is not None]
    costs = prepared.costs
    plan = {**costs.record(), "method": prepared.direct.value, "texts": [text.record for text in texts]}
    if spread:
        shared = hours.spread_measuring(prepared.wave_works(hours.kind), costs.workers, costs.read_bytes)
        plan |= {**predicted_record(None), **spread_record(shared)}
        return plan, [*plan_view(plan), *spread_view(shared)], None
    prediction = hours.predict(prepared.work(hours.kind), costs.read_bytes)
    return plan | predicted_record(prediction), [*plan_view(plan), *hours_view(prediction)], prediction


def _run(prepared: PreparedMeasurement, cluster: Cluster | None) -> tuple[dict[str, Any], dict[str, Any]]:
    import time

    from l4pack.measure.measure import measure as run
    from l4pack.stream.visitor import Progress
    from l4pack.work import machine
    from l4pack.work.signals import stop_signals

    started = time.monotonic()
    with console.progress("measuring", prepared.costs.read_bytes) as bar, stop_signals() as stop:
        if cluster is not None:
            cluster.show_on(bar.shown.label, console.warning)
        record = run(prepared, Progress.of(bar.shown, stop), cluster).model_dump(mode="json")
    return record, {
        "device": prepared.compute.describe(), "seconds": time.monotonic() - started, "peak_rss_bytes": machine.peak_rss(),
    }  # fmt: skip


def plan_view(plan: dict[str, Any]) -> list[RenderableType]:
    """What a measurement takes, for people."""
    from l4pack.text.describe import text_lines

    table = console.table("Plan", "")
    rest, back = plan["changes"] - plan["direct"], plan["walk_back_disk_bytes"]
    predicted = f", {rest:,} predicted" if rest else ""
    passes = f"{plan['streams']:,}, in {plan['waves']:,} passes over the weights"
    rows = [
        ("single changes", f"{plan['changes']:,}: {plan['direct']:,} measured{predicted}"),
        ("joint changes", f"{plan['joint']:,}"),
        ("altered streams at once", passes + (", after one up and one down" if back else "")),
        ("tokens", f"{plan['tokens']:,} measured, {plan['calibration_tokens']:,} calibrated on"),
        ("operations", f"{plan['flop']:.2g}, solving aside"),
        ("read", human_bytes(plan["read_bytes"])),
        ("disk meanwhile", human_bytes(plan["disk_bytes"])),
        ("peak memory", human_bytes(plan["peak_ram_bytes"])),
    ]
    if plan["workers"] > 1:
        rows[-1:] = [("workers", f"{plan['workers']:,}"), ("peak memory of each", rows[-1][1])]
    for row in rows:
        table.add_row(*row)
    described = [console.plain(line) for text in plan["texts"] for line in text_lines(text)]
    return [table, *described, ""]


def record_view(record: dict[str, Any]) -> list[RenderableType]:
    """A measurement for people."""
    text = record["text"]
    head = (
        f"[bold]{console.plain(record['model']['name'])}[/bold]: KL(original || changed) in nats, of single changes "
        f"added up over layers, on {text['tokens']:,} tokens of {console.plain(text['source'])}"
    )
    return [head, "", _totals(record), "", _worst(record), "", *_linearity(record), "", _joint(record)]


def _totals(record: dict[str, Any]) -> RenderableType:
    roles = list(dict.fromkeys(total["role"] for total in record["totals"]))
    table = console.table("Option", *(f">{role.replace('_', ' ')}" for role in roles))
    cells = {(total["option"], total["role"]): total for total in record["totals"]}
    for option in dict.fromkeys(option for option, _ in cells):
        row = (cells.get((option, role)) for role in roles)
        table.add_row(option, *("" if one is None else _number(one["kl"], one["kl_standard_error"]) for one in row))
    return table


def _worst(record: dict[str, Any]) -> RenderableType:
    table = console.table("Hurts most", "Option", ">KL", ">Relative error")
    for change in sorted(record["changes"], key=lambda change: -change["kl"])[:WORST]:
        how = "" if change["measured"] else " (predicted)"
        table.add_row(
            f"layer {change['layer']}, {change['role'].replace('_', ' ')}",
            change["option"],
            _number(change["kl"], change["kl_standard_error"]) + how,
            f"{change['error']:.3g}",
        )
    return table


def _linearity(record: dict[str, Any]) -> list[RenderableType]:
    if record["gradients"] is not None:
        return [_slopes(record["gradients"])]
    fit = record["linearity"]
    if not fit["count"]:
        return ["no change was both measured and predicted"]
    families = ", ".join(f"{name} {_factor(one['median'])}" for name, one in fit["families"].items())
    return [
        f"predicted from the anchors by relative error, {fit['count']:,} measured changes are off by a factor of "
        f"{_factor(fit['median'])} in the median, {_factor(fit['p90'])} at the 90th percentile ({families}); "
        f"in proportion to the error alone {_factor(fit['proportional']['median'])} and "
        f"{_factor(fit['proportional']['p90'])}"
    ]


def _slopes(fit: dict[str, Any]) -> str:
    return (
        f"predicted from gradients: of {fit['count']:,} measured changes, a standard deviation off by a factor of "
        f"{_factor(fit['spread'])}, at most {_factor(fit['worst'])}, once {fit['rerouting']:.3g} nats were fitted for what "
        "one mean margin's way towards another expert costs"
    )


def _joint(record: dict[str, Any]) -> RenderableType:
    table = console.table(
        "Changed together", ">Measured", ">Sum of singles", ">Measured / sum", ">Combined", ">/ combined"
    )
    for joint in record["joint"]:
        row = [_number(joint["measured"], joint["standard_error"])]
        for prediction in (joint["predicted"], joint["combined"]):
            row += [f"{prediction:.3g}", f"{joint['measured'] / prediction:.2f}" if prediction > 0 else ""]
        table.add_row(console.plain(joint["title"]), *row)
    return table


def _number(value: float, error: float) -> str:
    return f"{value:.3g} ± {error:.1g}"


def _factor(log: float) -> str:
    import math

    return f"{math.exp(log):.2f}"
