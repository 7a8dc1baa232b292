"""`l4pack export`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from l4pack.cli import console
from l4pack.cli.options import (
    AsJsonOption,
    DryRunOption,
    ExportOption,
    LossyOption,
    MaxRamOption,
    OutOption,
    RestartOption,
    RoundEmbeddingsOption,
    SourceOption,
    SplitOption,
)
from l4pack.units import given_size, human_bytes, human_seconds

if TYPE_CHECKING:
    from l4pack.export.plan import ExportPlan
    from l4pack.export.run import ExportResult

_NAMED = 3  # roundings that are shown


def export(
    source: SourceOption,
    out: OutOption[Path],
    to: ExportOption,
    split: SplitOption = None,
    lossy: LossyOption = False,
    round_embeddings: RoundEmbeddingsOption = False,
    max_ram: MaxRamOption = None,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Put an artifact into llama.cpp's or MLX's files without rounding again, and prove that they hold its numbers.

    Example: `l4pack export demo-int4 --to gguf --out demo-gguf`
    """
    from l4pack.checkpoint.open import open_source
    from l4pack.export.known import target_named
    from l4pack.export.plan import plan_export
    from l4pack.export.run import run_export

    made = plan_export(
        open_source(source),
        target_named(to),
        split=given_size(split),
        lossy=lossy,
        round_embeddings=round_embeddings,
        max_ram=given_size(max_ram),
    )
    for text in made.warnings:
        console.warning(text)
    record = plan_record(made)
    if dry_run:
        console.show_json(record) if as_json else console.show(*plan_view(made))
        return
    if not as_json:
        console.talk(*plan_view(made))
    with console.progress("exporting", made.read_bytes) as bar:
        result = run_export(made, out, restart=restart, shown=bar.shown)
    if as_json:
        console.show_json({**record, **result_record(result)})
    else:
        console.show(*result_view(made, result))


def plan_record(plan: ExportPlan) -> dict[str, Any]:
    """What would be written, as JSON."""
    return {
        "container": plan.target.name,
        "exact": not plan.rounded,
        "rounded": [vars(one) for one in plan.rounded],
        "left_out": list(plan.left_out),
        "warnings": list(plan.warnings),
        "types": _types(plan),
        "files": plan.files,
        "artifact_bytes": plan.artifact_bytes,
        "read_bytes": plan.read_bytes,
        "peak_ram_bytes": plan.peak_ram_bytes,
        "disk_bytes": plan.artifact_bytes,
    }


def result_record(result: ExportResult) -> dict[str, Any]:
    """What a run did, as JSON."""
    proof = result.proof
    return {
        "out": str(result.out),
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "already_done": proof is None,
        "proof": None if proof is None else vars(proof),
    }


def plan_view(plan: ExportPlan) -> list[str | Table]:
    """What would be written, for people."""
    table = console.table("type", ">bytes")
    for name, nbytes in _types(plan).items():
        table.add_row(name, human_bytes(nbytes))
    lines: list[str | Table] = [
        table,
        *(
            f"[yellow]rounded[/yellow]  {console.plain(one.where)} to {one.to}: {console.plain(one.why)}"
            for one in plan.rounded[:_NAMED]
        ),
    ]
    if plan.rounded:
        lines.append(f"rounded  {sum(one.matrices for one in plan.rounded):,} matrices in all")
    if plan.left_out:
        lines.append(f"left out {len(plan.left_out):,} tensors of the vision tower")
    size, ram = human_bytes(plan.artifact_bytes), human_bytes(plan.peak_ram_bytes)
    return [*lines, f"{len(plan.files)} files, {size}; at most {ram} of memory"]


def result_view(plan: ExportPlan, result: ExportResult) -> list[str]:
    """What a run did, for people."""
    where = f"[bold]{console.plain(result.out)}[/bold]"
    if result.proof is None:
        return [f"{where} holds this export already; nothing was done"]
    proof = result.proof
    lines = [
        f"{where}  {human_bytes(plan.artifact_bytes)} in {human_seconds(result.seconds)}, "
        f"peak memory {human_bytes(result.peak_rss_bytes)}",
        f"proved   {proof.matrices:,} tensors, {proof.weights:,} weights read back: each is the artifact's;",
        f"         {proof.decoded:,} of them decoded by {proof.by}, the others' codes and scales compared as integers"
        if proof.decoded < proof.weights
        else f"         decoded by {proof.by}",
    ]
    if proof.rounded:
        lines.append(f"rounded  {proof.rounded:,} tensors, by at most {proof.largest_error:.3g} of a matrix' rms")
    return lines


def _types(plan: ExportPlan) -> dict[str, int]:
    """Bytes of tensors by type, largest first."""
    sizes: Counter[str] = Counter()
    for one in plan.carried:
        for tensor in one.tensors:
            sizes[tensor.dtype] += tensor.nbytes
    return dict(sizes.most_common())
