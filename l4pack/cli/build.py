"""`l4pack build`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from l4pack.cli import console
from l4pack.cli.cluster import cluster_options, joined, planned_workers
from l4pack.cli.fit import warn_of
from l4pack.cli.hours import (
    Hours,
    hours_view,
    spread_record,
    spread_view,
    within_record,
    within_time,
    within_view,
)
from l4pack.cli.options import (
    AllowRequantizeOption,
    AsJsonOption,
    BaseModelOption,
    BestOption,
    BitsOption,
    CalibrationOption,
    CalibrationSamplesOption,
    CompanionsOption,
    ComputeOption,
    ContextOption,
    DeviceOption,
    DevicesFileOption,
    DryRunOption,
    ExportsOption,
    FetchAsYouGoOption,
    FitRecipeOption,
    GpuLayersOption,
    GpusPerWorkerOption,
    IncludeOption,
    KeepFloat32Option,
    KVDtypeOption,
    LoraOption,
    MaxBytesOption,
    MaxKlOption,
    MaxPerplexityRatioOption,
    MaxRamOption,
    MaxVramOption,
    MinAgreementOption,
    NameOption,
    OnOption,
    OutOption,
    PriceOption,
    PublicOption,
    PushOption,
    RayOption,
    RecipeOption,
    RestartOption,
    RuntimeOption,
    SamplesOption,
    SampleTokensOption,
    SeedOption,
    SensitivityFileOption,
    SequenceLengthOption,
    SequencesOption,
    ShardSizeOption,
    SkipEvaluateOption,
    SourceOption,
    TagOption,
    TextOption,
    WithinOption,
)
from l4pack.cli.plan import plan_view, refusals_view, size_of
from l4pack.cli.said import sample_line, sample_talk, sample_view
from l4pack.errors import UsageError
from l4pack.units import given_size, human_bytes, human_seconds
from l4pack.work.device import AUTO, chosen

if TYPE_CHECKING:
    from l4pack.build import Built, Order, Step
    from l4pack.checkpoint.source import Checkpoint
    from l4pack.fit.budgets import Wish
    from l4pack.measure.record import Sensitivity
    from l4pack.plan.plan import Plan
    from l4pack.publish.upload import Destination
    from l4pack.recipe import Recipe
    from l4pack.timing.jobs import Talk
    from l4pack.timing.speeds import Prediction
    from l4pack.timing.spread import Spread
    from l4pack.timing.within import Chosen

    Shared = tuple[Spread | None, Spread | None]

DEFAULT_RECIPE = "int4"
_COLOURS = {"done": "green", "kept": "green", "not asked": "dim", "failed": "red"}


def build(
    source: SourceOption,
    out: OutOption[Path],
    recipe: RecipeOption[str | None] = None,
    lora: LoraOption = None,
    fit: FitRecipeOption = False,
    best: BestOption = False,
    device: DeviceOption[str | None] = None,
    context: ContextOption = None,
    sequences: SequencesOption[int | None] = None,
    kv_dtype: KVDtypeOption[str | None] = None,
    max_bytes: MaxBytesOption = None,
    bits: BitsOption = None,
    gpu_layers: GpuLayersOption = None,
    runtime: RuntimeOption = "vllm",
    sensitivity: SensitivityFileOption = None,
    calibration: CalibrationOption = None,
    calibration_samples: CalibrationSamplesOption[int | None] = None,
    text: TextOption = "demo",
    samples: SamplesOption = 32,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption[int | None] = None,
    max_kl: MaxKlOption = None,
    min_agreement: MinAgreementOption = None,
    max_perplexity_ratio: MaxPerplexityRatioOption = None,
    skip_evaluate: SkipEvaluateOption = False,
    sample_tokens: SampleTokensOption[int | None] = None,
    name: NameOption = None,
    base_model: BaseModelOption = None,
    export: ExportsOption = None,
    push: PushOption = None,
    public: PublicOption = False,
    tag: TagOption = None,
    max_ram: MaxRamOption = None,
    max_vram: MaxVramOption = None,
    shard_size: ShardSizeOption = None,
    compute: ComputeOption = AUTO,
    include: IncludeOption = None,
    companions: CompanionsOption = None,
    keep_float32: KeepFloat32Option = False,
    allow_requantize: AllowRequantizeOption = False,
    fetch_as_you_go: FetchAsYouGoOption = False,
    ray: RayOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    restart: RestartOption = False,
    on: OnOption = None,
    devices: DevicesFileOption = None,
    price: PriceOption = None,
    within: WithinOption = None,
    dry_run: DryRunOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Run the whole chain: fit if asked for, plan, quantize, verify, budget, evaluate, package, export, push; go on where it stopped.

    The recipe is int4 unless `--recipe` or `--fit` says otherwise.

    Example: `l4pack build demo --recipe int4-rtn --out demo-int4 --device h100 --context 8192`
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.build import Order, fetch_folder, fit_recipe
    from l4pack.build import build as run
    from l4pack.evaluate.gates import asked_gates
    from l4pack.plan.plan import make_plan
    from l4pack.publish.ahead import refused_later
    from l4pack.publish.publish import Wishes
    from l4pack.text.choice import TextChoice

    chosen_device = chosen(compute)
    spread = cluster_options(ray, gpus_per_worker, chosen_device)
    target, exports = _target(push, public=public, tag=tag), _exports(export, runtime)
    checkpoint = open_original(
        source,
        fetch_folder=fetch_folder(out) if fetch_as_you_go else None,
        include=include or (),
        companions=companions,
        requantize=allow_requantize,
        lora=lora or (),
    )
    before: list[Step] = []
    if fit:
        wish = _wish(recipe, device, context, sequences, kv_dtype, max_bytes, bits, runtime, gpu_layers, best=best)
        step, path = fit_recipe(checkpoint, _sensitivity(checkpoint, sensitivity, runtime), wish, out)
        before, recipe = [step], str(path)
    elif best:
        raise UsageError("--best goes with --fit", hint="add --fit, or use --recipe int4-best")
    elif max_bytes or bits or sensitivity:
        raise UsageError("--max-bytes, --bits and --sensitivity go with --fit", hint="add --fit, or leave them out")
    hours = Hours(on, devices, price, chosen_device, out.parent, planned=dry_run)
    allowed = hours.limits(max_ram, max_vram, shard_size)
    wanted = _recipe(recipe, calibration, calibration_samples, sequence_length, seed, keep_float32=keep_float32)
    made, fitted = within_time(make_plan(checkpoint, wanted, allowed), allowed, hours, within, calibration_samples)
    plan = _with_text(made if spread is None else made.on_cluster(), calibration)
    _check_exports(plan, exports)
    talk = _talk(plan, sample_tokens, skip_evaluate=skip_evaluate)
    predicted = _predicted(plan, hours, None if skip_evaluate else (samples, sequence_length), talk)
    refused = refused_later(checkpoint, plan.recipe, name=name, base_model=base_model)
    if not (dry_run or as_json):
        console.talk(*refusals_view(refused))
    order = Order(
        out=out, compute=chosen_device, device=device, context=context, sequences=sequences, kv_dtype=kv_dtype,
        text=None if skip_evaluate else TextChoice(text, samples, sequence_length, seed or 0),
        gates=asked_gates(max_kl=max_kl, min_agreement=min_agreement, max_perplexity_ratio=max_perplexity_ratio),
        wishes=Wishes(name=name, base_model=base_model), push=target,
        max_ram=allowed.max_ram, max_vram=allowed.max_vram, restart=restart, dry_run=dry_run,
        predicted=predicted, refused=refused, talk=talk, exports=exports, runtime=runtime, gpu_layers=gpu_layers,
    )  # fmt: skip
    with joined(None if dry_run else spread, computes=True) as cluster:
        built = run(plan, replace(order, cluster=cluster), console.progress, before)
    shared = None
    if dry_run and spread is not None:
        shared = _shared(plan, hours, planned_workers(ray, gpus_per_worker, chosen_device, computes=True), order)
    _show(plan, order, built, fitted, shared, as_json=as_json)


def _shared(plan: Plan, hours: Hours, workers: int | None, order: Order) -> Shared:
    """Quantizing on a cluster's workers, and evaluating there if the chain does."""
    quantized, text = hours.spread(plan, workers), order.text
    if text is None:
        return quantized, None
    return quantized, hours.spread_evaluating(plan, workers, text.samples, text.sequence_length)


