"""`l4pack inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4pack.cli import console
from l4pack.cli.options import AsJsonOption, CompanionsOption, LoraOption, SourceOption
from l4pack.cli.plan import beside_view
from l4pack.units import human_bytes

if TYPE_CHECKING:
    from l4pack.checkpoint.source import Checkpoint


def inspect(
    source: SourceOption,
    companions: CompanionsOption = None,
    lora: LoraOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Say what a checkpoint is, from its headers alone.

    What may come in: transformers' safetensors (BF16, F16 or F32; fused experts or one by one; with or without vision), and Meta's own release, consolidated.NN.pth with params.json, of which nothing is unpickled.

    Example: `l4pack inspect meta-llama/Llama-4-Scout-17B-16E-Instruct`
    """
    from l4pack.checkpoint.open import open_source
    from l4pack.plan.summary import checkpoint_record, checkpoint_roles

    checkpoint = open_source(source, companions=companions, lora=lora or ())
    if as_json:
        console.show_json(checkpoint_record(checkpoint))
        return
    console.show(*_lines(checkpoint))
    table = console.table("Role", ">Tensors", ">Parameters", ">Bytes", ">Share of bytes")
    rows = checkpoint_roles(checkpoint)
    total = sum(row.nbytes for row in rows)
    for row in rows:
        share = f"{100 * row.nbytes / total:.2f} %"
        table.add_row(row.role.value, f"{row.tensors:,}", f"{row.parameters:,}", human_bytes(row.nbytes), share)
    console.show("", table)


def _lines(checkpoint: Checkpoint) -> list[str]:
    from l4pack.plan.summary import checkpoint_record, licence_files

    record = checkpoint_record(checkpoint)
    text = checkpoint.config.text
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in record["dtypes"].items())
    where = (
        f"in {_count(record['shards'], 'shard')} ({dtypes})" if dtypes else "as BF16; a configuration without weights"
    )
    licences = ", ".join(licence_files(checkpoint)) or "no licence file found"
    lines = [
        f"[bold]{console.plain(checkpoint.name)}[/bold]",
        f"{console.plain(record['architecture'])}: {record['parameters']:,} parameters in {record['tensors']:,} tensors, "
        f"{human_bytes(record['weight_bytes'])} {where}",
        f"{_count(text.num_hidden_layers, 'layer')}: {record['moe_layers']} with {text.num_local_experts} experts "
        f"({'fused' if record['fused_experts'] else 'one by one'}), {len(text.rope_layers)} with chunked attention; "
        f"{'with' if record['vision'] else 'without'} vision; context {text.max_position_embeddings:,}",
        f"layout: {console.plain(record['layout'])}",
        f"licence: {console.plain(licences)}",
    ]
    if record["quantization"]:
        lines.append(f"quantized: {console.plain(record['quantization'])}")
    if checkpoint.revision:
        lines.append(f"revision: {console.plain(checkpoint.revision)}")
    lines += beside_view(checkpoint)
    lines += [f"[yellow]note[/yellow]      {console.plain(note)}" for note in checkpoint.notes]
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
