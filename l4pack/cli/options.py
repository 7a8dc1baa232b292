"""Every option and argument of every command, each declared once: a name means the same wherever it is taken.

An alias with a type variable is completed where it is used: `Recipe[str]` has a default, `Recipe[str | None]` need not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from l4pack.budget.report_format import ReportFormat
from l4pack.cli import console
from l4pack.errors import UsageError
from l4pack.units import parse_tokens

T = TypeVar("T")

_TEXT, _BUDGET, _TIME, _GATES, _CLUSTER, _TALK = "Text", "Budget", "Time", "Quality gates (exit 6)", "Cluster", "Talk"

# What is worked on

SourceOption = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint folder, ORG/NAME[@REVISION] on the Hub, a config.json, llama-4-scout, llama-4-maverick, or demo.",
        show_default=False,
    ),
]
ArtifactOption = Annotated[Path, typer.Argument(metavar="DIR", help="Artifact folder.", show_default=False)]
ArtifactsOption = Annotated[
    list[Path], typer.Argument(metavar="DIR...", help="Artifact folders, two or more.", show_default=False)
]
SubjectOption = Annotated[
    str | None,
    typer.Argument(
        metavar="ARTIFACT|SOURCE|RECIPE",
        help="Artifact or checkpoint folder, Hub id, config.json, known model, or a shipped recipe that promises one.",
    ),
]
RequiredSubjectOption = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT|SOURCE|RECIPE",
        help="Artifact or checkpoint folder, Hub id, known model, or a shipped recipe that promises one.",
        show_default=False,
    ),
]
ChecksOption = Annotated[
    list[Path] | None, typer.Argument(metavar="[FILE]...", help="The checks; l4pack-budget.yaml unless given.")
]
AuditedOption = Annotated[
    str, typer.Argument(metavar="DIR|ORG/NAME", help="A folder, or a repository on the Hub.", show_default=False)
]
RepositoryOption = Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository.", show_default=False)]
ExplainedOption = Annotated[str | None, typer.Argument(metavar="NAME", help="Explain one; without it, list all.")]
AgainstOption = Annotated[
    str | None, typer.Option("--against", metavar="SOURCE", help="The original checkpoint to compare with.")
]
OriginalSourceOption = Annotated[
    str | None,
    typer.Option("--source", metavar="SOURCE", help="The original, where the folder lacks its licence."),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        help="Carry these files of the source too; may be repeated. Tokenizer, processor, template, licence go unasked.",
    ),
]
FetchAsYouGoOption = Annotated[
    bool, typer.Option("--fetch-as-you-go", help="Download a Hub source shard by shard and drop each after use.")
]

# How it is quantized

RecipeOption = Annotated[
    T,
    typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A shipped recipe or a YAML file; see `l4pack recipes`."),
]
KeepFloat32Option = Annotated[
    bool,
    typer.Option("--keep-float32", help="Leave kept float32 tensors so; rounded to the model's dtype unless said."),
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
MeasuredOptionsOption = Annotated[
    str | None,
    typer.Option("--options", metavar="NAME,…", help="Options to measure, all unless given; a wrong name lists them."),
]
DirectOption = Annotated[
    str,
    typer.Option(
        "--direct",
        metavar="WHICH",
        help="Measure `all` changes, or two `anchors` a unit and predict the rest; `auto`: all where that is cheap, "
        "else anchors, and whatever they predict badly.",
    ),
]
StreamsOption = Annotated[
    int | None,
    typer.Option("--streams", help="Most altered streams at once; what half of the free disk holds."),
]

# Texts: what is solved on, what is measured on

_A_TEXT = "a file of text or rows, a folder, or wikitext2, c4, demo"
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE|DIR|SET",
        help=f"Text that is calibrated on: {_A_TEXT}. Unless given, one that ships; of `measure`, the rest of --text.",
        rich_help_panel=_TEXT,
    ),
]
CalibrationSamplesOption = Annotated[
    T,
    typer.Option(
        "--calibration-samples",
        metavar="N",
        help="How much of it: whole sequences, short rows count by their tokens.",
        rich_help_panel=_TEXT,
    ),
]
TextOption = Annotated[
    str,
    typer.Option("--text", metavar="FILE|DIR|SET", help=f"Text that is measured on: {_A_TEXT}.", rich_help_panel=_TEXT),
]
SamplesOption = Annotated[
    int,
    typer.Option(
        "--samples",
        metavar="N",
        help="How much of it: whole sequences, short rows count by their tokens.",
        rich_help_panel=_TEXT,
    ),
]
SequenceLengthOption = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        metavar="TOKENS",
        parser=parse_tokens,
        help="Most tokens a sequence of either text; 2048 or the model's context unless given.",
        rich_help_panel=_TEXT,
    ),
]
SeedOption = Annotated[
    T, typer.Option("--seed", metavar="N", help="Which sequences of a text are taken.", rich_help_panel=_TEXT)
]
EarlierTextOption = Annotated[
    str | None, typer.Option("--text", hidden=True, help="What --calibration was called here.", rich_help_panel=_TEXT)
]
EarlierSamplesOption = Annotated[
    int | None,
    typer.Option("--samples", hidden=True, help="What --calibration-samples was called here.", rich_help_panel=_TEXT),
]


def now_called(name: str, given: T | None, earlier_name: str, earlier: T | None) -> T | None:
    """The value of an option that was called otherwise before; says so on stderr. Raises UsageError if both are given."""
    if earlier is None:
        return given
    if given is not None:
        raise UsageError(f"{name} and {earlier_name}, what it was called before, are both given", hint=f"use {name}")
    console.warning(f"{earlier_name} is called {name} now")
    return earlier


# What it must fit

DeviceOption = Annotated[
    T,
    typer.Option(
        "--device",
        metavar="NAME",
        help="GPU or host it must fit, as h100 or 8xh100; see `l4pack devices`. Of `build`, the recipe's promise unless given.",
        rich_help_panel=_BUDGET,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        parser=parse_tokens,
        metavar="TOKENS",
        help="Tokens that each sequence must hold, as 131072 or 128k; the recipe's promise, else 131072, unless given.",
        rich_help_panel=_BUDGET,
    ),
]
SequencesOption = Annotated[
    T, typer.Option("--sequences", metavar="N", help="Sequences at once; 1 unless said.", rich_help_panel=_BUDGET)
]
KVDtypeOption = Annotated[
    T,
    typer.Option(
        "--kv-dtype", metavar="auto|bfloat16|fp8", help="What the KV cache is kept in.", rich_help_panel=_BUDGET
    ),
]
MaxBytesOption = Annotated[
    str | None,
    typer.Option(
        "--max-bytes",
        metavar="SIZE",
        help="Most bytes of all the artifact's files, for example 65GB.",
        rich_help_panel=_BUDGET,
    ),
]
BitsOption = Annotated[
    float | None,
    typer.Option(
        "--bits",
        metavar="NUMBER",
        help="Most bits a weight, over all matrices of attention and MLPs: scales counted, kept ones at 16.",
        rich_help_panel=_BUDGET,
    ),
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help="What must load it: vllm, sglang, transformers; budgets know vllm-0.8 and meta too, `fit` takes any of them.",
        rich_help_panel=_BUDGET,
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

# How long it takes

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

# What is checked and measured

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
    T,
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
    float | None, typer.Option("--max-kl", metavar="NATS", help="Most mean KL.", rich_help_panel=_GATES)
]
MinAgreementOption = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        metavar="SHARE",
        help="Least share of tokens with the same likeliest token.",
        rich_help_panel=_GATES,
    ),
]
MaxPerplexityRatioOption = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-ratio",
        metavar="RATIO",
        help="Most perplexity over the original's.",
        rich_help_panel=_GATES,
    ),
]
MinRecoveryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--min-recovery", metavar="TASK=SHARE", help="Least accuracy over the original's.", rich_help_panel=_GATES
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

# How the job runs, and where its result goes

OutOption = Annotated[
    T,
    typer.Option(
        "--out", "-o", metavar="PATH", help="What to make: a folder, which appears when it is complete, or a file."
    ),
]
ShardSizeOption = Annotated[
    str | None, typer.Option("--shard-size", metavar="SIZE", help="Largest shard; 5GB unless given.")
]
ExportOption = Annotated[str, typer.Option("--to", metavar="gguf|mlx", help="The container: llama.cpp's or MLX's.")]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", metavar="SIZE", help="Largest file; one GGUF file, MLX shards of 5GB unless given."),
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

QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=console.set_quiet, expose_value=False, help="Say errors only.", rich_help_panel=_TALK
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=console.set_verbose, expose_value=False, help="Say every part of a step.",
        rich_help_panel=_TALK,
    ),
]  # fmt: skip
LogFileOption = Annotated[
    Path | None,
    typer.Option(
        "--log-file", metavar="FILE", callback=console.set_log, expose_value=False,
        help="Add progress, warnings and errors to a file, with the time.", rich_help_panel=_TALK,
    ),
]  # fmt: skip

# How it is published

NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The name to publish under; from source and recipe unless given."),
]
BaseModelOption = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ORG/NAME", help="The original's repository, for the card."),
]
TemplateOption = Annotated[
    Path | None,
    typer.Option("--template", metavar="FILE", help="Your own card (Jinja); the licence block stays."),
]
GatedOption = Annotated[
    bool, typer.Option("--gated", help="Let readers of the repository in by request only; the card has its fields.")
]
SignOption = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", help="Sign every file with this SSH key, as ssh-keygen -Y sign does."),
]
SignatureOption = Annotated[
    Path | None,
    typer.Option(
        "--signature", metavar="ALLOWED_SIGNERS", help="Whether one of ssh-keygen's allowed signers signed every file."
    ),
]
FamilyOption = Annotated[
    list[Path] | None,
    typer.Option("--family", metavar="DIR", help="Another artifact of the same model, for a table; may be repeated."),
]
PushOption = Annotated[str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload when all is well.")]
PublicOption = Annotated[bool, typer.Option("--public", help="Make the repository public; private unless said.")]
RevisionOption = Annotated[str, typer.Option("--revision", metavar="BRANCH", help="The branch to put it on.")]
PullRequestOption = Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")]
TagOption = Annotated[str | None, typer.Option("--tag", metavar="TAG", help="Tag the commit.")]
CollectionOption = Annotated[
    str | None, typer.Option("--collection", metavar="SLUG|TITLE", help="Add it to a collection; a title makes one.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that l4pack did not put there.")]
