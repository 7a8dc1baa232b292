"""The whole chain on one source: fit if asked for, plan, quantize, verify, budget, evaluate, package, export, push.

A step is left out when its result is there and still valid: results are kept beside the artifact, each bound to a
digest of everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from l4pack import __version__
from l4pack.artifact.contents import recorded_digest
from l4pack.artifact.made import build_state, made_record
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.files import CONTAINERS
from l4pack.budget.load import Load
from l4pack.budget.model import budget
from l4pack.budget.named import open_subject
from l4pack.budget.record import budget_record
from l4pack.budget.serve import serve_command
from l4pack.budget.solve import limits as budget_limits
from l4pack.budget.subject import Subject
from l4pack.checkpoint.source import Checkpoint, open_folder
from l4pack.datafile import small_object
from l4pack.errors import BudgetError, L4packError
from l4pack.evaluate.gates import judge, limits_of, require
from l4pack.evaluate.record import find, read_evaluations, write_accuracy
from l4pack.fit.budgets import ANY, Wish
from l4pack.fit.fit import fit
from l4pack.fit.record import fit_record, read_fit
from l4pack.fit.units import RUNTIMES
from l4pack.measure.identity import model_fingerprint
from l4pack.plan.plan import Plan
from l4pack.plan.summary import plan_record
from l4pack.publish.ahead import Refusal
from l4pack.publish.publish import Wishes, address_card, check_ready, package_artifact, plan_push, push_artifact
from l4pack.publish.upload import Destination, Uploaded
from l4pack.quantize.accelerator import quantizer
from l4pack.quantize.run import run_plan
from l4pack.recipe import Gates
from l4pack.timing.jobs import NO_TALK, Talk, both_weights, layer_weights
from l4pack.timing.speeds import Prediction, joined
from l4pack.units import human_bytes, human_gib, human_seconds
from l4pack.verify.verify import verify_artifact
from l4pack.work.files import write_atomic
from l4pack.work.folder import FETCHED, is_marked, remove_all
from l4pack.work.progress import Shown
from l4pack.work.signals import stop_signals

if TYPE_CHECKING:
    from l4pack.cluster.cluster import Cluster
    from l4pack.evaluate.evaluate import PreparedEvaluation
    from l4pack.measure.record import Sensitivity
    from l4pack.stream.visitor import Progress
    from l4pack.text.choice import TextChoice


class Outcome(StrEnum):
    """What became of a step."""

    DONE = "done"
    KEPT = "kept"
    NOT_ASKED = "not asked"
    FAILED = "failed"


class Watched(Protocol):
    """Something that shows how many bytes are done."""

    @property
    def shown(self) -> Shown:
        """What is told."""
        ...


Watch = Callable[[str, int], AbstractContextManager[Watched]]


@dataclass(frozen=True)
class Order:
    """What to build. A device, context or gate left None is the recipe's promise's, where it makes one."""

    out: Path
    compute: str
    text: TextChoice | None  # None: accuracy is not measured
    device: str | None = None
    context: int | None = None
    sequences: int | None = None
    kv_dtype: str | None = None
    gates: Gates = field(default_factory=Gates)
    wishes: Wishes = field(default_factory=Wishes)
    push: Destination | None = None
    max_ram: int | None = None  # bytes, of every step; the plan was made for it too
    max_vram: int | None = None
    restart: bool = False
    dry_run: bool = False  # stop after the plan
    talk: Talk = NO_TALK  # what both models say is recorded
    predicted: Mapping[str, Prediction] = field(default_factory=dict)  # of the steps that take long
    refused: Sequence[Refusal] = ()  # what packaging the artifact will refuse
    cluster: Cluster | None = None
    exports: tuple[str, ...] = ()  # containers to put the artifact into too
    runtime: str = RUNTIMES[0]  # whose memory is counted
    gpu_layers: int | None = None

    def sample(self, plan: Plan) -> dict[str, int] | None:
        """What the sample takes; None where none is asked for."""
        return self.talk.record(plan.checkpoint.config.text, both_weights(plan))


@dataclass(frozen=True)
class Step:
    """One step's outcome: a line for people and a record for machines."""

    name: str
    outcome: Outcome
    seconds: float
    summary: str
    record: Mapping[str, Any]


