"""`l4pack build`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.evaluate import asked_gates
from l4pack.cli.fit import Bits, MaxBytes, Runtime, SensitivityFile, warn_of_stand_in
from l4pack.cli.options import AsJson, Compute, Include, KeepFloat32, MaxRam, Out, Source
from l4pack.cli.plan import limits, size_of
from l4pack.errors import UsageError
from l4pack.units import human_bytes, human_seconds, parse_size
from l4pack.work.device import AUTO, chosen

if TYPE_CHECKING:
    from l4pack.build import Built, Order, Step
    from l4pack.checkpoint.source import Checkpoint
    from l4pack.fit.budgets import Wish
    from l4pack.measure.record import Sensitivity
    from l4pack.plan.plan import Plan

DEFAULT_RECIPE = "int4"
_COLOURS = {"done": "green", "kept": "green", "not asked": "dim", "failed": "red"}


def build(
    source: Source,
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help="A shipped recipe or a YAML file; int4 unless given.",
            show_default=False,
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Choose schemes by l4pack fit: to --max-bytes, --bits, or --device's load.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="NAME", help="Must fit this; the recipe's promise unless given.", show_default=False
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="TOKENS", help="Tokens each sequence must hold.", show_default=False),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option("--sequences", metavar="N", help="Sequences served at once.", show_default=False)
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option("--kv-dtype", metavar="bfloat16|fp8", help="What the KV cache is kept in.", show_default=False),
    ] = None,
    max_bytes: MaxBytes = None,
    bits: Bits = None,
    runtime: Runtime = "vllm",
    sensitivity: SensitivityFile = None,
    text: Annotated[
        str, typer.Option("--text", metavar="TEXT", help="What accuracy is measured on; held-out text that ships.")
    ] = "demo",
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Most sequences of it.")] = 32,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", metavar="TOKENS", help="2048 unless given.", show_default=False)
    ] = None,
    max_kl: Annotated[float | None, typer.Option("--max-kl", metavar="NATS", help="Gate.", show_default=False)] = None,
    min_agreement: Annotated[
        float | None, typer.Option("--min-agreement", metavar="SHARE", help="Gate.", show_default=False)
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option("--max-perplexity-ratio", metavar="RATIO", help="Gate.", show_default=False)
    ] = None,
    skip_evaluate: Annotated[bool, typer.Option("--skip-evaluate", help="Do not measure accuracy.")] = False,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The artifact's name on its card.", show_default=False)
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="ORG/NAME", help="The model it was made from.", show_default=False),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload when all is well.", show_default=False)
    ] = None,
    max_ram: MaxRam = None,
    compute: Compute = AUTO,
    include: Include = None,
    keep_float32: KeepFloat32 = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again instead of going on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole chain: fit if asked for, plan, quantize, verify, budget, evaluate, package, push; go on where it stopped.

    Example: `l4pack build demo --recipe int4-rtn --out demo-int4 --device h100 --context 8192`
    """
    from l4pack.build import Order, fit_recipe
    from l4pack.build import build as run
    from l4pack.checkpoint.open import open_source
    from l4pack.plan.plan import make_plan
    from l4pack.publish.publish import Wishes
    from l4pack.publish.upload import Target
    from l4pack.recipe import load_recipe
    from l4pack.text.choice import TextChoice

    chosen_device = chosen(compute)
    checkpoint = open_source(source, include=include or ())
    before: list[Step] = []
    if fit:
        wish = _wish(recipe, device, context, sequences, kv_dtype, max_bytes, bits, runtime)
        step, path = fit_recipe(checkpoint, _sensitivity(checkpoint, sensitivity), wish, out)
        before, recipe = [step], str(path)
    elif max_bytes or bits or sensitivity:
        raise UsageError("--max-bytes, --bits and --sensitivity go with --fit", hint="add --fit, or leave them out")
    plan = make_plan(
        checkpoint,
        load_recipe(recipe or DEFAULT_RECIPE).keeping(float32=keep_float32),
        limits(max_ram, None, None, chosen_device),
    )
    plan.check_servable()
    order = Order(
        out=out,
        compute=chosen_device,
        text=None if skip_evaluate else TextChoice(text, samples, sequence_length),
        device=device,
        context=context,
        sequences=sequences,
        kv_dtype=kv_dtype,
        gates=asked_gates(max_kl=max_kl, min_agreement=min_agreement, max_perplexity_ratio=max_perplexity_ratio),
        wishes=Wishes(name=name, base_model=base_model),
        push=None if push is None else Target(push),
        restart=restart,
    )
    built = run(plan, order, console.progress, before)
    if as_json:
        console.show_json(built.record())
    else:
        console.show(*build_view(plan, order, built))
    if built.error is not None:
        console.error(built.error.message, built.error.hint)
        sys.exit(built.error.exit_code)


def _wish(
    recipe: str | None,
    device: str | None,
    context: int | None,
    sequences: int | None,
    kv_dtype: str | None,
    max_bytes: str | None,
    bits: float | None,
    runtime: str,
) -> Wish:
    """What to fit to: the device's load, unless bytes or bits are named; then the device is checked afterwards."""
    from l4pack.fit.budgets import Wish

    if recipe is not None:
        raise UsageError("--fit chooses the recipe itself", hint="leave --recipe out, or --fit")
    size = None if max_bytes is None else parse_size(max_bytes)
    if size is not None or bits is not None:
        wish = Wish(max_bytes=size, bits=bits, runtime=runtime)
    else:
        wish = Wish(device=device, context=context, sequences=sequences, kv_dtype=kv_dtype, runtime=runtime)
    wish.check()
    return wish


def _sensitivity(checkpoint: Checkpoint, path: Path | None) -> Sensitivity:
    from l4pack.fit.losses import shipped_sensitivity
    from l4pack.measure.record import read_sensitivity

    found = shipped_sensitivity(checkpoint) if path is None else read_sensitivity(path)
    warn_of_stand_in(found, checkpoint)
    return found


def build_view(plan: Plan, order: Order, built: Built) -> list[RenderableType]:
    """The summary: what each step said, what it all weighs, and what to type next."""
    table = console.table("Step", "Outcome", ">Time", "What it says")
    for step in built.steps:
        outcome = f"[{_COLOURS[step.outcome]}]{step.outcome.value}[/]"
        table.add_row(step.name, outcome, human_seconds(step.seconds), console.plain(step.summary))
    sizes = [
        "",
        f"before   {human_bytes(plan.source_weight_bytes)} of weights",
        f"after    {size_of(plan)}",
        f"where    [bold]{console.plain(order.out)}[/bold]",
    ]
    if built.error is None:
        sizes.append(
            f"next     vllm serve {console.plain(order.out)}   or   l4pack push {console.plain(order.out)} ORG/NAME --dry-run"
        )
    return [table, *sizes]
