"""What is checked, asked and measured, and which figures are good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from l4pack.units import parse_tokens

_T = TypeVar("_T")

_PANEL = "Quality gates (exit 6)"

SampleOption = Annotated[
    int | None,
    typer.Option("--sample", metavar="N", min=1, help="Compare N matrices with the source, not all."),
]
HeadersOnlyOption = Annotated[
    bool,
    typer.Option("--headers-only", help="Read no tensor: names, dtypes, shapes, configuration and files alone."),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Warnings fail too.")]
MaxColdOption = Annotated[
    float,
    typer.Option(
        "--max-cold", metavar="SHARE", help="Largest share of experts that may see no token; exit 6 above it."
    ),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="FILE|NAME", help="Questions in JSONL, or a task of lm-eval; may be repeated."),
]
PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="What is said to it; asked for, line by line, unless given."),
]
ImageOption = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="An image that the first prompt is about; may be repeated."),
]
TokensOption = Annotated[
    int, typer.Option("--tokens", "-n", metavar="N", min=1, max=4096, help="Most tokens of an answer.")
]
SampleTokensOption = Annotated[
    _T,
    typer.Option(
        "--sample-tokens",
        metavar="N",
        min=0,
        max=512,
        help="Record what both models say to two short prompts, N tokens each; every token reads weights again.",
    ),
]
SuiteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME",
        help="refusals, or lm-eval tasks with their settings: openllm, leaderboard; may be repeated.",
    ),
]
LimitOption = Annotated[int | None, typer.Option("--limit", metavar="N", help="Most questions of each lm-eval task.")]
BackendOption = Annotated[
    str, typer.Option("--backend", metavar="ENGINE", help="What runs lm-eval tasks: streamed, vllm or transformers.")
]
NeedleOption = Annotated[
    int | None,
    typer.Option("--needle", metavar="TOKENS", parser=parse_tokens, help="Retrieve numbers hidden in so many tokens."),
]
MaxKlOption = Annotated[
    float | None, typer.Option("--max-kl", metavar="NATS", help="Most mean KL.", rich_help_panel=_PANEL)
]
MinAgreementOption = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        metavar="SHARE",
        help="Least share of tokens with the same likeliest token.",
        rich_help_panel=_PANEL,
    ),
]
MaxPerplexityRatioOption = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-ratio",
        metavar="RATIO",
        help="Most perplexity over the original's.",
        rich_help_panel=_PANEL,
    ),
]
MinRecoveryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--min-recovery", metavar="TASK=SHARE", help="Least accuracy over the original's.", rich_help_panel=_PANEL
    ),
]
SaveReferenceOption = Annotated[
    Path | None, typer.Option("--save-reference", metavar="DIR", help="Keep the original's answers there.")
]
ReferenceOption = Annotated[
    Path | None, typer.Option("--reference", metavar="DIR", help="Compare with answers kept before.")
]
WeightsOnlyOption = Annotated[
    bool, typer.Option("--weights-only", help="Leave inputs unrounded where the runtime would round them.")
]
SkipEvaluateOption = Annotated[bool, typer.Option("--skip-evaluate", help="Do not measure accuracy.")]
