"""`l4pack budget`, `l4pack budget check` and `l4pack devices`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from l4pack.budget.report_format import Format
from l4pack.cli import console
from l4pack.cli.options import AsJson
from l4pack.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from l4pack.budget.load import Load

SHOW = "show"
DEFAULT_DEVICE = "h100"


class _ShowByDefault(TyperGroup):
    """`l4pack budget ARTIFACT` means `l4pack budget show ARTIFACT`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = [SHOW, *args]
        return super().parse_args(ctx, args)


budget_app = typer.Typer(
    cls=_ShowByDefault,
    help="Say whether a model fits a GPU, with what to spare, and if not, what would. "
    "`l4pack budget ARTIFACT ...` is short for `l4pack budget show ARTIFACT ...`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Subject = Annotated[
    str | None,
    typer.Argument(
        metavar="ARTIFACT|SOURCE", help="Artifact or checkpoint folder, Hub id, config.json or known model."
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", "-r", metavar="NAME|FILE", help="Budget for the artifact to come.", show_default=False),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="h100 unless given; 8xh100 is a host; see `l4pack devices`.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context", metavar="TOKENS", help="Tokens a sequence; 131072 unless given.", show_default=False),
]
Sequences = Annotated[int, typer.Option("--sequences", metavar="N", help="Sequences at once.")]
KVDtype = Annotated[str, typer.Option("--kv-dtype", metavar="auto|bfloat16|fp8", help="What KV is kept in.")]
RuntimeName = Annotated[
    str, typer.Option("--runtime", metavar="NAME", help="vllm, vllm-0.8, sglang, transformers or meta.")
]
TP = Annotated[
    int | None, typer.Option("--tp", metavar="N", help="Tensor parallel; all GPUs unless given.", show_default=False)
]
PP = Annotated[int | None, typer.Option("--pp", metavar="N", help="Pipeline stages.", show_default=False)]
ExpertParallel = Annotated[bool, typer.Option("--expert-parallel", help="Whole experts on each GPU.")]
Hybrid = Annotated[
    bool | None,
    typer.Option("--hybrid-kv/--no-hybrid-kv", help="Whether chunked layers forget old tokens.", show_default=False),
]
BatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--batched-tokens", metavar="N", help="Most tokens of one step; the runtime's own.", show_default=False
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs", metavar="N", help="Request slots of the server; the runtime's own.", show_default=False
    ),
]
MaxPositions = Annotated[
    int | None,
    typer.Option(
        "--max-positions",
        metavar="N",
        help="Length of the position table (max_position_embeddings) when config.json is overridden.",
        show_default=False,
    ),
]
Images = Annotated[
    int | None,
    typer.Option("--images", metavar="N", help="Most images a request; 0 for text only.", show_default=False),
]
Utilization = Annotated[
    float | None,
    typer.Option(
        "--utilization", metavar="SHARE", help="Share of the device the runtime plans with.", show_default=False
    ),
]
DevicesFile = Annotated[
    Path | None, typer.Option("--devices", metavar="FILE", help="Your own devices, as YAML.", show_default=False)
]