@dataclass
class Built:
    """The steps done, and the error that ended the chain, if one did."""

    steps: list[Step] = field(default_factory=list)
    error: L4packError | None = None

    def record(self) -> dict[str, Any]:
        """One key a step."""
        return {
            step.name: {"outcome": step.outcome.value, "seconds": step.seconds, **step.record} for step in self.steps
        }


def fetch_folder(out: Path) -> Path:
    """Where the shards of a Hub source lie that is fetched as it is read, for all steps of the chain that makes `out`."""
    return out.with_name(f"{out.name}.fetched")


def export_place(out: Path, container: str) -> Path:
    """Where the chain that makes `out` puts the same numbers for another runtime."""
    return out.with_name(f"{out.name}-{container}")


def fit_recipe(checkpoint: Checkpoint, sensitivity: Sensitivity, wish: Wish, out: Path) -> tuple[Step, Path]:
    """Choose schemes for an artifact `out` and write the recipe beside it, or keep the one that was written for the same.

    Raises UsageError, BudgetError and SourceError, as `fit` does.
    """
    started = time.monotonic()
    recipe, kept = out.with_name(f"{out.name}.recipe.yaml"), out.with_name(f"{out.name}.fit.json")
    asked = [__version__, model_fingerprint(checkpoint), sensitivity.model_dump_json(), repr(wish)]
    record, outcome = read_fit(kept), Outcome.KEPT
    if record is None or record.key != _fit_key(asked, recipe):
        fitted = fit(checkpoint, sensitivity, wish, out.name)
        write_atomic(recipe, fitted.recipe_text.encode())
        record = fit_record(fitted, recipe).model_copy(update={"key": _fit_key(asked, recipe)})
        write_atomic(kept, record.to_json())
        outcome = Outcome.DONE
    summary = f"predicted KL {record.predicted_kl:.4g} in {human_bytes(record.artifact_bytes)}: {record.budget}"
    return Step("fit", outcome, time.monotonic() - started, summary, record.model_dump(mode="json")), recipe


