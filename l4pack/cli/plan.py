"""`l4pack plan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.cluster import worker_count
from l4pack.cli.hours import (
    Hours,
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
    IncludeOption,
    KeepFloat32Option,
    LoraOption,
    MaxRamOption,
    MaxVramOption,
    OnOption,
    PriceOption,
    RayOption,
    RecipeOption,
    SeedOption,
    SequenceLengthOption,
    ShardSizeOption,
    SourceOption,
    WithinOption,
)
from l4pack.units import human_bytes
from l4pack.work.device import AUTO, chosen

if TYPE_CHECKING:
    from l4pack.checkpoint.source import Checkpoint
    from l4pack.plan.plan import Plan
    from l4pack.publish.ahead import Refusal


def plan(
    source: SourceOption,
    lora: LoraOption = None,
    recipe: RecipeOption[str] = "int4",
    calibration: CalibrationOption = None,
    calibration_samples: CalibrationSamplesOption[int | None] = None,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption[int | None] = None,
    max_ram: MaxRamOption = None,
    max_vram: MaxVramOption = None,
    shard_size: ShardSizeOption = None,
    compute: ComputeOption = AUTO,
    include: IncludeOption = None,
    companions: CompanionsOption = None,
    keep_float32: KeepFloat32Option = False,
    allow_requantize: AllowRequantizeOption = False,
    on: OnOption = None,
    devices: DevicesFileOption = None,
    price: PriceOption = None,
    within: WithinOption = None,
    ray: RayOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Say what an artifact will weigh and what making it will take, from headers or a bare config.json.

    Example: `l4pack plan llama-4-scout --recipe scout-int4-1xh100`
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.plan.plan import make_plan
    from l4pack.plan.summary import plan_record, room_record
    from l4pack.publish.ahead import refused_later
    from l4pack.recipe import load_recipe

    hours, workers = Hours(on, devices, price, chosen(compute), Path.cwd()), worker_count(ray)
    allowed = hours.limits(max_ram, max_vram, shard_size)
    wanted = (
        load_recipe(recipe)
        .keeping(float32=keep_float32)
        .calibrating(calibration is not None, samples=calibration_samples, sequence_length=sequence_length, seed=seed)
    )
    opened = open_original(
        source, include=include or (), companions=companions, requantize=allow_requantize, lora=lora or ()
    )
    made = make_plan(opened, wanted, allowed)
    made, fitted = within_time(made, allowed, hours, within, calibration_samples)
    made = made if workers is None else made.on_cluster()
    if calibration is not None and made.needs is not None:
        from l4pack.calibration.text import with_text

        made = with_text(made, calibration)
    prediction = hours.quantizing(made)
    shared, evaluated = hours.spread(made, workers), hours.spread_evaluating(made, workers)
    refusals = refused_later(made.checkpoint, made.recipe)
    if as_json:
        console.show_json(
            {
                **plan_record(made),
                **refusals_record(refusals),
                **room_record(made),
                **predicted_record(prediction),
                **spread_record(shared, evaluated),
                **within_record(fitted),
            }
        )
    else:
        console.show(
            *plan_view(made),
            *refusals_view(refusals),
            *hours_view(prediction),
            *spread_view(shared, evaluated),
            *within_view(fitted),
        )
    made.check_servable()


def plan_view(plan: Plan) -> list[RenderableType]:
    """A plan for people: one table and what the job takes."""
    from l4pack.plan.summary import plan_classes
    from l4pack.text.describe import text_lines

    table = console.table("Role", "Scheme", ">Matrices", ">Before", ">After")
    for row in plan_classes(plan):
        sizes = human_bytes(row.source_bytes), human_bytes(row.artifact_bytes)
        table.add_row(row.role.value, row.scheme, f"{row.matrices:,}", *sizes)
    lines = [
        "",
        f"artifact  {size_of(plan)}",
        f"the job   peak memory {human_bytes(plan.peak_ram_bytes)} of {human_bytes(plan.room.nbytes)} "
        f"({plan.room.limit}) with {plan.workers} workers, "
        f"disk {human_bytes(plan.disk_bytes)}, reads {human_bytes(plan.read_bytes)}",
    ]
    if plan.accelerated:
        lines.append(f"          peak device memory {human_bytes(plan.peak_vram_bytes)}")
    if plan.needs is not None:
        calibrated = f"{len(plan.looked_at):,} matrices"
        calibrated += f" and {len(plan.kv_scales):,} scales of the KV cache" if plan.kv_scales else ""
        lines.append(
            f"calibrated  {calibrated}, with {'' if plan.text else 'at most '}"
            f"{plan.needs.tokens:,} tokens; hidden states take {human_bytes(plan.needs.disk_bytes)} of disk meanwhile"
        )
        if plan.needs.together:
            states = "stay there" if plan.needs.resident else "come and go"
            lines.append(
                f"          {plan.needs.together} experts are solved together on the device, hidden states {states}"
            )
    lines += back_view(plan)
    if plan.text is not None:
        lines += [f"text      {console.plain(line)}" for line in text_lines(plan.text.record)]
    lines += beside_view(plan.checkpoint)
    lines += [f"[yellow]note[/yellow]      {console.plain(warning)}" for warning in plan.warnings()]
    title = (
        f"[bold]{console.plain(plan.checkpoint.name)}[/bold] with recipe [bold]{console.plain(plan.recipe.name)}[/bold]"
    )
    return [title, "", table, *lines]


def back_view(plan: Plan) -> list[str]:
    """The walk back before anything is solved, for people."""
    if plan.needs is None or plan.needs.gradient is None:
        return []
    back = plan.needs.gradient
    return [
        f"gradient    a walk up and back before, with {'' if plan.text else 'at most '}{back.tokens:,} tokens; it takes "
        f"{human_bytes(back.disk_bytes)} of disk meanwhile, {human_bytes(back.kept_bytes)} stay until the end"
    ]


def refusals_record(refusals: Sequence[Refusal]) -> dict[str, Any]:
    """What `push` would refuse of the artifact to come, as JSON."""
    return {"refused_later": [refusal.record() for refusal in refusals]}


def refusals_view(refusals: Sequence[Refusal]) -> list[str]:
    """What `push` would refuse of the artifact to come, for people."""
    return [
        f"[yellow]push[/yellow]      would refuse {console.plain(f'{one.where}: {one.message}; {one.hint}')}"
        for one in refusals
    ]


_SHOWN_FILES = 12


def beside_view(checkpoint: Checkpoint) -> list[str]:
    """The files beside the weights, for people: carried, left behind, and missing with what that breaks."""
    from l4pack.plan.summary import files_missing

    if checkpoint.bare:
        return []
    lines = [f"carried   {_names(list(checkpoint.companions)) or 'no file beside the weights'}"]
    if checkpoint.left_behind:
        lines.append(f"left      {_names(checkpoint.left_behind)} (--include adds)")
    missing = files_missing(checkpoint)
    return [*lines, *(f"[yellow]missing[/yellow]   {file.file}: {console.plain(file.breaks)}" for file in missing)]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_FILES} more" if len(names) > _SHOWN_FILES else ""
    return console.plain(", ".join(names[:_SHOWN_FILES])) + more


def size_of(plan: Plan) -> str:
    """The size of the artifact to come, as every command says it."""
    shards = f"{len(plan.shards)} {'shard' if len(plan.shards) == 1 else 'shards'}"
    return (
        f"{plan.artifact_bytes:,} bytes ({human_bytes(plan.artifact_bytes)}) in {shards}, "
        f"{plan.source_weight_bytes / plan.weight_bytes:.2f} times smaller; "
        f"{plan.bits_per_weight:.3f} bits a quantized weight"
    )
