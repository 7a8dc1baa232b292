"""`l4pack verify` of GGUF files that somebody else made, or whose headers alone are asked about."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType

from l4pack.cli import console
from l4pack.containers.gguf_check import Fault, check_gguf, gguf_files, holds_gguf
from l4pack.containers.gguf_header import GgufFile
from l4pack.errors import UsageError
from l4pack.units import human_bytes

__all__ = ["holds_gguf", "show_gguf"]

Checked = list[tuple[GgufFile, list[Fault]]]


def show_gguf(place: Path, against: str | None, signers: Path | None, *, as_json: bool, strict: bool) -> None:
    """Check headers, print what was found, and end with 1 where it is not right. Raises SourceError for a damaged file."""
    if against is not None:
        raise UsageError(
            f"{place}: l4pack can hold an export of its own against an artifact; of this file it knows the header alone",
            hint="leave --against out",
        )
    if signers is not None:
        raise UsageError(
            f"{place}: what is signed is a whole export, with its record; of this file l4pack knows the header alone",
            hint="give the export's folder, or leave --signature out",
        )
    checked = [(*check_gguf(path),) for path in gguf_files(place)]
    faults = [fault for _, found in checked for fault in found]
    passed = not (faults if strict else [fault for fault in faults if fault.level == "error"])
    if as_json:
        console.show_json(gguf_record(checked, passed=passed))
    else:
        console.show(*gguf_view(checked, passed=passed))
    if not passed:
        raise typer.Exit(1)


def gguf_record(checked: Checked, *, passed: bool) -> dict[str, Any]:
    """As JSON."""
    return {
        "ok": passed,
        "findings": [asdict(fault) for _, found in checked for fault in found],
        "against": None,
        "headers_only": True,
        "files": {
            file.path.name: {
                "bytes": file.nbytes,
                "architecture": file.architecture,
                "tensors": len(file.tensors),
                "weight_bytes": file.weight_bytes,
                "types": types_of(file),
            }
            for file, _ in checked
        },
    }


def types_of(file: GgufFile) -> dict[str, int]:
    """Bytes of tensors by type, largest first."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return dict(sizes.most_common())


def gguf_view(checked: Checked, *, passed: bool) -> list[RenderableType]:
    """For people."""
    verdict = "[green]verified[/green]" if passed else "[red]not verified[/red]"
    lines: list[RenderableType] = []
    for file, found in checked:
        lines.append(
            f"[bold]{console.plain(file.path.name)}[/bold]: {console.plain(file.architecture)}, "
            f"{len(file.tensors):,} tensors, {human_bytes(file.weight_bytes)}"
        )
        table = console.table("type", ">bytes")
        for name, nbytes in types_of(file).items():
            table.add_row(name, human_bytes(nbytes))
        lines += [
            table,
            *(
                f"  [yellow]{fault.level}[/yellow]  {console.plain(fault.where)} {console.plain(fault.message)}"
                for fault in found[:_SHOWN]
            ),
        ]
        if len(found) > _SHOWN:
            lines.append(f"  and {len(found) - _SHOWN:,} more (--json lists all)")
        lines.append("")
    return [
        *lines,
        f"{verdict} by headers: names, types, shapes, sizes and keys; whose numbers they are, no header tells",
    ]


_SHOWN = 5
