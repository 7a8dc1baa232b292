"""The steps as functions: `l4pack.plan`, `l4pack.quantize` and so on do what the commands of these names do.

What they raise on purpose is an `l4pack.errors.L4packError`, with `message`, `hint` and `exit_code`. Nothing is printed, and
nothing slow is imported before a function needs it. Sizes are bytes, and may be given as text, such as `"4GB"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from l4pack.budget.answer import Answer
    from l4pack.dequantize.run import DequantizeResult
    from l4pack.evaluate.inputs import EvaluationSettings
    from l4pack.evaluate.schema import Evaluation
    from l4pack.export.run import ExportResult
    from l4pack.plan.plan import Plan
    from l4pack.publish.publish import Packaged
    from l4pack.publish.upload import Uploaded, UploadPlan
    from l4pack.quantize.run import RunResult
    from l4pack.recipe import Gates
    from l4pack.verify.verify import Verification
    from l4pack.work.progress import Shown

Place = str | PathLike[str]
Size = int | str
Advance = Callable[[int], None]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _naming_what_lacks(step: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, but a library that a light install leaves out is named with the extra that brings it."""

    @wraps(step)
    def run(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return step(*args, **options)
        except ModuleNotFoundError as error:
            from l4pack.extras import missing_part

            missing = missing_part(error)
            if missing is None:
                raise
            raise missing from error

    return run


@_naming_what_lacks
def inspect(source: Place, *, include: Sequence[str] = (), companions: Place | None = None) -> dict[str, Any]:
    """Say what a checkpoint is, from its headers alone; the object that `l4pack inspect --json` prints.

    `source` is a folder, `ORG/NAME[@REVISION]` on the Hub, a bare `config.json`, `llama-4-scout`, `llama-4-maverick` or
    `demo`; `include` are patterns of files to carry beside those that are known. `companions` is a folder or a repository
    that has tokenizer, processor and config.json where the weights lie alone. Raises SourceError, HubError.

    >>> found = l4pack.inspect("demo")
    >>> found["layers"], found["experts"], found["weight_bytes"]
    (4, 6, 15138816)
    """
    from l4pack.checkpoint.open import open_source
    from l4pack.plan.summary import checkpoint_record

    return checkpoint_record(open_source(str(source), include=include, companions=_text(companions)))


@_naming_what_lacks
def plan(
    source: Place,
    recipe: Place = "int4",
    *,
    calibration: Place | None = None,
    calibration_samples: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    max_ram: Size | None = None,
    max_vram: Size | None = None,
    shard_size: Size | None = None,
    compute: str = "auto",
    include: Sequence[str] = (),
    companions: Place | None = None,
    keep_float32: bool = False,
    allow_requantize: bool = False,
) -> Plan:
    """Know every output byte and what the job takes, before the first weight is read.

    `recipe` is a shipped one's name or a YAML file. `calibration` is a text, which is read and tokenized here;
    `calibration_samples` of it at most, of `sequence_length` tokens. `allow_requantize` takes an artifact for a source, which a
    release in FP8 is without it. `compute` is `cpu`, `cuda`, `cuda:N` or `auto`.

    Raises SourceError (damaged, incomplete or quantized already), RecipeError (a rule that matches nothing, a group that
    does not divide), BudgetError (`max_ram` or `max_vram` is too little), UsageError, HubError.

    >>> planned = l4pack.plan("llama-4-scout", "int4-rtn")
    >>> planned.weight_bytes, round(planned.bits_per_weight, 3)
    (64873104640, 4.125)
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.calibration.text import with_text
    from l4pack.containers.safetensors_folder import DEFAULT_SHARD_BYTES
    from l4pack.plan.limits import limits_here
    from l4pack.plan.plan import make_plan
    from l4pack.recipe import load_recipe
    from l4pack.work.device import chosen

    limits = limits_here(
        chosen(compute),
        max_ram=_nbytes(max_ram),
        max_vram=_nbytes(max_vram),
        shard_bytes=_nbytes(shard_size) or DEFAULT_SHARD_BYTES,
    )
    wanted = (
        load_recipe(str(recipe))
        .keeping(float32=keep_float32)
        .calibrating(calibration is not None, samples=calibration_samples, sequence_length=sequence_length, seed=seed)
    )
    opened = open_original(str(source), include=include, companions=_text(companions), requantize=allow_requantize)
    made = make_plan(opened, wanted, limits)
    return made if calibration is None or made.needs is None else with_text(made, str(calibration))


@_naming_what_lacks
def quantize(
    source: Place | Plan,
    out: Place,
    recipe: Place = "int4",
    *,
    compute: str = "auto",
    restart: bool = False,
    advance: Advance | None = None,
) -> RunResult:
    """Write the artifact to the folder `out`, which appears when it is complete; the same call goes on after a kill.

    `source` is what `plan` takes, or a plan, whose recipe and limits then hold. `advance` is told bytes of the source as
    they are done, `read_bytes` of the plan in all.

    Raises what `plan` does; UsageError (`out` is taken, or the work begun there is another's), BudgetError (memory, disk),
    QualityError (a gate on calibration), StoppedError (a signal asked to stop; the same call goes on).

    >>> made = l4pack.quantize("demo", "demo-int4", "int4-rtn")
    >>> made.out.name, made.already_done
    ('demo-int4', False)
    """
    from l4pack.plan.plan import Plan
    from l4pack.quantize.accelerator import quantizer
    from l4pack.quantize.run import run_plan
    from l4pack.work.device import chosen

    planned = source if isinstance(source, Plan) else plan(source, recipe, compute=compute)
    device = chosen(compute)
    _check_device(planned, device)
    planned.check_servable()
    return run_plan(
        planned, Path(out), restart=restart, quantize=quantizer(device), shown=_shown(advance), device=device
    )


@_naming_what_lacks
def verify(
    artifact: Place,
    against: Place | None = None,
    *,
    sample: int | None = None,
    headers_only: bool = False,
    advance: Advance | None = None,
) -> Verification:
    """Check every tensor, file and statement of an artifact, and with `against` hold each weight against its source.

    An artifact may be `ORG/NAME[@REVISION]` on the Hub. `sample` compares so many matrices instead of all; `headers_only`
    reads no tensor. `advance` is told bytes of tensors as they are checked. What is wrong is in `findings`, not raised.
    Raises SourceError (it can't be opened), UsageError, HubError.

    >>> checked = l4pack.verify("demo-int4", against="demo")
    >>> checked.ok, checked.findings
    (True, ())
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.artifact.published import look
    from l4pack.errors import UsageError
    from l4pack.verify.verify import verify_artifact

    if against is None and sample is not None:
        raise UsageError("sample needs a source to compare with", hint="give against=")
    if against is not None and headers_only:
        raise UsageError("headers_only reads nothing to hold against a source", hint="leave one of the two out")
    source = None if against is None else open_original(str(against), requantize=True)
    with look(str(artifact), weights=not headers_only) as looked:
        return verify_artifact(looked.folder, source, sample, advance, headers_only=headers_only)


@_naming_what_lacks
def budget(
    source: Place,
    recipe: Place | None = None,
    *,
    device: str | None = None,
    context: int | None = None,
    sequences: int | None = None,
    kv_dtype: str | None = None,
    runtime: str = "vllm",
    devices: Place | None = None,
    tp: int | None = None,
    pp: int | None = None,
    expert_parallel: bool = False,
    hybrid: bool | None = None,
    batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    max_positions: int | None = None,
    images: int | None = None,
    utilization: float | None = None,
) -> Answer:
    """Say whether a model fits a device, with what to spare, and if not, what would.

    `source` is an artifact, or what `plan` takes, as it is or under a `recipe`; a recipe that promises a model and a device
    stands for both, and fills in what is not said. `device` is such as `h100` or `8xh100`, one of yours where the file
    `devices` has it. `context` is in tokens of one sequence, `kv_dtype` `bfloat16`, `fp8` or `auto`. What stands after
    `devices` the runtime chooses unless it is given: degrees of parallelism, tokens of a batch, most sequences and positions,
    images of a prompt, the share of memory that is used.

    Raises SourceError, RecipeError, and UsageError for a device that is not known or a load that can't be.

    >>> answer = l4pack.budget("scout-int4-1xh100")
    >>> answer.fits, answer.max_context
    (True, 77536)
    >>> l4pack.budget("llama-4-scout", device="h100").fits
    False
    """
    from l4pack.budget.answer import answer
    from l4pack.budget.devices import load_devices
    from l4pack.budget.load import Load
    from l4pack.budget.named import Asked

    load = Load(
        context, sequences or 1, kv_dtype or "auto", tp, pp, expert_parallel, hybrid, batched_tokens, max_num_seqs,
        max_positions, images, utilization,
    )  # fmt: skip
    named = None if recipe is None else str(recipe)
    known = load_devices(None if devices is None else Path(devices))
    return answer(Asked(str(source), named, device, load, sequences, kv_dtype), runtime, known)


@_naming_what_lacks
def evaluate(
    artifact: Place,
    against: Place | None = None,
    *,
    text: Place = "demo",
    samples: int = 32,
    sequence_length: int | None = None,
    seed: int = 0,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    gates: Mapping[str, float] | None = None,
    weights_only: bool = False,
    compute: str = "auto",
    max_ram: Size | None = None,
    max_vram: Size | None = None,
    restart: bool = False,
    advance: Advance | None = None,
) -> Evaluation:
    """Compare an artifact with its original on held-out text, layer by layer, and keep the record in the artifact's folder.

    `samples` sequences of `sequence_length` tokens are taken of `text`; `tasks` are files of questions or tasks of
    lm-evaluation-harness, with `limit` questions each at most. `gates` are `max_kl`, `min_agreement` and
    `max_perplexity_ratio`. KL divergence is in nats a token, of the original from the artifact. `advance` is told bytes of
    weights as they are passed. An interrupted call goes on at the last finished layer.

    Raises QualityError where a gate is missed (the record is kept), SourceError, UsageError (text, or another model than
    the original), BudgetError, StoppedError.

    >>> measured = l4pack.evaluate("demo-int4", against="demo", samples=2, sequence_length=256)
    >>> measured.tokens, 0 < measured.kl_mean < 0.05
    (510, True)
    """
    from l4pack.evaluate.gates import asked_gates
    from l4pack.evaluate.inputs import EvaluationSettings, split_tasks
    from l4pack.text.choice import TextChoice
    from l4pack.work.files import path_beside

    folder, asked = Path(artifact), asked_gates(**(gates or {}))
    questions, harness = split_tasks(tasks)
    settings = EvaluationSettings(
        work=path_beside(folder, ".evaluate.partial"),
        text=TextChoice(str(text), samples, sequence_length, seed),
        tasks=questions,
        harness=harness,
        limit=limit,
        compute=compute,
        max_ram=_nbytes(max_ram),
        max_vram=_nbytes(max_vram),
        weights_only=weights_only,
        restart=restart,
    )
    return _measured(folder, _text(against), settings, asked, advance)


def _measured(
    folder: Path, against: str | None, settings: EvaluationSettings, gates: Gates, advance: Advance | None
) -> Evaluation:
    """Evaluate, keep the record, and hold it against the gates."""
    from l4pack.artifact.as_source import open_original
    from l4pack.checkpoint.source import open_folder
    from l4pack.evaluate.evaluate import evaluate as measure
    from l4pack.evaluate.gates import judge, limits_of, require
    from l4pack.evaluate.record import read_evaluations, write_accuracy
    from l4pack.evaluate.schema import parse_evaluation
    from l4pack.stream.visitor import Progress
    from l4pack.work.signals import stop_signals

    read_evaluations(folder)  # what can't be added to is said before the work, not after it
    original = None if against is None else open_original(against, requantize=True)
    with stop_signals() as stop:
        record = measure(open_folder(folder), original, settings, Progress.of(_shown(advance), stop))
    write_accuracy(folder, record, gates, {})
    require(judge(record, limits_of(gates, {})))
    return parse_evaluation(record, str(folder))


@_naming_what_lacks
def export(
    artifact: Place,
    out: Place,
    to: str,
    *,
    split: Size | None = None,
    lossy: bool = False,
    round_embeddings: bool = False,
    max_ram: Size | None = None,
    restart: bool = False,
    advance: Advance | None = None,
) -> ExportResult:
    """Put an artifact into `gguf` or `mlx` files without rounding again, and prove that they hold its numbers.

    `split` is the most bytes of a file; `lossy` rounds what the container can't carry, and says so; `round_embeddings` rounds the
    embedding and the head to eight bits. `advance` is told bytes as they are read. Raises UsageError (it can't be carried exactly, or `out` is taken), SourceError, BudgetError, StoppedError.

    >>> exported = l4pack.export("demo-int4", "demo-mlx", "mlx")
    >>> exported.proof.rounded, exported.proof.largest_error
    (0, 0.0)
    """
    from l4pack.checkpoint.open import open_source
    from l4pack.export.known import target_named
    from l4pack.export.plan import plan_export
    from l4pack.export.run import run_export

    planned = plan_export(
        open_source(str(artifact)),
        target_named(to),
        split=_nbytes(split),
        lossy=lossy,
        round_embeddings=round_embeddings,
        max_ram=_nbytes(max_ram),
    )
    return run_export(planned, Path(out), restart=restart, shown=_shown(advance))


@_naming_what_lacks
def dequantize(
    artifact: Place,
    out: Place,
    *,
    shard_size: Size | None = None,
    max_ram: Size | None = None,
    restart: bool = False,
    advance: Advance | None = None,
) -> DequantizeResult:
    """Write an artifact, or a release in FP8, as a 16-bit checkpoint in the layout that Llama 4 is released in.

    Weights are the products of codes and scales in float32, rounded once. `shard_size` is the most bytes of tensors in a file.
    `advance` is told bytes as they are read. Raises SourceError (a scale that is no number, a layout that is not read),
    UsageError (not quantized, or `out` is taken), BudgetError, HubError, StoppedError.

    >>> dequantized = l4pack.dequantize("demo-int4", "demo-bf16")
    >>> dequantized.already_done
    False
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.dequantize.plan import plan_dequantize
    from l4pack.dequantize.run import run_dequantize

    planned = plan_dequantize(
        open_original(str(artifact), requantize=True), shard_bytes=_nbytes(shard_size), max_ram=_nbytes(max_ram)
    )
    return run_dequantize(planned, Path(out), restart=restart, shown=_shown(advance))


@_naming_what_lacks
def package(
    artifact: Place,
    source: Place | None = None,
    *,
    name: str | None = None,
    base_model: str | None = None,
    template: Place | None = None,
    gated: bool = False,
    of: Place | None = None,
) -> Packaged:
    """Put licence, notice, model card and name into an artifact's folder, all checked; `push` asks for them.

    An export's folder too, with `of` the artifact that it was made from.
    Licence files come from `source`, or from the repository that the artifact's manifest or `base_model` names.
    Raises LicenceError (a duty or the name), UsageError, SourceError, HubError.

    >>> packaged = l4pack.package("demo-int4", source="demo")
    >>> packaged.name
    'demo-W4A16-g128'
    """
    from l4pack.artifact.as_source import open_original
    from l4pack.export.publish import find_export, package_export
    from l4pack.publish.publish import Wishes, package_artifact

    original = None if source is None else open_original(str(source), requantize=True)
    wishes = Wishes(name, base_model, None if template is None else Path(template), gated)
    export = find_export(Path(artifact), None if of is None else Path(of))
    if export is not None:
        return package_export(export, original, wishes)
    return package_artifact(Path(artifact), original, wishes)


@dataclass(frozen=True)
class Pushed:
    """A push: what was checked in words, what it was to do, and what it did (None: it was a dry run)."""

    ready: tuple[str, ...]
    plan: UploadPlan
    done: Uploaded | None


@_naming_what_lacks
def push(
    artifact: Place,
    repository: str,
    *,
    public: bool = False,
    revision: str = "main",
    pull_request: bool = False,
    tag: str | None = None,
    collection: str | None = None,
    gated: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    of: Place | None = None,
    advance: Advance | None = None,
) -> Pushed:
    """Upload a packaged artifact to `ORG/NAME` on the Hub once verify, licence, gates and budget pass; compare every digest.

    The token is the one that `hf auth login` or HF_TOKEN gives. `dry_run` changes nothing, and says what would happen.
    `of` is the artifact where `artifact` is an export of it. `advance` is told bytes as they are sent. The same call goes on
    after any interruption.

    Raises LicenceError, BudgetError, QualityError, L4packError (what `verify` found), HubError, UsageError.

    >>> pushed = l4pack.push("demo-int4", "me/demo-W4A16-g128", dry_run=True)
    >>> pushed.plan.private, pushed.plan.exists, pushed.done
    (True, False, None)
    """
    from l4pack.export.publish import check_export_ready, find_export
    from l4pack.publish.publish import address_card, check_ready, plan_push, push_artifact, who_pushes
    from l4pack.publish.upload import Destination

    folder, name = Path(artifact), repository.rpartition("/")[2]
    target = Destination(repository, revision, public, pull_request, overwrite, gated, tag, collection)
    export = find_export(folder, None if of is None else Path(of))
    names = None if export is None else export.names
    ready = check_ready(folder, name, gated=gated) if export is None else check_export_ready(export, name, gated=gated)
    if dry_run:
        ready.append(f"account: {who_pushes(target)}")
    else:
        address_card(folder, repository)
    planned = plan_push(folder, target, names)
    done = None if dry_run else push_artifact(planned, advance=advance or (lambda _: None))
    return Pushed(tuple(ready), planned, done)


def _text(place: Place | None) -> str | None:
    return None if place is None else str(place)


def _nbytes(size: Size | None) -> int | None:
    from l4pack.units import parse_size

    return parse_size(size) if isinstance(size, str) else size


def _shown(advance: Advance | None) -> Shown:
    from l4pack.work.progress import Shown

    return Shown() if advance is None else Shown(advance)


def _check_device(planned: Plan, device: str) -> None:
    """Raise UsageError where a plan is for another kind of device than is to compute."""
    from l4pack.errors import UsageError
    from l4pack.work.device import CPU

    if planned.accelerated != (device != CPU):
        made_for = "a GPU" if planned.accelerated else "the CPU"
        raise UsageError(f"the plan was made for {made_for}", hint="give plan and quantize the same compute=")
