"""Evaluating an artifact: text, questions and needles through original and artifact in one pass over the weights."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l4pack import __version__
from l4pack.artifact.contents import measured_digest
from l4pack.artifact.original import ORIGINAL_KEYS, check_original, original_record
from l4pack.artifact.stanza import read_stanza
from l4pack.checkpoint.apart import refuse_overlap
from l4pack.checkpoint.parts import weight_parts
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.evaluate.answers import Answers, StreamAnswers
from l4pack.evaluate.harness import (
    STREAMED,
    StreamedScorer,
    harness_record,
    run_engine,
    run_tasks,
    streamed_lm,
    task_manager,
)
from l4pack.evaluate.layer_errors import SAMPLED_ROWS, LayerErrors, worst_units
from l4pack.evaluate.needle import Needle, needle_record, needles
from l4pack.evaluate.needle import needle_sequences as needle_sequences
from l4pack.evaluate.reference import StoredReference, claim_reference, load_reference, save_reference
from l4pack.evaluate.same_model import check_not_dequantized, check_reference, check_same_model, check_same_tokens
from l4pack.evaluate.schema import SCHEMA_VERSION
from l4pack.evaluate.scoring import PairedScores, Scores, score, score_pair
from l4pack.evaluate.statistics import clusters, mean_and_error, perplexity, summarize
from l4pack.evaluate.tasks import EvaluationTask, load_task, sequences_of, task_record
from l4pack.model.names import classify
from l4pack.model.tensors import QUANTIZABLE
from l4pack.plan.memory import computing_on, walk_within
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.identity import text_parts
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import Blocks
from l4pack.stream.modules import Skeleton
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.text.choice import TextChoice
from l4pack.text.sequences import TokenText, load_text, token_digest
from l4pack.text.tokenizer import load_tokenizer
from l4pack.work import machine
from l4pack.work.folder import owned
from l4pack.work.identity import Identity
from l4pack.work.signals import check_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORK_KIND = "evaluate"
ORIGINAL, ARTIFACT = "original", "artifact"
ROUNDED_CACHE = "FP8, keys and values rounded as vLLM stores them; queries are not"


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate and where."""

    work: Path
    text: TextChoice = field(default_factory=TextChoice)
    tasks: tuple[Path, ...] = ()  # files of questions
    harness: tuple[str, ...] = ()  # tasks of lm-evaluation-harness
    backend: str = STREAMED
    limit: int | None = None
    needle: int | None = None
    compute: str = "auto"
    max_ram: int | None = None
    max_vram: int | None = None
    weights_only: bool = False
    restart: bool = False
    save_reference: Path | None = None
    reference: Path | None = None


@dataclass(frozen=True)
class _Inputs:
    """All sequences of one pass, and which of them belong to what."""

    sequences: tuple[TokenSequence, ...]
    text: TokenText
    tasks: tuple[EvaluationTask, ...]
    needles: tuple[Needle, ...]
    spans: dict[str, slice] = field(default_factory=dict)


@dataclass(frozen=True)
class _Scored:
    """Both models' scores on every scored token; without an original, the artifact's alone."""

    artifact: Scores
    reference: Scores | None
    paired: PairedScores | None


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
) -> PreparedEvaluation:
    """Check what can be checked before the first layer, and say what the evaluation is of.

    `measured` is the artifact's `contents_digest` where it is known; else every tensor is read for it. Raises UsageError
    for anything but the original, for text or tasks that can't be had; SourceError.
    """
    progress = progress or Progress()
    started = time.monotonic()
    manager = task_manager(settings.harness, settings.backend) if settings.harness else None
    if settings.save_reference is not None and (original is None or settings.reference is not None):
        raise UsageError("--save-reference needs the original", hint="add --against SOURCE")
    written = [folder for folder in (settings.work, settings.save_reference) if folder is not None]
    refuse_overlap([one for one in (artifact, original) if one is not None], *written)
    if original is not None:
        check_same_model(artifact, original)
        check_original(artifact, original)
    tokenizer = _tokenizer(artifact, original)
    inputs = _inputs(artifact, original, settings, tokenizer)
    compute = Compute.of(settings.compute)
    ahead = _loads_ahead(artifact, original, settings, inputs, compute)
    stored = None
    if settings.reference is not None:
        stored = load_reference(settings.reference, _reference_identity(inputs, original), compute.device)
        check_reference(artifact, original, stored)
    if measured is None:
        progress.label("digesting")
        measured = measured_digest(artifact, lambda: check_stop(progress.stop))
        progress.label("evaluating")
    of = _original_parts(original, stored)
    identity = Identity({"artifact": measured, **of, **_parts(inputs, settings, compute)})
    return PreparedEvaluation(
        artifact, original, settings, progress, inputs, compute, ahead, stored, manager, identity, started
    )


