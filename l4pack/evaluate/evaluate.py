"""Evaluating an artifact: text, questions and needles through original and artifact in one pass over the weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack import __version__
from l4pack.artifact.contents import measured_digest
from l4pack.artifact.original import ORIGINAL_KEYS, check_original, original_record
from l4pack.checkpoint.apart import refuse_overlap
from l4pack.checkpoint.parts import weight_parts
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.evaluate.answers import Answers
from l4pack.evaluate.desk import model_of
from l4pack.evaluate.forward import Forward, Here
from l4pack.evaluate.generate import Asking
from l4pack.evaluate.harness import task_manager
from l4pack.evaluate.harness_run import Harness
from l4pack.evaluate.harness_suite import HARNESS_SUITES, AskedTasks, asked_tasks
from l4pack.evaluate.inputs import STREAMED, EvaluationInputs, EvaluationSettings
from l4pack.evaluate.layer_errors import ARTIFACTS, SAMPLED_ROWS, LayerErrors, worst_units
from l4pack.evaluate.needle import Needle, needle_sequences, needles
from l4pack.evaluate.outcome import ARTIFACT, ORIGINAL, Scored, run_record, scores_record, task_digest
from l4pack.evaluate.reference import StoredReference, claim_reference, load_reference, save_reference
from l4pack.evaluate.refusals import REFUSALS, asked_requests, refusal_sequences, suite_digest
from l4pack.evaluate.same_model import check_not_dequantized, check_reference, check_same_model, check_same_tokens
from l4pack.evaluate.spread import Crew, SpreadForward
from l4pack.evaluate.talk import sample
from l4pack.evaluate.tasks import EvaluationTask, load_task, sequences_of
from l4pack.model.names import classify
from l4pack.model.tensors import QUANTIZABLE
from l4pack.plan.memory import BUFFERS, SPREAD_BUFFERS, Memory, computing_on, walk_within
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed
from l4pack.stream.identity import text_parts
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.stream.weights import stored_itemsize
from l4pack.text.images import ImageReader
from l4pack.text.sequences import load_text, token_digest
from l4pack.text.tokenizer import load_tokenizer
from l4pack.work import machine
from l4pack.work.folder import owned
from l4pack.work.identity import Identity
from l4pack.work.signals import check_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from l4pack.cluster.cluster import Cluster

WORK_KIND = "evaluate"


def evaluate(
    artifact: Checkpoint, original: Checkpoint | None, settings: EvaluationSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Run everything; returns one record of `accuracy.json`. Raises L4packError and its kin.

    An interrupted call with the same arguments goes on at the last finished layer, to the same numbers.
    """
    return prepare_evaluation(artifact, original, settings, progress).run()


def prepare_evaluation(
    artifact: Checkpoint,
    original: Checkpoint | None,
    settings: EvaluationSettings,
    progress: Progress | None = None,
    measured: str | None = None,
    others: Sequence[Checkpoint] = (),
) -> PreparedEvaluation:
    """Check what can be checked before the first layer, and say what the evaluation is of.

    `measured` is the artifact's `contents_digest` where it is known; else every tensor is read for it. `others` are
    artifacts that walk with it, which take memory too. Raises UsageError
    for anything but the original, for text or tasks that can't be had; SourceError.
    """
    progress = progress or Progress()
    started = time.monotonic()
    check_suites(settings.suites)
    asked = asked_tasks(settings.harness, settings.suites, streamed=settings.backend == STREAMED)
    manager = task_manager([one.task for one in asked.tasks], settings.backend) if asked.tasks else None
    if settings.save_reference is not None and (original is None or settings.reference is not None):
        raise UsageError("--save-reference needs the original", hint="add --against SOURCE")
    written = [folder for folder in (settings.work, settings.save_reference) if folder is not None]
    refuse_overlap([one for one in (artifact, original) if one is not None], *written)
    if original is not None:
        original = original.completed(artifact.config)
        check_same_model(artifact, original)
        check_original(artifact, original)
    tokenizer = _tokenizer(artifact, original)
    inputs = _inputs(artifact, original, settings, tokenizer)
    compute = Compute.of(settings.compute)
    planned, ahead = _walk_memory([artifact, *others], original, settings, inputs, compute)
    stored = None
    if settings.reference is not None:
        stored = load_reference(settings.reference, _reference_identity(inputs, original), compute.device)
        check_reference(artifact, original, stored)
    if measured is None:
        progress.label("digesting")
        measured = measured_digest(artifact, lambda: check_stop(progress.stop))
        progress.label("evaluating")
    of = _original_parts(original, stored)
    identity = Identity({"artifact": measured, **of, **_parts(inputs, settings, compute), **asked.parts()})
    return PreparedEvaluation(
        artifact,
        original,
        settings,
        progress,
        inputs,
        compute,
        planned,
        ahead,
        stored,
        asked,
        manager,
        identity,
        started,
    )