@budget_app.command(SHOW)
def show(
    subject: Subject = None,
    recipe: Recipe = None,
    device: Device = None,
    context: Context = None,
    sequences: Sequences = 1,
    kv_dtype: KVDtype = "auto",
    runtime: RuntimeName = "vllm",
    tp: TP = None,
    pp: PP = None,
    expert_parallel: ExpertParallel = False,
    hybrid: Hybrid = None,
    batched_tokens: BatchedTokens = None,
    max_num_seqs: MaxNumSeqs = None,
    max_positions: MaxPositions = None,
    images: Images = None,
    utilization: Utilization = None,
    devices: DevicesFile = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="What runs where: models x recipes x devices.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Hold the prediction against a GPU of this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say whether a model fits, before it is made or after.

    Example: `l4pack budget llama-4-scout --recipe int4 --device h100 --context 32768 --kv-dtype fp8`
    """
    from l4pack.budget.load import Load

    load = Load(
        context, sequences, kv_dtype, tp, pp, expert_parallel, hybrid, batched_tokens, max_num_seqs, max_positions,
        images, utilization,
    )  # fmt: skip
    if matrix:
        _matrix(subject, recipe, device, load, runtime, devices, as_json)
    elif subject is None:
        raise UsageError(
            "no artifact or source is named", hint="for example: l4pack budget llama-4-scout --recipe int4"
        )
    elif measure:
        _measure(subject, recipe, device or DEFAULT_DEVICE, load, runtime, devices, as_json)
    else:
        _show(subject, recipe, device or DEFAULT_DEVICE, load, runtime, devices, as_json)


def _show(
    source: str, recipe: str | None, device: str, load: Load, runtime: str, devices: Path | None, as_json: bool
) -> None:
    from l4pack.budget.devices import find_host, load_devices
    from l4pack.budget.model import budget
    from l4pack.budget.named import alternatives, open_subject
    from l4pack.budget.record import budget_record
    from l4pack.budget.solve import changes, limits
    from l4pack.budget.view import budget_view

    known = load_devices(devices)
    host = find_host(device, known)
    found = budget(open_subject(source, recipe), host, load, runtime)
    largest = limits(found)
    tried = [] if found.fits else changes(found, load, runtime, known, alternatives(source, found.subject))
    if as_json:
        console.show_json(budget_record(found, largest, tried))
    else:
        console.show(*budget_view(found, largest, tried))
    if not found.fits:
        raise typer.Exit(BudgetError.exit_code)


def _matrix(
    source: str | None,
    recipe: str | None,
    device: str | None,
    load: Load,
    runtime: str,
    devices: Path | None,
    as_json: bool,
) -> None:
    from l4pack.budget.devices import find_host, load_devices
    from l4pack.budget.matrix import HOSTS
    from l4pack.budget.matrix import matrix as make_matrix
    from l4pack.budget.named import candidates
    from l4pack.budget.view import matrix_view
    from l4pack.model.config import KNOWN_MODELS

    known = load_devices(devices)
    own = [name for name in known if name not in load_devices()]
    hosts = [find_host(name, known) for name in ([device] if device else [*HOSTS, *own])]
    rows = make_matrix(candidates([source] if source else KNOWN_MODELS, recipe), hosts, load, runtime)
    if as_json:
        console.show_json({"runtime": runtime, "rows": [row.record() for row in rows]})
    else:
        console.show(*matrix_view(rows, load, runtime))


def _measure(
    source: str, recipe: str | None, device: str, load: Load, runtime: str, devices: Path | None, as_json: bool
) -> None:
    from l4pack.budget.devices import find_host, load_devices
    from l4pack.budget.measure import measure as measure_lines
    from l4pack.budget.model import budget
    from l4pack.budget.named import open_subject
    from l4pack.budget.solve import limits
    from l4pack.budget.view import measured_view, verdict_line

    found = budget(open_subject(source, recipe), find_host(device, load_devices(devices)), load, runtime)
    from l4pack.budget.torch_reader import TorchReader  # torch takes seconds: not before the rest is known to be right

    reader = TorchReader()
    lines = measure_lines(found, reader)
    if as_json:
        console.show_json({"device": reader.name(), "lines": [line.record() for line in lines]})
    else:
        console.show(verdict_line(found, limits(found)), "", measured_view(lines, reader.name()))


@budget_app.command()
def check(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="The checks; l4pack-budget.yaml unless given.")
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="How results are written.")] = Format.TEXT,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", metavar="FILE", help="An earlier --format json to compare with.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run all checks of a file; exit 3 when one does not fit.

    Example: `l4pack budget check --format markdown --baseline budget-main.json`
    """
    from l4pack.budget.checks import DEFAULT_FILE, exit_code, run_checks
    from l4pack.budget.named import open_subject
    from l4pack.budget.report import load_baseline, render

    before = load_baseline(baseline)
    results = [result for file in files or [Path(DEFAULT_FILE)] for result in run_checks(file, open_subject)]
    console.show_text(render(results, Format.JSON if as_json else format, before))
    raise typer.Exit(exit_code(results))


def devices(
    file: DevicesFile = None,
    as_json: AsJson = False,
) -> None:
    """List the devices that budgets know, and where each one's memory figure is from.

    Example: `l4pack devices`
    """
    from l4pack.budget.devices import load_devices
    from l4pack.budget.view import devices_view

    known = load_devices(file)
    if as_json:
        records = [
            {"name": device.name, "title": device.title, "memory_bytes": device.memory_bytes, "source": device.source}
            for device in known.values()
        ]
        console.show_json({"devices": records})
    else:
        console.show(devices_view(known.values()))
