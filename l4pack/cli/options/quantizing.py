"""How a model is quantized, and what is measured of it for that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

_T = TypeVar("_T")

RecipeOption = Annotated[
    _T,
    typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A shipped recipe or a YAML file; see `l4pack recipes`."),
]
KeepFloat32Option = Annotated[
    bool,
    typer.Option("--keep-float32", help="Leave kept float32 tensors so; rounded to the model's dtype unless said."),
]
AllowRequantizeOption = Annotated[
    bool,
    typer.Option(
        "--allow-requantize",
        help="Take an artifact for a source though it is rounded already; manifest and card say so. FP8 releases need none.",
    ),
]
FitRecipeOption = Annotated[
    bool, typer.Option("--fit", help="Choose schemes by l4pack fit: to --max-bytes, --bits, or --device's load.")
]
SensitivityFileOption = Annotated[
    Path | None,
    typer.Option("--sensitivity", metavar="FILE", help="What `l4pack measure` found; a shipped stand-in unless given."),
]
ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="layer|role",
        help="Whether layers of a role may differ; layer where the model itself was measured, role with a stand-in.",
    ),
]
BestOption = Annotated[
    bool,
    typer.Option(
        "--best",
        help="Solve the MLPs of four bits and of FP8 that fit chooses for the model's end, as `int4-best` and `fp8-best` do: "
        "of four bits about a quarter less KL at the same bytes, for two to four times the time of quantizing.",
    ),
]
MeasuredOptionsOption = Annotated[
    str | None,
    typer.Option(
        "--options",
        metavar="NAME,…",
        help="Options to measure, all but `nvfp4`, `mxfp4` and `q4_k` unless given; a wrong name lists them.",
    ),
]
DirectOption = Annotated[
    str,
    typer.Option(
        "--direct",
        metavar="WHICH",
        help="Measure `all` changes, or two `anchors` a unit and predict the rest; `auto`: all where that is cheap, "
        "else anchors, and whatever they predict badly. `few`: a dozen or so, the rest predicted from gradients of one "
        "walk back through the model, which saves a large one hundreds of streams.",
    ),
]
StreamsOption = Annotated[
    int | None,
    typer.Option("--streams", help="Most altered streams at once; what half of the free disk holds."),
]
