"""`l4pack fit`."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.options import (
    AsJsonOption,
    BestOption,
    BitsOption,
    ByOption,
    ChartOption,
    CompanionsOption,
    ContextOption,
    DeviceOption,
    GpuLayersOption,
    KVDtypeOption,
    LoraOption,
    MaxBytesOption,
    OutOption,
    RuntimeOption,
    SensitivityFileOption,
    SequencesOption,
    SourceOption,
)
from l4pack.units import given_size, human_bytes, human_gib

if TYPE_CHECKING:
    from l4pack.checkpoint.source import Checkpoint
    from l4pack.fit.record import Chosen, FitRecord
    from l4pack.measure.record import Sensitivity


def fit(
    source: SourceOption,
    companions: CompanionsOption = None,
    lora: LoraOption = None,
    device: DeviceOption[str | None] = None,
    context: ContextOption = None,
    sequences: SequencesOption[int | None] = None,
    kv_dtype: KVDtypeOption[str | None] = None,
    gpu_layers: GpuLayersOption = None,
    max_bytes: MaxBytesOption = None,
    bits: BitsOption = None,
    runtime: RuntimeOption = "vllm",
    by: ByOption = None,
    best: BestOption = False,
    sensitivity: SensitivityFileOption = None,
    out: OutOption[Path] = Path("fit.yaml"),
    chart: ChartOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Choose what each part is quantized to, so that the artifact fits and hurts least; write it as a recipe.

    For `--runtime llama.cpp` or `mlx`, sizes are those of the files that `build --export` makes.

    Example: `l4pack fit llama-4-scout --max-bytes 65GB --out scout-65gb.yaml`
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.fit.budgets import Wish
    from l4pack.fit.fit import fit as run
    from l4pack.fit.losses import shipped_sensitivity
    from l4pack.fit.recipe import check_file
    from l4pack.fit.record import fit_record
    from l4pack.measure.record import read_sensitivity
    from l4pack.report.frontier import check_chart, draw_chart
    from l4pack.work.files import write_atomic

    size = given_size(max_bytes)
    wish = Wish(size, bits, device, context, sequences, kv_dtype, runtime, by, gpu_layers, best)
    wish.check()
    check_file(out)
    if chart is not None:
        check_chart(chart)
    checkpoint = open_original(source, companions=companions, lora=lora or ())
    found = shipped_sensitivity(checkpoint) if sensitivity is None else read_sensitivity(sensitivity)
    warn_of(found, checkpoint, runtime)
    fitted = run(checkpoint, found, wish, out.stem)
    record = fit_record(fitted, out)
    write_atomic(out, fitted.recipe_text.encode())
    if chart is not None:
        write_atomic(chart, draw_chart(record, chart))
    console.show_json(record.model_dump(mode="json")) if as_json else console.show(*fit_view(record, chart))


def warn_of(found: Sensitivity, checkpoint: Checkpoint, runtime: str) -> None:
    """Say on stderr where losses are another model's, lack a runtime's own options, or sizes lack a tokenizer."""
    from l4pack.budget.files import CONTAINERS
    from l4pack.fit.losses import is_stand_in
    from l4pack.measure.options import FOR_CONTAINERS

    worth = FOR_CONTAINERS.get(CONTAINERS.get(runtime, ""), ())
    missing = [name for name in worth if name not in found.options]
    if missing:
        console.warning(
            f"the sensitivities lack {', '.join(missing)}, which {runtime} could have: "
            f"l4pack measure SOURCE --options {','.join(worth)}, and give --sensitivity"
        )
    if runtime in CONTAINERS and checkpoint.bare:
        console.warning(f"{checkpoint.name} is a configuration: its tokenizer, some 10 to 30 MB, is not counted")
    if is_stand_in(found, checkpoint):
        console.warning(
            f"the sensitivities are a stand-in's, measured on {found.model.name} and carried over by role and depth; "
            "measure the model itself with l4pack measure, and give --sensitivity"
        )


def fit_view(record: FitRecord, chart: Path | None = None) -> list[RenderableType]:
    """A fit for people: what each role got, what was predicted, and what more bytes would buy."""
    proven = "proven optimal" if record.optimal else f"within {100 * record.gap:.2g} % of the optimum"
    lines: list[RenderableType] = [
        f"[bold]{console.plain(record.model)}[/bold] for {record.runtime}: {console.plain(record.budget)}",
        "",
        _choice_table(record),
        "",
        f"artifact   {record.artifact_bytes:,} bytes ({human_bytes(record.artifact_bytes)}), "
        f"{record.bits_per_weight:.3f} bits a weight of attention and MLPs",
        f"predicted  KL {record.predicted_kl:.4g} nats, {proven}",
    ]
    if record.predicted_kl_combined is not None:
        lines.append(f"           {record.predicted_kl_combined:.4g} nats if rerouted tokens do not add up")
    if record.additivity is not None:
        one = record.additivity
        lines.append(
            f"           {one.count} mixtures had x {one.least:.2f} to {one.most:.2f} of such a sum when measured"
        )
    if record.headroom_bytes is not None:
        lines.append(f"memory     fits, {human_gib(record.headroom_bytes)} to spare on each GPU")
    lines += ["", _sizes_table(record), ""]
    lines += [
        f"[yellow]left out[/yellow]   {console.plain(one['option'])} for {one['role']}: {console.plain(one['why'])}"
        for one in record.left_out
    ]
    if chart is not None:
        lines.append(f"chart      [bold]{console.plain(chart)}[/bold]")
    if record.recipe is not None:
        recipe = console.plain(record.recipe)
        lines.append(f"recipe     [bold]{recipe}[/bold]   {_next_command(record.runtime)} --recipe {recipe} --out DIR")
    return lines


def _next_command(runtime: str) -> str:
    """What makes what the runtime loads, of a recipe."""
    from l4pack.budget.files import CONTAINERS

    container = CONTAINERS.get(runtime)
    return "l4pack quantize SOURCE" if container is None else f"l4pack build SOURCE --export {container}"


def _choice_table(record: FitRecord) -> RenderableType:
    groups: dict[tuple[str, str], list[Chosen]] = defaultdict(list)
    for one in record.choice:
        groups[one.role, one.option].append(one)
    counts = Counter(one.role for one in record.choice)
    table = console.table("Role", "Option", "Layers", ">Bytes", ">Share of KL")
    for (role, option), members in sorted(groups.items()):
        kl = sum(one.kl for one in members)
        share = f"{100 * kl / record.predicted_kl:.1f} %" if record.predicted_kl else ""
        layers = "all" if len(members) == counts[role] else _ranges([one.layer for one in members])
        table.add_row(role, console.plain(option), layers, human_bytes(sum(one.bytes for one in members)), share)
    return table


def _sizes_table(record: FitRecord) -> RenderableType:
    """What was chosen between a little less and a little more, and one scheme for all beside it."""
    here = record.weight_bytes, record.predicted_kl
    table = console.table("What bytes buy", ">Weights", ">Predicted KL", ">Against the choice")
    rows = [(f"best of {size.name}", size) for size in record.steps]
    rows += [(f"{size.name} for all", size) for size in record.uniform if size.predicted_kl]
    for label, size in rows:
        change = "" if not here[1] else f"x {size.predicted_kl / here[1]:.3g}"
        table.add_row(console.plain(label), human_bytes(size.bytes), f"{size.predicted_kl:.4g}", change)
    return table


def _ranges(numbers: list[int]) -> str:
    """`0-3, 7, 9-11`."""
    ordered = sorted(numbers)
    starts = [number for number in ordered if number - 1 not in ordered]
    ends = [number for number in ordered if number + 1 not in ordered]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
