"""`l4pack budget`, `l4pack budget check` and `l4pack devices`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer.core import TyperGroup

from l4pack.budget.report_format import ReportFormat
from l4pack.cli import console
from l4pack.cli.options import (
    AsJsonOption,
    BaselineOption,
    BatchedTokensOption,
    ChecksOption,
    ContextOption,
    DeviceOption,
    DevicesFileOption,
    ExpertParallelOption,
    GpuLayersOption,
    HybridKVOption,
    ImagesOption,
    KVDtypeOption,
    MatrixOption,
    MaxNumSeqsOption,
    MaxPositionsOption,
    MeasureGpuOption,
    OutOption,
    OutputFormatOption,
    PPOption,
    RecipeOption,
    ReportOption,
    RequiredSubjectOption,
    RuntimeOption,
    SequencesOption,
    SubjectOption,
    TPOption,
    UtilizationOption,
)
from l4pack.errors import BudgetError, L4packError, UsageError

if TYPE_CHECKING:
    from l4pack.budget.load import Load
    from l4pack.budget.named import Asked
    from l4pack.recipe import Gates

SHOW = "show"


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


@budget_app.command(SHOW)
def show(
    subject: SubjectOption = None,
    recipe: RecipeOption[str | None] = None,
    device: DeviceOption[str | None] = None,
    context: ContextOption = None,
    sequences: SequencesOption[int | None] = None,
    kv_dtype: KVDtypeOption[str | None] = None,
    runtime: RuntimeOption = "vllm",
    tp: TPOption = None,
    pp: PPOption = None,
    expert_parallel: ExpertParallelOption = False,
    hybrid: HybridKVOption = None,
    batched_tokens: BatchedTokensOption = None,
    max_num_seqs: MaxNumSeqsOption = None,
    max_positions: MaxPositionsOption = None,
    images: ImagesOption = None,
    utilization: UtilizationOption = None,
    gpu_layers: GpuLayersOption = None,
    devices: DevicesFileOption = None,
    matrix: MatrixOption = False,
    measure: MeasureGpuOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Say whether a model fits, before it is made or after.

    A recipe made for a model and a device, or an artifact of it, is asked what it promises, but for what is said here:
    `l4pack budget scout-int4-1xh100`. Else the device is h100. A GGUF file is budgeted for llama.cpp, a folder of MLX for mlx-lm.

    Example: `l4pack budget llama-4-scout --recipe int4 --device h100 --context 32k --kv-dtype fp8`
    """
    from l4pack.budget.load import Load
    from l4pack.budget.named import Asked

    load = Load(
        context, sequences or 1, kv_dtype or "auto", tp, pp, expert_parallel, hybrid, batched_tokens, max_num_seqs,
        max_positions, images, utilization, gpu_layers,
    )  # fmt: skip
    if matrix:
        _matrix(subject, recipe, device, load, runtime, devices, as_json)
    elif subject is None:
        raise UsageError(
            "no artifact or source is named", hint="for example: l4pack budget llama-4-scout --recipe int4"
        )
    else:
        answer = _measure if measure else _show
        answer(Asked(subject, recipe, device, load, sequences, kv_dtype), runtime, devices, as_json)


def _show(asked: Asked, runtime: str, devices: Path | None, as_json: bool) -> None:
    from l4pack.budget.answer import answer
    from l4pack.budget.devices import load_devices
    from l4pack.budget.view import budget_view

    found = answer(asked, runtime, load_devices(devices))
    if as_json:
        console.show_json(found.record())
    else:
        console.show(*budget_view(found.budget, found.largest, found.changes, found.promised_by, found.serve))
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
    from l4pack.budget.named import candidate_subjects
    from l4pack.budget.view import matrix_view
    from l4pack.model.config import KNOWN_MODELS

    known = load_devices(devices)
    own = [name for name in known if name not in load_devices()]
    hosts = [find_host(name, known) for name in ([device] if device else [*HOSTS, *own])]
    rows = make_matrix(candidate_subjects([source] if source else KNOWN_MODELS, recipe), hosts, load, runtime)
    if as_json:
        console.show_json({"runtime": runtime, "rows": [row.record() for row in rows]})
    else:
        console.show(*matrix_view(rows, load, runtime))