def _fit_key(asked: list[str], recipe: Path) -> str | None:
    """Digest of what was asked and of the recipe that answers it; None when the recipe is gone."""
    try:
        return hashlib.sha256("\n".join([*asked, recipe.read_text()]).encode()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return None


def build(plan: Plan, order: Order, watch: Watch, before: Sequence[Step] = ()) -> Built:
    """Run the chain after the steps done `before`; stops at the first step that fails and keeps its error."""
    chain = _Chain(plan, order, watch)
    built = Built([*before])
    for name, step in chain.steps().items():
        started = time.monotonic()
        try:
            outcome, summary, record = step()
        except L4packError as error:
            seconds = time.monotonic() - started
            built.steps.append(Step(name, Outcome.FAILED, seconds, error.message, {"error": error.message}))
            built.error = error
            break
        if name in order.predicted:
            record = {**record, "predicted_seconds": order.predicted[name].seconds}
        built.steps.append(Step(name, outcome, time.monotonic() - started, summary, record))
    else:
        _drop_fetched(order.out)
    return built


def _drop_fetched(out: Path) -> None:
    """Remove what was fetched for the chain; after a step that failed it stays, for the next try."""
    folder = fetch_folder(out)
    if is_marked(folder, FETCHED):
        remove_all([folder])


StepResult = tuple[Outcome, str, Mapping[str, Any]]
NOT_ASKED: StepResult = (Outcome.NOT_ASKED, "not asked for", {})


class _Chain:
    def __init__(self, plan: Plan, order: Order, watch: Watch) -> None:
        self._plan, self._order, self._watch = plan, order, watch
        self._promise = plan.recipe.promise

    def steps(self) -> dict[str, Callable[[], StepResult]]:
        """The steps in order."""
        plan = {"plan": self._show_plan}
        return (
            plan
            if self._order.dry_run
            else plan
            | {
                "quantize": self._quantize,
                "verify": self._verify,
                "budget": self._budget,
                "evaluate": self._evaluate,
                "package": self._package,
                "export": self._export,
                "push": self._push,
            }
        )

    def _show_plan(self) -> StepResult:
        plan = self._plan
        if self._order.text is not None and not plan.checkpoint.bare:
            _check_text(plan.checkpoint, self._order.text)
        summary = f"{plan.artifact_bytes:,} bytes to come, {human_bytes(plan.peak_ram_bytes)} of memory needed"
        predicted = joined(list(self._order.predicted.values())).record() if self._order.predicted else None
        return (
            Outcome.DONE,
            summary,
            {
                **plan_record(plan),
                "sample": self._order.sample(plan),
                "refused_later": [one.record() for one in self._order.refused],
                "predicted": predicted,
            },
        )

    def _quantize(self) -> StepResult:
        plan, order = self._plan, self._order
        with self._watch("quantizing", plan.read_bytes) as bar:
            if order.cluster is not None:
                order.cluster.show_on(bar.shown.label, bar.shown.step)
            result = run_plan(
                plan,
                order.out,
                restart=order.restart,
                quantize=quantizer(order.compute),
                shown=bar.shown,
                device=order.compute,
                cluster=order.cluster,
            )
        record = {"out": str(order.out), "peak_rss_bytes": result.peak_rss_bytes, "bytes_read": result.read_bytes}
        if result.already_done:
            return Outcome.KEPT, "the artifact was there", record
        if not result.resumed_bytes:
            self._remember(small_object(build_state(order.out)) | made_record(order.out, result.seconds))
        rate = human_bytes(result.read_bytes / max(result.seconds, 1e-9))
        summary = f"{human_seconds(result.seconds)}, {rate}/s, peak memory {human_bytes(result.peak_rss_bytes)}"
        return Outcome.DONE, summary, record

    def _verify(self) -> StepResult:
        key = self._key([self._plan.checkpoint.fingerprint()])
        state = small_object(build_state(self._order.out))
        summary = "every tensor holds against the source"
        if state.get("verify") == key:
            return Outcome.KEPT, summary, {"ok": True}
        with self._watch("verifying", sum(shard.nbytes for shard in self._plan.shards)) as bar:
            result = verify_artifact(self._order.out, self._plan.checkpoint, advance=bar.shown.advance)
        errors = [finding for finding in result.findings if finding.level == "error"]
        if not result.ok:
            first = f"{errors[0].where}: {errors[0].message}" if errors else "nothing could be checked"
            raise L4packError(first, hint=f"l4pack verify {self._order.out} lists all {len(errors)} findings")
        self._remember(state | {"verify": key})
        summary = f"{summary}: {result.checked.tally.matrices} quantized matrices and all others"
        return Outcome.DONE, summary, {"ok": True}

    def _budget(self) -> StepResult:
        order, promise = self._order, self._promise
        device = order.device or (promise.device if promise else None)
        if device is None:
            return NOT_ASKED
        load = Load(
            context=order.context or (promise.context if promise else None),
            sequences=order.sequences or (promise.sequences if promise else 1),
            kv_dtype=order.kv_dtype or (promise.kv_dtype if promise else "auto"),
            gpu_layers=order.gpu_layers,
        )
        subject, runtime = self._loaded()
        found = budget(subject, find_host(device, load_devices()), load, runtime)
        if not found.fits:
            raise BudgetError(
                f"{found.setting.context:,} tokens on {device} {found.lacking('lack')}",
                hint=f"l4pack budget {order.out} --device {device} says what would fit",
            )
        record = {**budget_record(found, budget_limits(found)), "serve": serve_command(found, str(order.out))}
        summary = f"fits {device}, {human_gib(found.headroom_bytes)} to spare, up to {record['max_context']:,} tokens"
        return Outcome.DONE, summary, record

    def _loaded(self) -> tuple[Subject, str]:
        """What the runtime loads, the artifact or the export to come, and the runtime whose memory is counted."""
        order, artifact = self._order, open_subject(str(self._order.out))
        only = artifact.exported_for
        runtime = order.runtime if only is None or order.runtime in CONTAINERS else only.runtime
        if runtime not in CONTAINERS:
            return artifact, RUNTIMES[0] if runtime == ANY else runtime
        from l4pack.export.ahead import planned_export

        subject = planned_export(self._plan, runtime).subject
        folder = export_place(order.out, CONTAINERS[runtime])
        tower = None if subject.tower is None else folder / subject.tower
        return replace(subject, path=folder / subject.path, tower=tower), runtime

    def _evaluate(self) -> StepResult:
        order, text, out = self._order, self._order.text, self._order.out
        if text is None:
            return NOT_ASKED
        from l4pack.stream.visitor import Progress

        with self._watch("evaluating", self._evaluated_bytes()) as bar, stop_signals() as stop:
            prepared = self._prepared(text, Progress.of(bar.shown, stop))
            record = find(read_evaluations(out), prepared.identity.digest)
            outcome = Outcome.DONE if record is None else Outcome.KEPT
            if order.cluster is not None:
                order.cluster.show_on(bar.shown.label, bar.shown.step)
            record = prepared.run(order.cluster) if record is None else record
            prepared.add_sample(record)
        asked = self._gates()
        write_accuracy(out, record, asked, {})
        require(judge(record, limits_of(asked, {})))
        brief = {name: value for name, value in record.items() if name not in ("layers", "worst")}
        return outcome, accuracy_line(record), brief

    def _gates(self) -> Gates:
        promised = self._promise.gates.model_dump(exclude_none=True) if self._promise else {}
        return Gates(**{**promised, **self._order.gates.model_dump(exclude_none=True)})

    def _evaluated_bytes(self) -> int:
        from l4pack.evaluate.evaluate import total_bytes

        models = open_folder(self._order.out), self._plan.checkpoint
        said = self._order.talk.walked_bytes([layer_weights(one) for one in models])
        return total_bytes(*models) + said

    def _prepared(self, text: TextChoice, progress: Progress) -> PreparedEvaluation:
        """The evaluation this order asks for; the step before has held the weights against the manifest."""
        from l4pack.evaluate.evaluate import prepare_evaluation
        from l4pack.evaluate.inputs import EvaluationSettings

        out = self._order.out
        settings = EvaluationSettings(
            work=out.with_name(f"{out.name}.evaluate.partial"),
            text=text,
            compute=self._order.compute,
            max_ram=self._order.max_ram,
            max_vram=self._order.max_vram,
            sample_tokens=self._order.talk.tokens,
        )
        return prepare_evaluation(open_folder(out), self._plan.checkpoint, settings, progress, recorded_digest(out))

    def _package(self) -> StepResult:
        packaged = package_artifact(self._order.out, self._plan.checkpoint, self._order.wishes)
        record = {"name": packaged.name, "written": list(packaged.written)}
        outcome = Outcome.DONE if packaged.written else Outcome.KEPT
        return outcome, f"{packaged.name}: {packaged.audit.policy.title}, {packaged.audit.duties} duties met", record

    def _export(self) -> StepResult:
        order = self._order
        if not order.exports:
            return NOT_ASKED
        from l4pack.export.known import target_named
        from l4pack.export.plan import plan_export
        from l4pack.export.publish import open_export, package_export
        from l4pack.export.run import run_export

        wishes = replace(order.wishes, name=None, template=None)  # those are the artifact's
        made, outcome, weights = {}, Outcome.KEPT, 0
        for name in order.exports:
            plan = plan_export(open_folder(order.out), target_named(name), max_ram=order.max_ram)
            weights = max(weights, plan.weights)
            with self._watch(f"exporting {name}", plan.read_bytes) as bar:
                result = run_export(plan, export_place(order.out, name), restart=order.restart, shown=bar.shown)
            outcome = outcome if result.proof is None else Outcome.DONE
            packaged = package_export(open_export(result.out, order.out), self._plan.checkpoint, wishes)
            made[name] = {
                "out": str(result.out),
                "name": packaged.name,
                "clients": plan.target.clients,
                "artifact_bytes": plan.artifact_bytes,
                "proved_by": plan.target.proved_by,
                "peak_rss_bytes": result.peak_rss_bytes,
                "warnings": list(plan.warnings),
            }
        names = " and ".join(name.upper() for name in made) + (" hold" if len(made) > 1 else " holds")
        return outcome, f"{names} the artifact's numbers: all {weights:,} weights compared", {"exports": made}

    def _push(self) -> StepResult:
        target = self._order.push
        if target is None:
            return NOT_ASKED
        check_ready(self._order.out, target.repo_id.rpartition("/")[2], gated=target.gated)
        done = self._send(self._order.out, target, None)
        exports = {name: self._push_export(name, target) for name in self._order.exports}
        record = {"url": done.url, "commit": done.commit, "exports": exports}
        return (
            Outcome.DONE,
            "; ".join([f"{done.url} at {done.commit}", *(one["url"] for one in exports.values())]),
            record,
        )

    def _push_export(self, container: str, target: Destination) -> dict[str, str]:
        """An export goes beside its artifact, to a repository of that name with `-GGUF` or `-MLX`."""
        from l4pack.export.publish import check_export_ready, open_export
        from l4pack.publish.export_card import suffixed

        beside = replace(target, repo_id=suffixed(target.repo_id, container))
        export = open_export(export_place(self._order.out, container), self._order.out)
        check_export_ready(export, beside.repo_id.rpartition("/")[2], gated=target.gated)
        done = self._send(export.folder, beside, export.names)
        return {"url": done.url, "commit": done.commit}

    def _send(self, folder: Path, target: Destination, names: Collection[str] | None) -> Uploaded:
        address_card(folder, target.repo_id)
        plan = plan_push(folder, target, names)
        with self._watch("uploading", plan.send_bytes) as bar:
            return push_artifact(plan, advance=bar.shown.advance)

    def _remember(self, state: Mapping[str, Any]) -> None:
        write_atomic(build_state(self._order.out), (json.dumps(state, indent=1) + "\n").encode())

    def _key(self, depends_on: list[str]) -> str:
        """Digest of this version, the planned files as they lie there, and what else a step depends on."""
        parts = [__version__, *depends_on]
        for name in sorted(self._plan.files):
            status = (self._order.out / name).stat()
            parts.append(f"{name} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_text(checkpoint: Checkpoint, text: TextChoice) -> None:
    """Raise what evaluation would raise about its text, before hours of work."""
    from l4pack.text.images import ImageReader
    from l4pack.text.sequences import load_text
    from l4pack.text.tokenizer import load_tokenizer

    longest = checkpoint.config.text.max_position_embeddings
    load_text(text, load_tokenizer(checkpoint), longest, ImageReader(checkpoint))


def accuracy_line(record: Mapping[str, Any]) -> str:
    """What an evaluation found, in a line."""
    error = record.get("kl_standard_error")
    spread = "" if error is None else f" ± {error:.5f}"
    return (
        f"KL {record['kl_mean']:.5f}{spread}, same likeliest token {100 * record['top1_agreement']:.2f} %, perplexity "
        f"{record['perplexity_reference']:.3f} -> {record['perplexity_artifact']:.3f} on {record['tokens']:,} tokens"
    )