def _recipe(
    name: str | None, calibration: str | None, samples: int | None, length: int | None, seed: int | None,
    *, keep_float32: bool
) -> Recipe:  # fmt: skip
    """The recipe with what the options change in it."""
    from l4pack.recipe import load_recipe

    wanted = load_recipe(name or DEFAULT_RECIPE).keeping(float32=keep_float32)
    shared = {} if wanted.calibration is None else {"sequence_length": length, "seed": seed}
    return wanted.calibrating(calibration is not None, samples=samples, **shared)


def _with_text(plan: Plan, calibration: str | None) -> Plan:
    """The plan, with a calibration text of the user's own read already. Raises what reading it does, and RecipeError."""
    from l4pack.calibration.text import with_text

    if calibration is not None and plan.needs is not None:
        plan = with_text(plan, calibration)
    plan.check_servable()
    return plan


def _exports(named: str | None, runtime: str) -> tuple[str, ...]:
    """The containers asked for, and the one that the runtime loads. Raises UsageError."""
    from l4pack.budget.files import CONTAINERS
    from l4pack.export.known import containers_named

    own = CONTAINERS.get(runtime)
    return tuple(dict.fromkeys([*containers_named(named), *([own] if own else [])]))


def _check_exports(plan: Plan, exports: tuple[str, ...]) -> None:
    """Refuse containers that the artifact to come does not fit into, before it is made. Raises UsageError."""
    if exports:
        from l4pack.export.ahead import check_ahead

        check_ahead(plan, exports)