def _measure(asked: Asked, runtime: str, devices: Path | None, as_json: bool) -> None:
    from l4pack.budget.devices import find_host, load_devices
    from l4pack.budget.measure import measure_device as measure_lines
    from l4pack.budget.model import budget
    from l4pack.budget.named import question_of
    from l4pack.budget.solve import limits
    from l4pack.budget.view import measured_view, verdict_line

    question = question_of(asked)
    found = budget(question.subject, find_host(question.device, load_devices(devices)), question.load, runtime)
    from l4pack.budget.torch_reader import TorchReader  # torch takes seconds: not before the rest is known to be right

    reader = TorchReader()
    lines = measure_lines(found, reader)
    if as_json:
        console.show_json({"device": reader.name(), "lines": [line.record() for line in lines]})
    else:
        console.show(verdict_line(found, limits(found)), "", measured_view(lines, reader.name()))


@budget_app.command()
def check(
    files: ChecksOption = None,
    format: OutputFormatOption = ReportFormat.TEXT,
    baseline: BaselineOption = None,
    reports: ReportOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Run all checks of a file; exit 3 when one does not fit, 6 or 7 when only its quality or licence is at fault.

    Example: `l4pack budget check --format markdown --baseline budget-main.json --report json=budget-main.json`
    """
    from l4pack.budget.checks import DEFAULT_FILE, Means, exit_code, run_checks
    from l4pack.budget.named import alternatives, open_subject
    from l4pack.budget.report import load_baseline, parse_reports, render
    from l4pack.work.files import write_atomic

    wanted = parse_reports(reports or [])
    if baseline is not None and not baseline.exists():
        console.warning(f"there is no baseline {baseline} yet: nothing is compared")
    before = load_baseline(baseline)
    means = Means(open_subject, alternatives, _broken)
    results = [result for file in files or [Path(DEFAULT_FILE)] for result in run_checks(file, means)]
    console.show_text(render(results, ReportFormat.JSON if as_json else format, before))
    for path, written in wanted.items():
        write_atomic(path, render(results, written, before).encode())
    raise typer.Exit(exit_code(results))


def _broken(place: str, quality: Gates | None, licence: bool) -> list[L4packError]:
    """What an artifact does not keep; what finds out is imported where a check asks for it."""
    if quality is None and not licence:
        return []
    from l4pack.publish.gates import broken

    return broken(place, quality, licence)


@budget_app.command()
def init(
    subject: RequiredSubjectOption,
    recipe: RecipeOption[str | None] = None,
    device: DeviceOption[str | None] = None,
    context: ContextOption = None,
    sequences: SequencesOption[int | None] = None,
    kv_dtype: KVDtypeOption[str | None] = None,
    out: OutOption[Path] = Path("l4pack-budget.yaml"),
    as_json: AsJsonOption = False,
) -> None:
    """Write a checks file with one check of an artifact, or of a recipe's to come; refused unless it holds now.

    Example: `l4pack budget init scout-int4-1xh100`
    """
    from l4pack.budget.init import write_checks
    from l4pack.budget.load import Load
    from l4pack.budget.named import Asked

    load = Load(context, sequences or 1, kv_dtype or "auto")
    check = write_checks(Asked(subject, recipe, device, load, sequences, kv_dtype), out)
    if as_json:
        console.show_json({"file": str(out), "check": check})
    else:
        console.show(f"[bold]{console.plain(out)}[/bold] with one check, {console.plain(check['name'])}")
        console.talk(f"next: l4pack budget check {console.plain(out)}")


def devices(
    file: DevicesFileOption = None,
    as_json: AsJsonOption = False,
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
