"""`l4pack coverage`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.options import (
    AsJsonOption,
    CalibrationOption,
    CalibrationSamplesOption,
    CompanionsOption,
    ComputeOption,
    EarlierSamplesOption,
    EarlierTextOption,
    LoraOption,
    MaxColdOption,
    MaxRamOption,
    MaxVramOption,
    RestartOption,
    SeedOption,
    SequenceLengthOption,
    SourceOption,
    WorkOption,
    now_called,
)
from l4pack.units import given_size, human_seconds


def coverage(
    source: SourceOption,
    companions: CompanionsOption = None,
    lora: LoraOption = None,
    calibration: CalibrationOption = None,
    calibration_samples: CalibrationSamplesOption[int | None] = None,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption[int | None] = None,
    text: EarlierTextOption = None,
    samples: EarlierSamplesOption = None,
    max_cold: MaxColdOption = 1.0,
    compute: ComputeOption = "auto",
    max_ram: MaxRamOption = None,
    max_vram: MaxVramOption = None,
    work: WorkOption = None,
    restart: RestartOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Count how many tokens of a text reach each expert, so that a calibration's mix can be judged before it runs.

    Example: `l4pack coverage demo --calibration-samples 16`
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.calibration.cover import Wanted, cover
    from l4pack.stream.visitor import Progress
    from l4pack.work.signals import stop_signals

    calibration = now_called("--calibration", calibration, "--text", text)
    calibration_samples = now_called("--calibration-samples", calibration_samples, "--samples", samples)
    limits = map(given_size, (max_ram, max_vram))
    wanted = Wanted(calibration, calibration_samples, sequence_length, seed, max_cold, *limits)
    folder = work or Path(f"{Path(source).resolve().name}.coverage.partial")
    checkpoint = open_original(source, companions=companions, lora=lora or ())
    with console.progress("covering", checkpoint.weight_bytes) as bar, stop_signals() as stop:
        progress = Progress.of(bar.shown, stop)
        found = cover(checkpoint, wanted, folder, compute, progress, restart=restart)
    record = found.record()
    console.show_json(record) if as_json else console.show(*_view(record))
    found.coverage.check(hint="give more --calibration-samples or a broader --calibration, or raise --max-cold")


def _view(record: dict[str, Any]) -> list[RenderableType]:
    from l4pack.text.describe import text_lines

    table = console.table(">Layer", ">Cold", ">Least", ">Median", ">Most")
    for layer in record["layers"]:
        tokens = sorted(layer["tokens"])
        row = (layer["layer"], tokens.count(0), tokens[0], tokens[len(tokens) // 2], tokens[-1])
        table.add_row(*(f"{value:,}" for value in row))
    text = record["text"]
    return [
        *map(console.plain, text_lines(text)),
        f"{record['cold_experts']:,} of {record['experts']:,} experts saw none",
        "",
        table,
        f"{human_seconds(record['seconds'])}",
    ]