def _loads_ahead(
    artifact: Checkpoint, original: Checkpoint | None, settings: EvaluationSettings, inputs: _Inputs, compute: Compute
) -> bool:
    """Whether memory takes a unit that is loaded while another computes. Raises BudgetError where the walk needs more
    than there is without."""
    models = 1 if original is None or settings.reference is not None else 2
    computing = computing_on(compute, artifact.config.text, inputs.sequences, models=models, streams=models)
    sampled = 2 * SAMPLED_ROWS * computing.row  # inputs and outputs
    ram, device = machine.memory(settings.max_ram), compute.device_room(settings.max_vram)
    _, ahead = walk_within(computing, lambda one: one.memory(held=sampled, scored=True), ram, device)
    return ahead


def _original_parts(original: Checkpoint | None, stored: StoredReference | None) -> dict[str, Any]:
    """Which original, by headers and by the bytes of its small tensors, and whether its answers were kept ones."""
    if stored is not None:
        known = {key: stored.record.get(key) for key in ORIGINAL_KEYS}
        return {"original": known, "--reference": stored.record.get("storage_kl_mean")}
    return {"original": None if original is None else original_record(original), "--reference": None}


def _parts(inputs: _Inputs, settings: EvaluationSettings, compute: Compute) -> dict[str, Any]:
    """What decides the figures beside the two models."""
    harness = {"--task": list(settings.harness), "--limit": settings.limit, "--backend": settings.backend}
    return {
        "l4pack version": __version__,
        **text_parts(inputs.text.record),
        **{f"--task {task.name}": _task_digest(task) for task in inputs.tasks},
        "lm-eval": harness if settings.harness else None,
        "--needle": settings.needle,
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
    inputs: _Inputs
    compute: Compute
    ahead: bool
    stored: StoredReference | None
    manager: Any
    identity: Identity
    started: float

    def run(self) -> dict[str, Any]:
        """Walk, score and sum up; see `evaluate`."""
        settings = self.settings
        if settings.save_reference is not None:
            claim_reference(settings.save_reference)
        with owned(settings.work, WORK_KIND, restart=settings.restart) as folder:
            record = self._walk()
            if settings.harness:
                harness = _Harness(settings, self.compute, self.ahead, self.progress, self.manager)
                record["tasks"] |= harness.record(self.artifact, self.original)
            folder.remove()
        record["worst"] = worst_units(record["layers"])
        record["run"] = _run_record(self.artifact, self.compute, settings, self.started)
        record["identity"] = dict(self.identity.parts)
        return record

    def _walk(self) -> dict[str, Any]:
        """Both models through their layers and their answers scored."""
        artifact, original, settings, compute = self.artifact, self.original, self.settings, self.compute
        inputs, stored = self.inputs, self.stored
        packed = Packed(inputs.sequences)
        with ExitStack() as stack:
            names = [(ORIGINAL, original)] if original is not None and stored is None else []
            models = [
                _model(name, one, compute, settings, stack) for name, one in (*names, (ARTIFACT, artifact)) if one
            ]
            if len(models) > 1:
                check_not_dequantized(models[1].weights, models[0].weights)
            job = _job(models, _parts(inputs, settings, compute))
            walk = stack.enter_context(
                Walk(
                    [Lane(model.name, model, packed) for model in models], settings.work, job,
                    LayerErrors(artifact.config), progress=self.progress, release=settings.max_ram is not None,
                    ahead=self.ahead,
                )
            )  # fmt: skip
            walk.run()
            self.progress.label("scoring")
            answers = [StreamAnswers(model, walk.streams[model.name].current) for model in models]
            kept = _save_reference(settings, answers[0], packed, inputs, original)
            record = _record(artifact, original, inputs, packed, _score(answers, stored, packed))
            record["layers"], record["resumed_layers"] = walk.records, walk.resumed_layers
        if stored is not None or kept is not None:
            record["reference"] = _reference_record(stored.record if stored else kept or {})
        return record


def total_bytes(artifact: Checkpoint, original: Checkpoint | None) -> int:
    """Bytes of matrices in the layers of both, what progress is counted in."""
    return sum(
        entry.nbytes
        for checkpoint in (artifact, original)
        if checkpoint is not None
        for name, entry in checkpoint.entries.items()
        if classify(name).role in QUANTIZABLE
    )


def _tokenizer(artifact: Checkpoint, original: Checkpoint | None) -> PreTrainedTokenizerBase:
    return load_tokenizer(original if original is not None and original.store is not None else artifact)


def _inputs(
    artifact: Checkpoint, original: Checkpoint | None, settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase
) -> _Inputs:
    longest = artifact.config.text.max_position_embeddings
    text = load_text(settings.text, tokenizer, longest)
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
        haystack = [token for sequence in text.sequences for token in sequence.tokens[1:]]
        found = tuple(needles(settings.needle, haystack, tokenizer, settings.text.seed, longest))
        more = needle_sequences(list(found))
        spans["needle"] = slice(len(sequences), len(sequences) + len(more))
        sequences += more
    return _Inputs(tuple(sequences), text, tasks, found, spans)


def _check_names(tasks: Sequence[EvaluationTask]) -> None:
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise UsageError("two task files have one name", hint="rename one: a task is called by its file's name")


def _reference_identity(inputs: _Inputs, original: Checkpoint | None) -> dict[str, Any]:
    """What kept answers are of: the tokens, and which original."""
    return {
        "tokens_sha256": token_digest([sequence.tokens for sequence in inputs.sequences]),
        "scored_sha256": token_digest([[sequence.score_from for sequence in inputs.sequences]]),
        "text": inputs.text.record,
        **({} if original is None else original_record(original)),
    }


def _model(
    name: str, checkpoint: Checkpoint, compute: Compute, settings: EvaluationSettings, stack: ExitStack
) -> Model:
    weights = stack.enter_context(
        Weights(checkpoint, compute.device, compute.dtype, round_activations=not settings.weights_only)
    )
    return Model(name, weights, Skeleton(checkpoint.config, compute.device, compute.dtype))


def _job(models: Sequence[Model], parts: Mapping[str, Any]) -> Identity:
    """What an interrupted evaluation goes on with: the same figures from the same files."""
    files = [weight_parts(model.weights.checkpoint, model.name) for model in models]
    return Identity({key: value for found in (parts, *files) for key, value in found.items()})


def _save_reference(
    settings: EvaluationSettings, answers: Answers, packed: Packed, inputs: _Inputs, original: Checkpoint | None
) -> dict[str, Any] | None:
    if settings.save_reference is None:
        return None
    rows, targets = packed.scored_rows(), packed.targets()
    return save_reference(settings.save_reference, answers, rows, targets, _reference_identity(inputs, original))


def _score(answers: Sequence[Answers], stored: StoredReference | None, packed: Packed) -> _Scored:
    rows, targets = packed.scored_rows(), packed.targets()
    if stored is not None:
        paired = score_pair(stored, answers[-1], (torch.arange(len(rows)), rows), targets)
    elif len(answers) == 2:
        paired = score_pair(answers[0], answers[1], (rows, rows), targets)
    else:
        return _Scored(score(answers[-1], rows, targets, ARTIFACT), None, None)
    return _Scored(paired.artifact, paired.reference, paired)


def _record(
    artifact: Checkpoint, original: Checkpoint | None, inputs: _Inputs, packed: Packed, scored: _Scored
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "artifact": Path(artifact.name).name,
        "against": None if original is None else Path(original.name).name,
        "artifact_weight_bytes": artifact.weight_bytes,
        "against_weight_bytes": None if original is None else original.weight_bytes,
    }
    lengths = [len(item.tokens) - item.score_from for item in packed.sequences]
    record |= _text_record(inputs.spans["text"], lengths, scored)
    record["text"] = inputs.text.record
    record["tasks"] = {
        task.name: _task(task, inputs.spans[f"task {task.name}"], lengths, scored) for task in inputs.tasks
    }
    if inputs.needles:
        record["needle"] = _needles(inputs, packed, lengths, scored)
    return record


def _rows(lengths: Sequence[int], sequences: slice) -> slice:
    """Scored tokens of some sequences."""
    return slice(sum(lengths[: sequences.start]), sum(lengths[: sequences.stop]))


def _text_record(sequences: slice, lengths: Sequence[int], scored: _Scored) -> dict[str, Any]:
    rows, lengths = _rows(lengths, sequences), lengths[sequences]
    if scored.paired is not None:
        part = PairedScores(_cut(scored.paired.reference, rows), _cut(scored.artifact, rows), scored.paired.kl[rows])
        positions = torch.cat([torch.arange(length) for length in lengths])
        return summarize(part, lengths, positions)
    cluster = clusters(lengths)
    value, error = perplexity(scored.artifact.log_probability[rows], cluster)
    return {
        "perplexity_artifact": value,
        "perplexity_artifact_standard_error": error,
        "negative_log_likelihood": mean_and_error(-scored.artifact.log_probability[rows], cluster)[0],
        "tokens": sum(lengths),
    }


def _cut(scores: Scores, rows: slice) -> Scores:
    return Scores(scores.log_probability[rows], scores.likeliest[rows])


def _sums(scores: Scores | None, sequences: slice, lengths: Sequence[int]) -> list[float] | None:
    """The log-likelihood of every sequence's scored tokens."""
    if scores is None:
        return None
    parts = torch.split(scores.log_probability[_rows(lengths, sequences)], list(lengths[sequences]))
    return [float(part.sum()) for part in parts]


def _task(task: EvaluationTask, sequences: slice, lengths: Sequence[int], scored: _Scored) -> dict[str, Any]:
    artifact = _sums(scored.artifact, sequences, lengths)
    assert artifact is not None
    record = task_record(task, artifact, _sums(scored.reference, sequences, lengths))
    return {**record, "sha256": _task_digest(task)}


def _task_digest(task: EvaluationTask) -> str:
    questions = json.dumps([[item.context, item.choices, item.answer] for item in task.questions])
    return hashlib.sha256(questions.encode()).hexdigest()


def _needles(inputs: _Inputs, packed: Packed, lengths: Sequence[int], scored: _Scored) -> dict[str, Any]:
    sequences = inputs.spans["needle"]
    rows, targets = _rows(lengths, sequences), packed.targets()
    parts = list(lengths[sequences])
    length = len(packed.sequences[sequences.start].tokens)

    def of(scores: Scores) -> dict[str, Any]:
        greedy: Tensor = scores.likeliest[rows] == targets[rows]
        probabilities = torch.split(scores.log_probability[rows], parts)
        return needle_record(length, list(inputs.needles), list(probabilities), list(torch.split(greedy, parts)))

    record = {ARTIFACT: of(scored.artifact)}
    return {**record, ORIGINAL: of(scored.reference)} if scored.reference is not None else record


@dataclass(frozen=True)
class _Harness:
    """lm-evaluation-harness on the models of one evaluation."""

    settings: EvaluationSettings
    compute: Compute
    ahead: bool
    progress: Progress
    manager: Any

    def record(self, artifact: Checkpoint, original: Checkpoint | None) -> dict[str, Any]:
        """Every task's numbers; an engine runs the artifact alone."""
        chosen = self.settings
        if chosen.backend != STREAMED:
            found = run_engine(chosen.backend, Path(artifact.name), chosen.harness, chosen.limit, self.manager)
            return harness_record(found, None)
        before = None if original is None else self._streamed(ORIGINAL, original)
        return harness_record(self._streamed(ARTIFACT, artifact), before)

    def _streamed(self, name: str, checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
        chosen = self.settings
        scorer = StreamedScorer(
            checkpoint,
            chosen.work / f"harness-{name}",
            self.compute,
            round_activations=not chosen.weights_only,
            progress=self.progress,
            ahead=self.ahead,
        )
        return run_tasks(streamed_lm(checkpoint, scorer), chosen.harness, chosen.limit, self.manager)


def _reference_record(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key.startswith("storage")}


def _run_record(artifact: Checkpoint, compute: Compute, settings: EvaluationSettings, started: float) -> dict[str, Any]:
    rounded_cache = bool(read_stanza(artifact.config.stanza).kv_cache) and not settings.weights_only
    return {
        "device": compute.describe(),
        "dtype": str(compute.dtype).removeprefix("torch."),
        "activations": "not rounded" if settings.weights_only else "rounded as the runtime does",
        "kv_cache": ROUNDED_CACHE if rounded_cache else "as computed",
        "blocks": vars(Blocks.on(compute.device, artifact.config.text.hidden_size)),
        "seed": settings.text.seed,
        "versions": {"l4pack": __version__, "python": platform.python_version(), **_versions()},
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _versions() -> dict[str, str]:
    result = {}
    for name in ("torch", "transformers", "compressed-tensors", "tokenizers"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "none"
    return result
