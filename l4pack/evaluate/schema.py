"""The schema of an evaluation: what `accuracy.json` holds is believed only after it was held against this."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from l4pack.datafile import Sha256, first_fault
from l4pack.errors import UsageError

SCHEMA_VERSION = 2  # 1 did not say which weights were measured
MAX_STRING, MAX_DEPTH = 1024, 12
PAIRED = (
    "kl_mean", "kl_standard_error", "kl_median", "kl_p99", "kl_p999", "kl_max", "kl_histogram", "by_position",
    "top1_agreement", "top1_agreement_standard_error", "perplexity_reference", "perplexity_reference_standard_error",
    "perplexity_ratio", "perplexity_ratio_standard_error",
)  # fmt: skip

Count = Annotated[int, Field(ge=0, le=2**60)]
Share = Annotated[float, Field(ge=0, le=1)]
Magnitude = Annotated[float, Field(ge=0)]
MeasuredKl = Annotated[float, Field(ge=-1e-6, le=1e6)]  # rounding may leave a mean a hair below zero
Error = Annotated[float, Field(ge=0)] | None
Number = Annotated[float, Field()]
Word = Annotated[str, StringConstraints(pattern=r"^[\w .,:;()+\-/@]*$", max_length=256)]
GateName = Annotated[str, StringConstraints(pattern=r"^(max_kl|min_agreement|max_perplexity_ratio|min_recovery .+)$")]


class _Data(BaseModel):
    """Keys that are not known stay: `_plain` has held them to be plain JSON."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)


class Value(_Data):
    """A share or score with its standard error."""

    value: Number
    standard_error: Error


class TaskResult(_Data):
    """One task."""

    questions: Count
    accuracy: Value
    accuracy_reference: Value | None = None
    recovery: Number | None = None
    same_choice: Share | None = None
    metric: Word = "accuracy"


class Expert(_Data):
    """One routed expert of a layer."""

    expert: Annotated[int, Field(ge=0, le=4096)]
    tokens: Count
    error: Magnitude | None = None


class Layer(_Data):
    """One layer."""

    layer: Annotated[int, Field(ge=0, le=1024)]
    residual_error: Magnitude | None = None
    residual_standard_error: Error = None
    attention_error: Magnitude | None = None
    attention_standard_error: Error = None
    shared_expert_error: Magnitude | None = None
    shared_expert_standard_error: Error = None
    dense_mlp_error: Magnitude | None = None
    dense_mlp_standard_error: Error = None
    routed_expert_error: Magnitude | None = None
    routed_expert_standard_error: Error = None
    routing_moved: Count | None = None
    routing_agreement: Share | None = None
    experts: Annotated[list[Expert], Field(max_length=4096)] = []


class Worst(_Data):
    """A unit with a large error of its own."""

    layer: Annotated[int, Field(ge=0, le=1024)]
    block: Word
    error: Magnitude
    expert: Annotated[int, Field(ge=0, le=4096)] | None = None


class Histogram(_Data):
    """Tokens between edges."""

    edges: Annotated[list[Magnitude], Field(max_length=1000)]
    counts: Annotated[list[Count], Field(max_length=1001)]

    @model_validator(mode="after")
    def _fits(self) -> Histogram:
        if len(self.counts) != len(self.edges) + 1:
            raise ValueError("has not one count more than edges")
        return self


class Position(_Data):
    """Mean numbers of a range of positions."""

    kl_mean: MeasuredKl
    kl_standard_error: Error = None
    top1_agreement: Share
    top1_agreement_standard_error: Error = None
    tokens: Count


class Text(_Data):
    """What was measured on."""

    source: str
    sha256: Sha256
    tokens_sha256: Sha256
    sequences: Count
    tokens: Count
    sequence_length: Count
    seed: int


class Run(_Data):
    """Where and how it ran."""

    device: Word
    dtype: Word
    activations: Word
    seconds: Magnitude
    peak_rss_bytes: Count
    date: Word = ""
    versions: dict[Word, Word]


class Gate(_Data):
    """A gate, what was measured and whether it passed."""

    gate: GateName
    limit: Number
    value: Number | None
    ok: bool


class Retrieval(_Data):
    """Needles of one model."""

    length: Count
    retrieved: Share


class Said(_Data):
    """What one model said after a prompt."""

    text: str
    tokens: Annotated[list[Count], Field(max_length=4096)]
    ended: bool


class SampleAnswer(_Data):
    """A prompt, and what artifact and original said; `first_difference` counts tokens."""

    prompt: str
    artifact: Said
    original: Said | None
    first_difference: Count | None


class Sample(_Data):
    """What was said, of at most so many tokens an answer."""

    tokens: Count
    answers: Annotated[list[SampleAnswer], Field(max_length=100)]


