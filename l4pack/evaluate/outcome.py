"""From the scores of one pass to the numbers of its record."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l4pack import __version__
from l4pack.artifact.stanza import read_stanza
from l4pack.checkpoint.source import Checkpoint
from l4pack.evaluate.answers import Answers
from l4pack.evaluate.inputs import EvaluationInputs, EvaluationSettings
from l4pack.evaluate.needle import needle_record
from l4pack.evaluate.reference import StoredReference
from l4pack.evaluate.refusals import REFUSALS, Requests, refusal_record
from l4pack.evaluate.schema import SCHEMA_VERSION
from l4pack.evaluate.scoring import PairedScores, Scores, score, score_against
from l4pack.evaluate.statistics import clusters, mean_and_error, perplexity, summarize
from l4pack.evaluate.tasks import EvaluationTask, task_record
from l4pack.plan.memory import Memory
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed
from l4pack.stream.layer import Blocks
from l4pack.work import machine

ORIGINAL, ARTIFACT = "original", "artifact"
ROUNDED_CACHE = "FP8, keys and values rounded as vLLM stores them; queries are not"


@dataclass(frozen=True)
class Scored:
    """Both models' scores on every scored token; without an original, the artifact's alone."""

    artifact: Scores
    reference: Scores | None
    paired: PairedScores | None


def score_models(
    answers: Sequence[Answers], stored: StoredReference | None, packed: Packed, some: slice = slice(None)
) -> list[Scored]:
    """Score every scored token, or `some` of them, by the original, whose answers may be `stored` ones, and by each artifact after it; by an
    artifact alone where there is neither. Raises L4packError."""
    every = packed.scored_rows()
    rows, targets = every[some], packed.targets()[some]
    if stored is not None:
        found = score_against(stored, answers, (torch.arange(len(every))[some], rows), targets)
    elif len(answers) > 1:
        found = score_against(answers[0], answers[1:], (rows, rows), targets)
    else:
        return [Scored(score(answers[-1], rows, targets, ARTIFACT), None, None)]
    return [Scored(paired.artifact, paired.reference, paired) for paired in found]


def joined_scores(parts: Sequence[Scored]) -> Scored:
    """A model's scores of some tokens one after another."""
    artifact = _joined([part.artifact for part in parts])
    reference = [part.reference for part in parts if part.reference is not None]
    if not reference:
        return Scored(artifact, None, None)
    kl = torch.cat([part.paired.kl for part in parts if part.paired is not None])
    before = _joined(reference)
    return Scored(artifact, before, PairedScores(before, artifact, kl))


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in ("log_probability", "likeliest")))


def scores_record(
    artifact: Checkpoint, original: Checkpoint | None, inputs: EvaluationInputs, packed: Packed, scored: Scored
) -> dict[str, Any]:
    """The record's numbers of a text, of questions and of needles."""
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "artifact": Path(artifact.name).name,
        "against": None if original is None else Path(original.name).name,
        "artifact_weight_bytes": artifact.weight_bytes,
        "against_weight_bytes": None if original is None else original.weight_bytes,
    }
    lengths = packed.scored_lengths()
    record |= _text_record(packed, inputs.spans["text"], lengths, scored)
    record["text"] = inputs.text.record
    record["tasks"] = {
        task.name: _task(task, inputs.spans[f"task {task.name}"], lengths, scored) for task in inputs.tasks
    }
    if inputs.needles:
        record["needle"] = _needles(inputs, packed, lengths, scored)
    if inputs.refusals is not None:
        record["refusals"] = _refusals(inputs.refusals, inputs.spans[REFUSALS], lengths, scored)
    return record


def rows_of(lengths: Sequence[int], sequences: slice) -> slice:
    """Scored tokens of some sequences."""
    return slice(sum(lengths[: sequences.start]), sum(lengths[: sequences.stop]))


def _text_record(packed: Packed, sequences: slice, lengths: Sequence[int], scored: Scored) -> dict[str, Any]:
    rows, lengths = rows_of(lengths, sequences), lengths[sequences]
    if scored.paired is not None:
        part = PairedScores(_cut(scored.paired.reference, rows), _cut(scored.artifact, rows), scored.paired.kl[rows])
        positions = torch.cat([item.scored() - 1 for item in packed.sequences[sequences]])
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
    parts = torch.split(scores.log_probability[rows_of(lengths, sequences)], list(lengths[sequences]))
    return [float(part.sum()) for part in parts]


def _task(task: EvaluationTask, sequences: slice, lengths: Sequence[int], scored: Scored) -> dict[str, Any]:
    artifact = _sums(scored.artifact, sequences, lengths)
    assert artifact is not None
    record = task_record(task, artifact, _sums(scored.reference, sequences, lengths))
    return {**record, "sha256": task_digest(task)}


def _refusals(asked: Requests, sequences: slice, lengths: Sequence[int], scored: Scored) -> dict[str, Any]:
    artifact = _sums(scored.artifact, sequences, lengths)
    assert artifact is not None
    return refusal_record(asked, artifact, _sums(scored.reference, sequences, lengths))


def task_digest(task: EvaluationTask) -> str:
    """Hex SHA-256 of a task's questions."""
    questions = json.dumps([[item.context, item.choices, item.answer] for item in task.questions])
    return hashlib.sha256(questions.encode()).hexdigest()


def _needles(inputs: EvaluationInputs, packed: Packed, lengths: Sequence[int], scored: Scored) -> dict[str, Any]:
    sequences = inputs.spans["needle"]
    rows, targets = rows_of(lengths, sequences), packed.targets()
    parts = list(lengths[sequences])
    length = len(packed.sequences[sequences.start].tokens)

    def of(scores: Scores) -> dict[str, Any]:
        greedy: Tensor = scores.likeliest[rows] == targets[rows]
        probabilities = torch.split(scores.log_probability[rows], parts)
        return needle_record(length, list(inputs.needles), list(probabilities), list(torch.split(greedy, parts)))

    record = {ARTIFACT: of(scored.artifact)}
    return {**record, ORIGINAL: of(scored.reference)} if scored.reference is not None else record


def run_record(
    artifact: Checkpoint, compute: Compute, settings: EvaluationSettings, started: float, planned: Memory
) -> dict[str, Any]:
    """How the numbers came about: device, dtype, versions, date, seconds and bytes of memory, `planned` and taken."""
    rounded_cache = bool(read_stanza(artifact.config.stanza).kv_cache) and not settings.weights_only
    return {
        "device": compute.describe(),
        "dtype": str(compute.dtype).removeprefix("torch."),
        "activations": "not rounded" if settings.weights_only else "rounded as the runtime does",
        "kv_cache": ROUNDED_CACHE if rounded_cache else "as computed",
        "blocks": vars(Blocks.on(compute.device, artifact.config.text.hidden_size)),
        "seed": settings.text.seed,
        "versions": {"l4pack": __version__, "python": platform.python_version(), **_versions()},
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": time.monotonic() - started,
        "peak_ram_bytes": planned.ram,
        "peak_rss_bytes": machine.peak_rss(),
    }


def _versions() -> dict[str, str]:
    result = {}
    for name in ("torch", "transformers", "compressed-tensors", "tokenizers"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "none"
    return result