def _talk(plan: Plan, tokens: int | None, *, skip_evaluate: bool) -> Talk:
    """The sample to take. Raises UsageError for one that is asked for where nothing is evaluated."""
    from l4pack.evaluate.sample import usual_tokens

    if skip_evaluate and tokens:
        raise UsageError("--sample-tokens goes with evaluating", hint="leave it out, or --skip-evaluate")
    usual = 0 if skip_evaluate else usual_tokens(plan.source_weight_bytes + plan.weight_bytes)
    return sample_talk(usual if tokens is None else tokens)


def _predicted(plan: Plan, hours: Hours, evaluated: tuple[int, int | None] | None, talk: Talk) -> dict[str, Prediction]:
    """The time of each step that takes long, accuracy measured on so many samples of that length."""
    from l4pack.timing.jobs import building, tokens_at_most

    tokens = None if evaluated is None else tokens_at_most(plan.checkpoint.config.text, *evaluated)
    found = {}
    for name, stages in building(plan, hours.kind, tokens, talk).items():
        prediction = hours.predict(stages, plan.read_bytes)
        if prediction is not None:
            found[name] = prediction
    return found


def _show(
    plan: Plan, order: Order, built: Built, fitted: Chosen | None, shared: Shared | None, *, as_json: bool
) -> None:
    """Print what came of it, and end with the exit code of what failed."""
    spread = shared or (None, None)
    if as_json:
        console.show_json({**built.record(), **within_record(fitted), **spread_record(*spread)})
    elif order.dry_run and built.error is None:
        from l4pack.timing.speeds import joined

        whole = joined(list(order.predicted.values())) if order.predicted else None
        said = sample_line(order.sample(plan))
        times = [*hours_view(whole), *spread_view(*spread), *within_view(fitted)]
        console.show(*plan_view(plan), *refusals_view(order.refused), *said, *times)
    else:
        console.show(*build_view(plan, order, built), *within_view(fitted))
    if built.error is not None:
        console.error(built.error.message, built.error.hint)
        sys.exit(built.error.exit_code)


def _target(push: str | None, *, public: bool, tag: str | None) -> Destination | None:
    """Where to upload to, if anywhere. Raises UsageError for options that go with an upload alone."""
    from l4pack.publish.upload import Destination

    if push is not None:
        return Destination(push, public=public, tag=tag)
    if public or tag is not None:
        raise UsageError("--public and --tag go with --push", hint="add --push ORG/NAME, or leave them out")
    return None