class RefusalsOfKind(_Data):
    """Harmful or harmless requests: how probable a refusal is by both models, and what they refuse."""

    requests: Annotated[int, Field(gt=0, le=10_000)]
    probability_artifact: Value
    refused_artifact: Count
    probability_original: Value | None = None
    refused_original: Count | None = None
    probability_change: Value | None = None
    refused_by_artifact_only: Count | None = None
    refused_by_original_only: Count | None = None
    p_value: Share | None = None

    @model_validator(mode="after")
    def _whole(self) -> RefusalsOfKind:
        paired = (self.probability_original, self.refused_original, self.probability_change, self.p_value,
                  self.refused_by_artifact_only, self.refused_by_original_only)  # fmt: skip
        if any(one is None for one in paired) and any(one is not None for one in paired):
            raise ValueError("numbers of the original are there together or not at all")
        return self


class Refusals(_Data):
    """Refusals of the requests of a suite."""

    suite: Word
    sha256: Sha256
    openings: Count
    harmful: RefusalsOfKind
    harmless: RefusalsOfKind


class SuiteResult(_Data):
    """A set of lm-evaluation-harness's tasks: its means, and how much of the original's is recovered, in per cent."""

    title: str
    tasks: Annotated[list[str], Field(max_length=1000)]
    left_out: Annotated[list[str], Field(max_length=1000)]
    mean: Number
    mean_reference: Number | None = None
    recovery_percent: Number | None = None


class Evaluation(_Data):
    """One evaluation, as `accuracy.json` holds it. Numbers of an original are there together or not at all."""

    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)]
    identity: dict[str, Any]
    artifact: str
    against: str | None
    artifact_weight_bytes: Count
    against_weight_bytes: Count | None
    tokens: Annotated[int, Field(gt=0, le=2**60)]
    perplexity_artifact: Magnitude
    perplexity_artifact_standard_error: Error
    kl_mean: MeasuredKl | None = None
    kl_standard_error: Error = None
    kl_median: MeasuredKl | None = None
    kl_p99: MeasuredKl | None = None
    kl_p999: MeasuredKl | None = None
    kl_max: MeasuredKl | None = None
    kl_histogram: Histogram | None = None
    by_position: Annotated[list[Position], Field(max_length=1000)] | None = None
    top1_agreement: Share | None = None
    top1_agreement_standard_error: Error = None
    perplexity_reference: Magnitude | None = None
    perplexity_reference_standard_error: Error = None
    perplexity_ratio: Magnitude | None = None
    perplexity_ratio_standard_error: Error = None
    text: Text
    tasks: Annotated[dict[str, TaskResult], Field(max_length=1000)]
    needle: dict[Word, Retrieval] | None = None
    sample: Sample | None = None
    refusals: Refusals | None = None
    suites: dict[Word, SuiteResult] | None = None
    layers: Annotated[list[Layer], Field(max_length=1024)]
    worst: Annotated[list[Worst], Field(max_length=1000)]
    run: Run
    gates: Annotated[list[Gate], Field(max_length=1000)]

    @model_validator(mode="after")
    def _whole(self) -> Evaluation:
        given = [key for key in PAIRED if key in self.model_fields_set]
        if given and len(given) < len(PAIRED):
            raise ValueError(f"{next(key for key in PAIRED if key not in given)} is missing beside {given[0]}")
        empty = [key for key in given if not key.endswith("_error") and getattr(self, key) is None]
        if empty:
            raise ValueError(f"{empty[0]} is null")
        if "artifact" not in self.identity:
            raise ValueError("identity does not say which artifact was measured")
        return self

    def plain(self) -> dict[str, Any]:
        """As JSON, with the keys that were given."""
        return self.model_dump(mode="json", exclude_unset=True)


def parse_evaluation(value: Any, where: str) -> Evaluation:
    """Hold one record against the schema. Raises UsageError in one line."""
    hint = "run `l4pack evaluate` again, once it is moved away"
    if isinstance(value, dict) and value.get("schema_version") == 1:
        raise UsageError(f"{where} is of an earlier version, which did not say what was measured", hint=hint)
    try:
        _plain(value)
        return Evaluation.model_validate(value)
    except ValidationError as error:
        key, message = first_fault(error)
        raise UsageError(f"{where} is not an evaluation: {key or 'the record'}: {message}", hint=hint) from None
    except ValueError as error:
        raise UsageError(f"{where} is not an evaluation: {error}", hint=hint) from None


def _plain(value: Any, depth: int = 0) -> None:
    """Raise ValueError for numbers and texts that nothing l4pack writes could hold."""
    if depth > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    match value:
        case str() if len(value) > MAX_STRING or not value.isprintable():
            raise ValueError(f"{json.dumps(value[:40])} is longer than a line, or no plain text")
        case float() if not math.isfinite(value):
            raise ValueError("it holds a number that is infinite or none")
        case dict():
            for key, inner in value.items():
                _plain(key, depth + 1)
                _plain(inner, depth + 1)
        case list():
            for inner in value:
                _plain(inner, depth + 1)