def _walk_memory(
    artifacts: Sequence[Checkpoint],
    original: Checkpoint | None,
    settings: EvaluationSettings,
    inputs: EvaluationInputs,
    compute: Compute,
) -> tuple[Memory, bool]:
    """What the walk takes, and whether a unit is loaded while another computes. Raises BudgetError where there is not
    even what it takes without."""
    walking = [*artifacts] if original is None or settings.reference is not None else [original, *artifacts]
    count, merging = len(walking), max(one.merging_bytes for one in walking)
    computing = computing_on(
        compute, artifacts[0].config, inputs.sequences, models=count, streams=count, merging=merging
    )
    stored = max(stored_itemsize(one) for one in (*artifacts, original) if one is not None)
    computing = replace(computing, tiles=compute.tiles, stored=stored)
    sampled = 2 * SAMPLED_ROWS * computing.row  # inputs and outputs
    ram, device = machine.memory(settings.max_ram), compute.device_room(settings.max_vram)
    return walk_within(computing, lambda one: one.memory(held=sampled, scored=True), ram, device)


def _original_parts(original: Checkpoint | None, stored: StoredReference | None) -> dict[str, Any]:
    """Which original, by headers and by the bytes of its small tensors, and whether its answers were kept ones."""
    if stored is not None:
        known = {key: stored.record.get(key) for key in ORIGINAL_KEYS}
        return {"original": known, "--reference": stored.record.get("storage_kl_mean")}
    return {"original": None if original is None else original_record(original), "--reference": None}


