"""Options that mean the same in every command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint folder, ORG/NAME[@REVISION] on the Hub, a config.json, llama-4-scout, llama-4-maverick, or demo.",
        show_default=False,
    ),
]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="Artifact folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object (bytes and seconds as numbers).")]
RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A shipped recipe or a YAML file; see `l4pack recipes`."),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to make; it appears when it is complete.")
]
MaxRam = Annotated[
    str | None,
    typer.Option(
        "--max-ram", metavar="SIZE", help="Most memory the job may take, for example 4GB.", show_default=False
    ),
]
MaxVram = Annotated[
    str | None,
    typer.Option("--max-vram", metavar="SIZE", help="Most device memory the job may take.", show_default=False),
]
Compute = Annotated[str, typer.Option("--compute", metavar="WHERE", help="cpu, cuda, cuda:N, or auto.")]
ShardSize = Annotated[
    str | None,
    typer.Option("--shard-size", metavar="SIZE", help="Largest shard; 5GB unless given.", show_default=False),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        help="Carry these files of the source too; may be repeated. Tokenizer, processor, template, licence go unasked.",
        show_default=False,
    ),
]
KeepFloat32 = Annotated[
    bool,
    typer.Option("--keep-float32", help="Leave kept float32 tensors so; rounded to the model's dtype unless said."),
]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="SOURCE", help="The original checkpoint to compare with.", show_default=False),
]
DeviceName = Annotated[
    str, typer.Option("--device", metavar="NAME", help="For example h100 or 8xh100; see `l4pack devices`.")
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE|DIR|SET",
        help="Text to calibrate with: a file of text or rows, a folder, or wikitext2, c4; one that ships unless given.",
        show_default=False,
        rich_help_panel="Calibration",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        help="Text taken, in whole sequences; short rows count by their tokens.",
        show_default=False,
        rich_help_panel="Calibration",
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        "--sequence-length", help="Most tokens a sequence.", show_default=False, rich_help_panel="Calibration"
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Which sequences are taken.", show_default=False, rich_help_panel="Calibration"),
]
