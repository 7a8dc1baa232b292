"""Licence policies as data: which models a licence governs and what it asks of whoever distributes them.

The next licence is a file in `policies/`, not code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from l4pack.datafile import read_yaml, validate

POLICIES = Path(__file__).parent / "policies"
_EMPHASIS = re.compile(r"[*_`]+|^[ \t]*[>#]+[ \t]?", re.MULTILINE)
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\xa0": " "})


@dataclass(frozen=True, slots=True)
class Breach:
    """One rule that is not met: its name, the file or value where, and what is wrong with the clause cited."""

    rule: str
    where: str
    message: str


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Duty(_Data):
    """One thing the licence asks for: a file, something said on the card, or a value of the card's metadata."""

    rule: str
    clause: str
    message: str
    files: list[str] | None = None
    contains: list[str] = []
    origin: Literal["source", "written"] | None = None
    card: list[str] | None = None
    within_lines: Annotated[int, Field(gt=0)] | None = None
    metadata: list[dict[str, str]] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Duty:
        if sum(kind is not None for kind in (self.files, self.card, self.metadata)) != 1:
            raise ValueError(f"{self.rule}: give one of files, card, metadata")
        if (self.files is None) != (self.origin is None):
            raise ValueError(f"{self.rule}: a file needs an origin, and nothing else has one")
        return self

    @property
    def cited(self) -> str:
        """The message with its clause."""
        return f"{self.message} ({self.clause})"

    def satisfied_by(self, text: str) -> bool:
        """Whether a file's text holds every sentence asked for, whatever its line breaks."""
        return all(plain(sentence) in plain(text) for sentence in self.contains)


class Family(_Data):
    """How to tell that a model is governed by the licence, whatever its card claims."""

    model_types: list[str]
    lineage: str
    known_models: list[str]


class NameRule(_Data):
    """What the licence asks of the name of a model made from the licensed one."""

    begins_with: str
    foreign_marks: list[str]
    clause: str
    marks_clause: str


class Policy(_Data):
    """One licence's policy."""

    policy: str
    title: str
    metadata: dict[str, str]
    family: Family | None = None
    safeguards: str = ""
    name: NameRule | None = None
    duties: Annotated[list[Duty], Field(min_length=1)]
    block: str
    gating: dict[str, Any] = {}
    tags: list[str] = []

    @property
    def text_duty(self) -> Duty:
        """The duty to hand on the licence's text."""
        return next(duty for duty in self.duties if duty.rule == "licence-copy")

    def declared_by(self, metadata: dict[str, Any]) -> bool:
        """Whether a card's metadata names this licence."""
        accepted = [choice for duty in self.duties if duty.rule == "licence-metadata" for choice in duty.metadata or []]
        return any(agrees(choice, metadata) for choice in accepted)


def agrees(wanted: dict[str, str], metadata: dict[str, Any]) -> bool:
    """Whether metadata hold all the wanted values; `*` means any value at all."""
    return all(bool(metadata.get(key)) if value == "*" else metadata.get(key) == value for key, value in wanted.items())


def plain(text: str) -> str:
    """Text without line breaks, curly quotes and Markdown's emphasis, so that sentences can be found in it."""
    return " ".join(_EMPHASIS.sub("", text.translate(_QUOTES)).split())


@cache
def policies() -> tuple[Policy, ...]:
    """The shipped policies; those that govern a family of models come first."""
    found = [validate(Policy, read_yaml(path), path.name) for path in sorted(POLICIES.glob("*.yaml"))]
    return tuple(sorted(found, key=lambda policy: policy.family is None))


def duty_files(origin: str | None = None) -> frozenset[str]:
    """Names of the files that licences ask for, and `package` adds; of one origin if that is asked."""
    duties = (duty for policy in policies() for duty in policy.duties if origin in (None, duty.origin))
    return frozenset(name for duty in duties for name in duty.files or ())


def written_files() -> frozenset[str]:
    """Names of the files whose text `package` writes, whatever the source's said."""
    return duty_files("written")
