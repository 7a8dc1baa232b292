"""Who reads a format and what each can't, as `formats/NAME.yaml` states it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from l4pack.datafile import read_yaml, validate
from l4pack.model.tensors import QUANTIZABLE, Role
from l4pack.quant.scheme import Strategy
from l4pack.resources import data_folder

Condition = Literal[
    "asymmetric", "asymmetric_attention", "asymmetric_int8", "attention", "block_attention", "kv_cache",
    "kv_cache_by_head", "kv_cache_vision", "mixed", "static_activations", "weight_only_experts",
]  # fmt: skip
Multiple = Annotated[int, Field(gt=0)] | Literal["pack", "group", "rows", "columns"]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Severity(StrEnum):
    """What becomes of a case a runtime can't do: worth knowing, does not load, or loads and answers wrongly."""

    NOTE = "note"
    REFUSES = "refuses"
    MISREADS = "misreads"


class Limit(_Data):
    """A case a runtime does not read rightly."""

    when: Condition
    severity: Severity = Severity.NOTE
    says: str


class ShapeLimit(_Data):
    """A multiple that a matrix's size, or its groups, must be on each GPU, after tensor parallelism has cut it."""

    size: Literal["out", "in", "group"]
    multiple: Multiple
    strategies: Annotated[list[Strategy], Field(min_length=1)] = list(Strategy)
    roles: Annotated[list[Role], Field(min_length=1)] = list(QUANTIZABLE)
    projections: Annotated[list[str], Field(min_length=1)] | None = None
    when: Condition | None = None
    severity: Severity = Severity.REFUSES
    says: str


class FormatReader(_Data):
    """A runtime that reads the format, and what it can't."""

    runtime: str
    version: str
    container: Literal["gguf", "mlx"] | None = None  # what `export` puts an artifact into for it
    serves: bool = True  # false for one that holds the weights unpacked, to compute with and not to serve
    limits: list[Limit] = []
    shapes: list[ShapeLimit] = []


class ReadersFile(_Data):
    """The file of one format."""

    readers: list[FormatReader]


def read_readers(name: str) -> tuple[FormatReader, ...]:
    """Who reads a shipped format."""
    path = data_folder("formats") / f"{name}.yaml"
    return tuple(validate(ReadersFile, read_yaml(path), path.name).readers)
