"""What an artifact must fit: device, load, bytes, and how a runtime serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from l4pack.budget.report_format import ReportFormat
from l4pack.units import parse_tokens

_T = TypeVar("_T")

_PANEL = "Budget"

DeviceOption = Annotated[
    _T,
    typer.Option(
        "--device",
        metavar="NAME",
        help="GPU or host it must fit, as h100 or 8xh100; see `l4pack devices`. Of `build`, the recipe's promise unless given.",
        rich_help_panel=_PANEL,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        parser=parse_tokens,
        metavar="TOKENS",
        help="Tokens that each sequence must hold, as 131072 or 128k; the recipe's promise, else 131072, unless given.",
        rich_help_panel=_PANEL,
    ),
]
SequencesOption = Annotated[
    _T, typer.Option("--sequences", metavar="N", help="Sequences at once; 1 unless said.", rich_help_panel=_PANEL)
]
KVDtypeOption = Annotated[
    _T,
    typer.Option(
        "--kv-dtype",
        metavar="auto|bfloat16|fp8",
        help="What the KV cache is kept in; of a GGUF file, float16 or q8_0.",
        rich_help_panel=_PANEL,
    ),
]
MaxBytesOption = Annotated[
    str | None,
    typer.Option(
        "--max-bytes",
        metavar="SIZE",
        help="Most bytes of all the artifact's files, for example 65GB.",
        rich_help_panel=_PANEL,
    ),
]
BitsOption = Annotated[
    float | None,
    typer.Option(
        "--bits",
        metavar="NUMBER",
        help="Most bits a weight, over all matrices of attention and MLPs: scales counted, kept ones at 16.",
        rich_help_panel=_PANEL,
    ),
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help="What must load it: vllm, sglang, transformers, or llama.cpp and mlx, whose files `export` makes; budgets know vllm-0.8 and meta too, `fit` takes `any` for the first three at once.",
        rich_help_panel=_PANEL,
    ),
]
GpuLayersOption = Annotated[
    int | None,
    typer.Option(
        "--gpu-layers",
        metavar="N",
        help="Of a GGUF file: layers that llama.cpp puts on the GPU, the head counted; all unless given, the others stay in the machine's memory.",
    ),
]
TPOption = Annotated[int | None, typer.Option("--tp", metavar="N", help="Tensor parallel; all GPUs unless given.")]
PPOption = Annotated[int | None, typer.Option("--pp", metavar="N", help="Pipeline stages.")]
ExpertParallelOption = Annotated[bool, typer.Option("--expert-parallel", help="Whole experts on each GPU.")]
HybridKVOption = Annotated[
    bool | None, typer.Option("--hybrid-kv/--no-hybrid-kv", help="Whether chunked layers forget old tokens.")
]
BatchedTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batched-tokens", metavar="TOKENS", parser=parse_tokens, help="Most tokens of one step; the runtime's own."
    ),
]
MaxNumSeqsOption = Annotated[
    int | None,
    typer.Option("--max-num-seqs", metavar="N", help="Request slots of the server; the runtime's own."),
]
MaxPositionsOption = Annotated[
    int | None,
    typer.Option(
        "--max-positions",
        metavar="TOKENS",
        parser=parse_tokens,
        help="Length of the position table (max_position_embeddings) when config.json is overridden.",
    ),
]
ImagesOption = Annotated[
    int | None, typer.Option("--images", metavar="N", help="Most images a request; 0 for text only.")
]
UtilizationOption = Annotated[
    float | None, typer.Option("--utilization", metavar="SHARE", help="Share of the device the runtime plans with.")
]
DevicesFileOption = Annotated[Path | None, typer.Option("--devices", metavar="FILE", help="Your own devices, as YAML.")]
MatrixOption = Annotated[bool, typer.Option("--matrix", help="What runs where: models x recipes x devices.")]
MeasureGpuOption = Annotated[bool, typer.Option("--measure", help="Hold the prediction against a GPU of this machine.")]
OutputFormatOption = Annotated[ReportFormat, typer.Option("--format", help="How results are written.")]
BaselineOption = Annotated[
    Path | None, typer.Option("--baseline", metavar="FILE", help="An earlier --format json to compare with.")
]

ReportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--report",
        metavar="FORMAT=FILE",
        help="Write the results to a file too, once they are compared with the baseline; may be repeated.",
    ),
]
