"""How a job runs, how long it may take, and where its result goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

_T = TypeVar("_T")

_CLUSTER, _TIME = "Cluster", "Time"

OutOption = Annotated[
    _T,
    typer.Option(
        "--out", "-o", metavar="PATH", help="What to make: a folder, which appears when it is complete, or a file."
    ),
]
ShardSizeOption = Annotated[
    str | None, typer.Option("--shard-size", metavar="SIZE", help="Largest shard; 5GB unless given.")
]
ExportOption = Annotated[str, typer.Option("--to", metavar="gguf|mlx", help="The container: llama.cpp's or MLX's.")]
ExportsOption = Annotated[
    str | None,
    typer.Option(
        "--export", metavar="gguf,mlx", help="Put the artifact into other runtimes' files too: OUT-gguf, OUT-mlx."
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", metavar="SIZE", help="Largest file; one GGUF file, MLX shards of 5GB unless given."),
]
RoundEmbeddingsOption = Annotated[
    bool,
    typer.Option(
        "--round-embeddings",
        help="Round the embedding and the head to eight bits, which no server of artifacts loads; 1.9 GB less of Scout.",
    ),
]
LossyOption = Annotated[
    bool, typer.Option("--lossy", help="Round again what can't be carried exactly, to the nearest type; says where.")
]
ComputeOption = Annotated[str, typer.Option("--compute", metavar="WHERE", help="cpu, cuda, cuda:N, or auto.")]
MaxRamOption = Annotated[
    str | None, typer.Option("--max-ram", metavar="SIZE", help="Most memory the job may take, for example 4GB.")
]
MaxVramOption = Annotated[
    str | None, typer.Option("--max-vram", metavar="SIZE", help="Most device memory the job may take.")
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS|N",
        help="Spread the work over a Ray cluster: HOST:PORT, `auto` for the one this machine is in, `local` for one here. "
        "Of `plan` and with `--dry-run`, how many workers there would be.",
        rich_help_panel=_CLUSTER,
    ),
]
GpusPerWorkerOption = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        metavar="N",
        help="Devices a worker takes, or a share of one, as 0.5; 1 where devices compute.",
        rich_help_panel=_CLUSTER,
    ),
]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        "--work",
        metavar="DIR",
        help="Where hidden states go meanwhile; ARTIFACT.evaluate.partial, NAME.coverage.partial.",
    ),
]
RestartOption = Annotated[bool, typer.Option("--restart", help="Begin again instead of going on with earlier work.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done and stop.")]
ChartOption = Annotated[
    Path | None, typer.Option("--chart", metavar="FILE", help="Draw the frontier there, as .png or .svg.")
]
FittedOption = Annotated[
    Path | None,
    typer.Option(
        "--fit",
        metavar="FILE",
        help="What `fit --json` said of its recipe; DIR.fit.json where `build --fit` left it.",
    ),
]
AsJsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object (bytes and seconds as numbers).")]

OnOption = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="NAME",
        help="Where it would run, as h100, 8xh100, 64-core or c7i.16xlarge; this machine, measured once, unless given.",
        rich_help_panel=_TIME,
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option(
        "--price", metavar="PER_HOUR", help="What an hour there costs: says what the job costs.", rich_help_panel=_TIME
    ),
]
WithinOption = Annotated[
    str | None,
    typer.Option(
        "--within",
        metavar="TIME",
        help="Take the most calibration samples that end in time, for example 8h, and say what KL that costs.",
        rich_help_panel=_TIME,
    ),
]