def _parts(inputs: EvaluationInputs, settings: EvaluationSettings, compute: Compute) -> dict[str, Any]:
    """What decides the figures beside the two models."""
    harness = {"--task": list(settings.harness), "--limit": settings.limit, "--backend": settings.backend}
    return {
        "l4pack version": __version__,
        **text_parts(inputs.text.record),
        **{f"--task {task.name}": task_digest(task) for task in inputs.tasks},
        "lm-eval": harness if settings.harness or set(settings.suites) & set(HARNESS_SUITES) else None,
        "--needle": settings.needle,
        **({"--suite": list(settings.suites)} if settings.suites else {}),
        **({"refusals": suite_digest()} if inputs.refusals else {}),
        "--weights-only": settings.weights_only,
        "tokens of all sequences": token_digest([sequence.tokens for sequence in inputs.sequences]),
        **compute.parts(),
    }


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation that is ready to run; `identity` is all that decides its numbers."""

    artifact: Checkpoint
    original: Checkpoint | None
    settings: EvaluationSettings
    progress: Progress
    inputs: EvaluationInputs
    compute: Compute
    planned: Memory
    ahead: bool
    stored: StoredReference | None
    asked: AskedTasks
    manager: Any
    identity: Identity
    started: float

    def disk_bytes(self, models: int, *, spread: bool) -> int:
        """What hidden states of so many models take of the disk, more where a cluster's workers run them."""
        rows = sum(len(sequence.tokens) for sequence in self.inputs.sequences)
        width, buffers = self.artifact.config.text.hidden_size, SPREAD_BUFFERS if spread else BUFFERS
        return models * buffers * rows * width * self.compute.dtype.itemsize

    def run(self, cluster: Cluster | None = None) -> dict[str, Any]:
        """Walk, score and sum up; see `evaluate`. With a `cluster`, its workers do it, to the same numbers.

        Raises UsageError and BudgetError of `spread.SpreadForward` too, and ClusterError."""
        settings = self.settings
        if settings.save_reference is not None:
            claim_reference(settings.save_reference)
        with owned(settings.work, WORK_KIND, restart=settings.restart) as folder:
            crew = None if cluster is None else Crew(cluster, self.planned)
            record = self._walk(crew)
            if self.asked.tasks:
                harness = Harness(settings, self.asked, self.compute, self.ahead, self.progress, self.manager, crew)
                harness.add(record, self.artifact, self.original)
            self.add_sample(record)
            folder.remove()
        return self.completed(record)

    def completed(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record with what hurts most, how it came about, and what it is of."""
        record["worst"] = worst_units(record["layers"])
        record["run"] = run_record(self.artifact, self.compute, self.settings, self.started, self.planned)
        record["identity"] = dict(self.identity.parts)
        return record

    def add_sample(self, record: dict[str, Any]) -> None:
        """Put what both models say into a record that has none, if it is asked for."""
        chosen = self.settings
        if not chosen.sample_tokens or record.get("sample"):
            return
        asking = Asking(chosen.sample_tokens, chosen.compute, chosen.max_ram, chosen.max_vram)
        said = sample(self.artifact, None if self.stored else self.original, asking, self.progress)
        if said is not None:
            record["sample"] = said

    def _walk(self, crew: Crew | None) -> dict[str, Any]:
        """Both models through their layers and their answers scored."""
        [(record, _)] = Pass(
            (self.artifact,),
            self.original,
            self.settings,
            self.progress,
            self.inputs,
            self.compute,
            self.ahead,
            self.stored,
            crew,
        ).run()
        return record


@dataclass(frozen=True)
class Pass:
    """The original, unless its answers are kept ones, and artifacts of it: once through all their layers and scored."""

    artifacts: tuple[Checkpoint, ...]
    original: Checkpoint | None
    settings: EvaluationSettings
    progress: Progress
    inputs: EvaluationInputs
    compute: Compute
    ahead: bool
    stored: StoredReference | None = None
    crew: Crew | None = None  # who runs the layers, if not this process

    def run(self) -> list[tuple[dict[str, Any], Scored]]:
        """Every artifact's figures, and the scores they are made of. Raises StoppedError when asked to stop; the same call
        goes on."""
        settings, stored = self.settings, self.stored
        packed = Packed(self.inputs.sequences)
        with ExitStack() as stack:
            models = [
                model_of(name, one, self.compute, stack, round_activations=not settings.weights_only)
                for name, one in self._walking().items()
            ]
            for model in models[1:]:
                check_not_dequantized(model.weights, models[0].weights)
            forward = self._forward(models, packed)
            walk = stack.enter_context(self._prepared(models, packed, forward))
            walk.run()
            self.progress.label("scoring")
            kept = None
            if settings.save_reference is not None:
                with forward.answers(walk) as answers:
                    kept = _save_reference(settings.save_reference, answers[0], packed, self.inputs, self.original)
            scored = forward.score(walk)
            layers, resumed = walk.records, walk.resumed_layers
        reference = stored.record if stored is not None else kept
        told = {} if reference is None else {"reference": _reference_record(reference)}
        records = []
        for number, (artifact, scores) in enumerate(zip(self.artifacts, scored, strict=True)):
            record = scores_record(artifact, self.original, self.inputs, packed, scores)
            record["layers"], record["resumed_layers"] = [layer[ARTIFACTS][number] for layer in layers], resumed
            records.append((record | told, scores))
        return records

    def _walking(self) -> dict[str, Checkpoint]:
        """The models that walk, by the names of their lanes."""
        original = {} if self.original is None or self.stored is not None else {ORIGINAL: self.original}
        if len(self.artifacts) == 1:
            return {**original, ARTIFACT: self.artifacts[0]}
        return original | {f"{ARTIFACT}-{number}": one for number, one in enumerate(self.artifacts, 1)}

    def _forward(self, models: Sequence[Model], packed: Packed) -> Forward:
        settings, paired = self.settings, len(models) > len(self.artifacts)
        if self.crew is None:
            return Here(models, packed, self.stored, LayerErrors(self.artifacts[0].config, paired=paired))
        return SpreadForward(
            self.crew, models, packed, settings.work, self.compute, self.progress,
            paired=paired, round_activations=not settings.weights_only, stored=self.stored,
        )  # fmt: skip

    def _prepared(self, models: Sequence[Model], packed: Packed, forward: Forward) -> Walk:
        job = _job(models, _parts(self.inputs, self.settings, self.compute))
        return Walk(
            [Lane(model.name, model, packed) for model in models], self.settings.work, job,
            forward.visitor, progress=self.progress,
            release=self.settings.max_ram is not None, ahead=self.ahead,
        )  # fmt: skip


def total_bytes(*checkpoints: Checkpoint | None) -> int:
    """Bytes of matrices in the layers of all, what progress is counted in."""
    return sum(
        entry.nbytes
        for checkpoint in checkpoints
        if checkpoint is not None
        for name, entry in checkpoint.entries.items()
        if classify(name).role in QUANTIZABLE
    )


def _tokenizer(artifact: Checkpoint, original: Checkpoint | None) -> PreTrainedTokenizerBase:
    return load_tokenizer(_first(artifact, original))


def _first(artifact: Checkpoint, original: Checkpoint | None) -> Checkpoint:
    """Whose tokenizer and processor read the text."""
    return original if original is not None and original.store is not None else artifact


def _inputs(
    artifact: Checkpoint, original: Checkpoint | None, settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase
) -> EvaluationInputs:
    longest = artifact.config.text.max_position_embeddings
    text = load_text(settings.text, tokenizer, longest, ImageReader(_first(artifact, original)))
    if original is not None:
        check_same_tokens(artifact, original, text, tokenizer)
    tasks = tuple(load_task(path) for path in settings.tasks)
    _check_names(tasks)
    sequences, spans = list(text.sequences), {"text": slice(0, len(text.sequences))}
    found: tuple[Needle, ...] = ()
    for task in tasks:
        more = sequences_of(task, tokenizer, longest)
        spans[f"task {task.name}"] = slice(len(sequences), len(sequences) + len(more))
        sequences += more
    if settings.needle is not None:
        haystack = [token for sequence in text.sequences if sequence.images is None for token in sequence.tokens[1:]]
        found = tuple(needles(settings.needle, haystack, tokenizer, settings.text.seed, longest))
        more = needle_sequences(list(found))
        spans["needle"] = slice(len(sequences), len(sequences) + len(more))
        sequences += more
    asked = asked_requests(tokenizer) if REFUSALS in settings.suites else None
    if asked is not None:
        more = refusal_sequences(asked.suite, tokenizer)
        spans[REFUSALS] = slice(len(sequences), len(sequences) + len(more))
        sequences += more
    return EvaluationInputs(tuple(sequences), text, tasks, found, spans, asked)


SUITES = (REFUSALS, *HARNESS_SUITES)


def check_suites(names: Sequence[str]) -> None:
    """Raise UsageError for a suite that l4pack doesn't have."""
    unknown = next((name for name in names if name not in SUITES), None)
    if unknown is not None:
        raise UsageError(f"there is no suite {unknown}", hint=f"choose {' or '.join(SUITES)}")


def _check_names(tasks: Sequence[EvaluationTask]) -> None:
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise UsageError("two task files have one name", hint="rename one: a task is called by its file's name")


def _reference_identity(inputs: EvaluationInputs, original: Checkpoint | None) -> dict[str, Any]:
    """What kept answers are of: the tokens, and which original."""
    return {
        "tokens_sha256": token_digest([sequence.tokens for sequence in inputs.sequences]),
        "scored_sha256": token_digest([[sequence.score_from for sequence in inputs.sequences]]),
        "text": inputs.text.record,
        **({"images_sha256": inputs.text.record["sha256"]} if inputs.text.record.get("images") else {}),
        **({} if original is None else original_record(original)),
    }


def _job(models: Sequence[Model], parts: Mapping[str, Any]) -> Identity:
    """What an interrupted evaluation goes on with: the same figures from the same files."""
    files = [weight_parts(model.weights.checkpoint, model.name) for model in models]
    return Identity({key: value for found in (parts, *files) for key, value in found.items()})


def _save_reference(
    folder: Path,
    answers: Answers,
    packed: Packed,
    inputs: EvaluationInputs,
    original: Checkpoint | None,
) -> dict[str, Any]:
    rows, targets = packed.scored_rows(), packed.targets()
    return save_reference(folder, answers, rows, targets, _reference_identity(inputs, original))


def _reference_record(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key.startswith("storage")}
