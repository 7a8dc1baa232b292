"""What is evaluated, and everything that runs through the models for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from l4pack.evaluate.needle import Needle
from l4pack.evaluate.refusals import Requests
from l4pack.evaluate.tasks import EvaluationTask
from l4pack.stream.hidden import TokenSequence
from l4pack.text.choice import TextChoice
from l4pack.text.files import JSON_SUFFIXES
from l4pack.text.sequences import TokenText

STREAMED = "streamed"  # tasks of lm-evaluation-harness run layer by layer, as all else; engines load the artifact


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
    sample_tokens: int = 0  # of an answer to each prompt of the sample; 0: none is taken
    suites: tuple[str, ...] = ()  # sets of questions that come with l4pack, by name
    compute: str = "auto"
    max_ram: int | None = None
    max_vram: int | None = None
    weights_only: bool = False
    restart: bool = False
    save_reference: Path | None = None
    reference: Path | None = None


@dataclass(frozen=True)
class EvaluationInputs:
    """All sequences of one pass, and which of them belong to what."""

    sequences: tuple[TokenSequence, ...]
    text: TokenText
    tasks: tuple[EvaluationTask, ...]
    needles: tuple[Needle, ...]
    spans: dict[str, slice] = field(default_factory=dict)
    refusals: Requests | None = None


def split_tasks(names: Iterable[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Files of questions, and tasks of lm-evaluation-harness, whose names have no such endings."""
    found = [(name, name.lower().removesuffix(".gz").endswith(JSON_SUFFIXES)) for name in names]
    return tuple(Path(name) for name, file in found if file), tuple(name for name, file in found if not file)