def _wish(
    recipe: str | None,
    device: str | None,
    context: int | None,
    sequences: int | None,
    kv_dtype: str | None,
    max_bytes: str | None,
    bits: float | None,
    runtime: str,
    gpu_layers: int | None,
    *,
    best: bool,
) -> Wish:
    """What to fit to: the device's load, unless bytes or bits are named; then the device is checked afterwards."""
    from l4pack.fit.budgets import Wish

    if recipe is not None:
        raise UsageError("--fit chooses the recipe itself", hint="leave --recipe out, or --fit")
    size = given_size(max_bytes)
    if size is not None or bits is not None:
        wish = Wish(max_bytes=size, bits=bits, runtime=runtime, best=best)
    else:
        wish = Wish(
            device=device, context=context, sequences=sequences, kv_dtype=kv_dtype, runtime=runtime,
            gpu_layers=gpu_layers, best=best,
        )  # fmt: skip
    wish.check()
    return wish


def _sensitivity(checkpoint: Checkpoint, path: Path | None, runtime: str) -> Sensitivity:
    from l4pack.fit.losses import shipped_sensitivity
    from l4pack.measure.record import read_sensitivity

    found = shipped_sensitivity(checkpoint) if path is None else read_sensitivity(path)
    warn_of(found, checkpoint, runtime)
    return found


def build_view(plan: Plan, order: Order, built: Built) -> list[RenderableType]:
    """The summary: what each step said, what it all weighs, and what to type next."""
    table = console.table("Step", "Outcome", ">Time", ">Predicted", "What it says")
    for step in built.steps:
        outcome = f"[{_COLOURS[step.outcome]}]{step.outcome.value}[/]"
        predicted = human_seconds(order.predicted[step.name].seconds) if step.name in order.predicted else ""
        table.add_row(step.name, outcome, human_seconds(step.seconds), predicted, console.plain(step.summary))
    sizes = [
        "",
        f"before   {human_bytes(plan.source_weight_bytes)} of weights",
        f"after    {size_of(plan)}",
    ]
    said = next((sample_view(step.record) for step in built.steps if step.name == "evaluate"), [])
    return [table, *said, *sizes, *(_whereabouts(plan, order, built) if built.error is None else ())]


def _only_exported(plan: Plan) -> bool:
    """Whether the artifact has a format that no runtime loads, and is there to be exported."""
    from l4pack.formats.known import load_format

    return any(load_format(scheme.format).exported for scheme in plan.recipe.schemes.values())


def _places(plan: Plan, order: Order, built: Built) -> list[RenderableType]:
    """Each runtime's files; where there are several, that they hold the same numbers."""
    exports = next((step.record.get("exports") for step in built.steps if step.name == "export"), None)
    if not exports:
        return [Text.assemble("where    ", (str(order.out), "bold"))]
    table = console.table("For", "Where", ">Size", "Its numbers")
    size = next(step.record["artifact_bytes"] for step in built.steps if step.name == "plan")
    clients = "no runtime as it is" if _only_exported(plan) else "vLLM, SGLang, transformers"
    table.add_row(clients, console.plain(order.out), human_bytes(size), "solved")
    for name, made in exports.items():
        for text in made["warnings"]:
            console.warning(f"{name}: {text}")
        compared = f"the same, compared ({made['proved_by']})"
        table.add_row(made["clients"], console.plain(made["out"]), human_bytes(made["artifact_bytes"]), compared)
    count = "both" if len(exports) == 1 else "all three"
    return ["", table, "", f"numbers  the same in {count}: one solve, each weight compared with the artifact's", ""]


def _whereabouts(plan: Plan, order: Order, built: Built) -> list[RenderableType]:
    """Where the result is, and what to type next."""
    from l4pack.budget.serve import on_lines
    from l4pack.build import export_place

    serve = next((step.record.get("serve") for step in built.steps if step.name == "budget"), None)
    place = export_place(order.out, order.exports[0]) if order.exports and _only_exported(plan) else order.out
    how = on_lines(serve) if serve else f"l4pack budget {place} --device NAME"
    # As text, not markup, in which a backslash at a line's end is doubled.
    return [
        *_places(plan, order, built),
        Text("serve    " + "\n         ".join(how.splitlines()), no_wrap=True),
        Text(f"publish  l4pack push {order.out} ORG/NAME --dry-run", no_wrap=True),
    ]
