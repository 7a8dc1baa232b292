"""`l4pack dequantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack.cli import console
from l4pack.cli.options import (
    AsJsonOption,
    DryRunOption,
    MaxRamOption,
    OutOption,
    RestartOption,
    ShardSizeOption,
    SourceOption,
)
from l4pack.units import given_size, human_bytes, human_seconds

if TYPE_CHECKING:
    from l4pack.dequantize.plan import DequantizePlan
    from l4pack.dequantize.run import DequantizeResult


def dequantize(
    source: SourceOption,
    out: OutOption[Path],
    shard_size: ShardSizeOption = None,
    max_ram: MaxRamOption = None,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Write an artifact, or a release in FP8, as a 16-bit checkpoint in the layout that Llama 4 is released in.

    Its weights are those that the artifact stands for, rounded once: what rounding lost before does not come back.

    Example: `l4pack dequantize demo-int4 --out demo-bf16`
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.dequantize.plan import plan_dequantize
    from l4pack.dequantize.run import run_dequantize

    opened = open_original(source, requantize=True)
    made = plan_dequantize(opened, shard_bytes=given_size(shard_size), max_ram=given_size(max_ram))
    if dry_run:
        console.show_json(plan_record(made)) if as_json else console.show(*plan_view(made))
        return
    if not as_json:
        console.talk(*plan_view(made))
    with console.progress("dequantizing", made.read_bytes) as bar:
        result = run_dequantize(made, out, restart=restart, shown=bar.shown)
    if as_json:
        console.show_json({**plan_record(made), **result_record(result)})
    else:
        console.show(*result_view(made, result))


def plan_record(plan: DequantizePlan) -> dict[str, Any]:
    """What would be written, as JSON."""
    return {
        "source": plan.checkpoint.name,
        "dequantized_from": plan.checkpoint.dequantized,
        "matrices": plan.dequantized,
        "tensors": len(plan.tensors),
        "files": plan.files,
        "artifact_bytes": plan.artifact_bytes,
        "read_bytes": plan.read_bytes,
        "peak_ram_bytes": plan.peak_ram_bytes,
        "disk_bytes": plan.artifact_bytes,
    }


def result_record(result: DequantizeResult) -> dict[str, Any]:
    """What a run did, as JSON."""
    return {
        "out": str(result.out),
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "already_done": result.already_done,
    }


def plan_view(plan: DequantizePlan) -> list[str]:
    """What would be written, for people."""
    size, ram = human_bytes(plan.artifact_bytes), human_bytes(plan.peak_ram_bytes)
    return [
        f"{plan.dequantized:,} matrices of {console.plain(plan.checkpoint.dequantized or '')}, from "
        f"{human_bytes(plan.read_bytes)}",
        f"{len(plan.files)} files, {size}; at most {ram} of memory",
    ]


def result_view(plan: DequantizePlan, result: DequantizeResult) -> list[str]:
    """What a run did, for people."""
    where = f"[bold]{console.plain(result.out)}[/bold]"
    if result.already_done:
        return [f"{where} holds this checkpoint already; nothing was done"]
    return [
        f"{where}  {human_bytes(plan.artifact_bytes)} in {human_seconds(result.seconds)}, "
        f"peak memory {human_bytes(result.peak_rss_bytes)}"
    ]
