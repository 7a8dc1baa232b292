"""Budgets as code: `l4pack-budget.yaml` declares checks, and all of them are run.

checks:
  - name: scout-int4-1xh100
    artifact: out/scout-int4          # a folder; or `hub: ORG/NAME`; or `source:` with `recipe:`
    device: h100
    context: 128k
    sequences: 1
    min_headroom: 0.25GiB
    quality: {max_kl: 0.01}           # of the folder's accuracy.json
    licence: true
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from l4pack.budget.devices import Device, WrittenSize, find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.model import Budget, budget
from l4pack.budget.record import budget_record
from l4pack.budget.solve import LargestLoads, Suggestion, changes, limits
from l4pack.budget.subject import Subject
from l4pack.checkpoint.open import DEMO, HUB_SCHEME, exists, hub_repository
from l4pack.datafile import PositiveCount, read_yaml, validate
from l4pack.errors import BudgetError, L4packError, RecipeError, SourceError, UsageError
from l4pack.model.config import KNOWN_MODELS
from l4pack.recipe import Gates
from l4pack.units import parse_tokens

DEFAULT_FILE = "l4pack-budget.yaml"
HELP = "`l4pack budget init ARTIFACT` writes one to begin with"
OpenSubject = Callable[[str, str | None], Subject]


def _tokens(value: object) -> int:
    try:
        return parse_tokens(str(value))
    except UsageError as error:
        raise ValueError(error.message) from None


Tokens = Annotated[int, BeforeValidator(_tokens), Field(ge=1)]  # as a file writes them: `128k`, or plain


class Check(BaseModel):
    """One promise about memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)]
    artifact: str | None = None
    hub: str | None = None
    source: str | None = None
    recipe: str | None = None
    device: str
    context: Tokens
    sequences: PositiveCount = 1
    kv_dtype: Literal["auto", "bfloat16", "bf16", "fp8", "float16", "q8_0"] = "auto"
    runtime: str = "vllm"
    tp: PositiveCount | None = None
    pp: PositiveCount | None = None
    expert_parallel: bool = False
    hybrid: bool | None = None
    batched_tokens: Tokens | None = None
    max_num_seqs: PositiveCount | None = None
    max_positions: Tokens | None = None
    images: Annotated[int, Field(ge=0)] | None = None
    utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    gpu_layers: Annotated[int, Field(ge=0)] | None = None
    min_headroom: WrittenSize = 0
    quality: Gates | None = None
    licence: bool = False

    @model_validator(mode="after")
    def _one_subject(self) -> Check:
        if not self.name.isprintable():
            raise ValueError("'name' must be one printable line")
        if [self.artifact, self.hub, self.source].count(None) != 2:
            raise ValueError("give either 'artifact' or 'source', or 'hub'")
        if self.artifact is not None and self.recipe is not None:
            raise ValueError("'recipe' goes with 'source'; an artifact is quantized already")
        if self.quality is not None and self.artifact is None:
            raise ValueError("'quality' goes with 'artifact': what was measured lies in its folder")
        if self.licence and self.source is not None:
            raise ValueError("'licence' goes with 'artifact' or 'hub'")
        return self

    def load(self) -> Load:
        """The load in the memory model's terms."""
        return Load(**{name: getattr(self, name) for name in Load.__dataclass_fields__})


class CheckFile(BaseModel):
    """A checks file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: str | None = None
    checks: list[Check]

    @model_validator(mode="after")
    def _unlike_names(self) -> CheckFile:
        names = [check.name for check in self.checks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"checks: two are named '{repeated[0]}'")
        return self


@dataclass(frozen=True)
class CheckResult:
    """What became of one check of a file: a budget, or the error that kept it from being made.

    `changes` would make it fit; `broken` is what it does not keep of quality and licence; `line` is the check's in its
    file, from 1; `seconds` is what the check took.
    """

    check: Check
    file: Path
    found: Budget | None = None
    limits: LargestLoads | None = None
    error: L4packError | None = None
    changes: tuple[Suggestion, ...] = ()
    broken: tuple[L4packError, ...] = ()
    line: int = 1
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it fits at both ends with the headroom asked for, and keeps the rest."""
        return self.roomy and not self.broken

    @property
    def roomy(self) -> bool:
        """Whether it fits at both ends with the headroom asked for."""
        return self.found is not None and self.found.headroom_bytes >= self.check.min_headroom

    @property
    def exit_code(self) -> int:
        """That of the first thing that is wrong; 0 when nothing is."""
        if self.error:
            return self.error.exit_code
        return BudgetError.exit_code if not self.roomy else next((error.exit_code for error in self.broken), 0)

    @property
    def missing_headroom(self) -> bool:
        """Whether it fits, but not with the headroom asked for."""
        return self.found is not None and self.found.fits and not self.roomy

    def record(self) -> dict[str, Any]:
        """Plain data, stable keys."""
        head = {
            "name": self.check.name,
            "passed": self.passed,
            "min_headroom_bytes": self.check.min_headroom,
            "line": self.line,
            "seconds": self.seconds,
            "broken": [{"message": error.message, "hint": error.hint} for error in self.broken],
        }
        if self.found is None or self.limits is None:
            message = self.error.message if self.error else ""
            return head | {"error": message, "hint": self.error.hint if self.error else ""}
        return head | budget_record(self.found, self.limits, self.changes)


def load_checks(path: Path) -> CheckFile:
    """Read a checks file. Raises UsageError naming file and key, and for a file without checks: that proves nothing."""
    if not path.is_file():
        raise UsageError(f"{path} is not there", hint=HELP)
    values = read_yaml(path)
    _check_keys(values, path)
    try:
        file = validate(CheckFile, values, str(path))
    except RecipeError as error:
        raise UsageError(error.message, hint=HELP) from None
    if not file.checks:
        raise UsageError(f"{path} has no checks", hint="a file that checks nothing is no success: add a check")
    return file


def _check_keys(values: dict[str, Any], path: Path) -> None:
    """Name a misspelt key before the key it leaves missing is named."""
    checks = values.get("checks")
    for number, check in enumerate(checks if isinstance(checks, list) else []):
        for key in check if isinstance(check, dict) else ():
            if key not in Check.model_fields:
                close = get_close_matches(str(key), Check.model_fields, n=2) or list(Check.model_fields)
                raise UsageError(
                    f"{path}: checks.{number}: no key is named '{key}'", hint=f"did you mean {' or '.join(close)}?"
                )


@dataclass(frozen=True)
class Means:
    """What checks are run with, which the layers above bring: opening a subject, other recipes to try for one, and what
    an artifact does not keep of its quality and licence."""

    open: OpenSubject
    others: Callable[[str, Subject], Mapping[str, Callable[[], Subject]]]
    broken: Callable[[str, Gates | None, bool], Iterable[L4packError]]


def run_checks(path: Path, means: Means) -> list[CheckResult]:
    """Run every check of the file `path`; paths in it are relative to its folder. Raises UsageError for a bad file."""
    file, folder = load_checks(path), path.parent
    devices = load_devices(folder / file.devices if file.devices else None)
    means = replace(means, open=cache(means.open))
    lines = check_lines(path)
    return [_timed(check, path, line, devices, means) for check, line in zip(file.checks, lines, strict=True)]


def check_lines(path: Path) -> list[int]:
    """The line, from 1, on which each check of a file begins that `load_checks` has read."""
    root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    checks = next(value for key, value in root.value if key.value == "checks")
    return [check.start_mark.line + 1 for check in checks.value]


def exit_code(results: Iterable[CheckResult]) -> int:
    """0 when all hold; 3 when one does not fit; otherwise the code of the first thing that is wrong."""
    codes = [result.exit_code for result in results if not result.passed]
    return BudgetError.exit_code if BudgetError.exit_code in codes else codes[0] if codes else 0


def _timed(check: Check, path: Path, line: int, devices: dict[str, Device], means: Means) -> CheckResult:
    started = time.monotonic()
    result = _run(check, path, devices, means)
    return replace(result, line=line, seconds=round(time.monotonic() - started, 3))


def _run(check: Check, path: Path, devices: dict[str, Device], means: Means) -> CheckResult:
    load = check.load()
    try:
        place = _place(check, path.parent)
        subject = means.open(place, check.recipe)
        found = budget(subject, find_host(check.device, devices), load, check.runtime)
    except L4packError as error:
        return CheckResult(check, path, error=error)
    tried = () if found.fits else changes(found, load, check.runtime, devices, means.others(place, subject))
    broken = means.broken(place.removeprefix(HUB_SCHEME), check.quality, check.licence)
    return CheckResult(check, path, found, limits(found), changes=tuple(tried), broken=tuple(broken))


def _place(check: Check, folder: Path) -> str:
    """What a check names, as `open_source` takes it: an artifact is a folder here, only `hub` is always on the Hub."""
    if check.hub is not None:
        return _on_hub(f"{HUB_SCHEME}{check.hub.removeprefix(HUB_SCHEME)}", folder)
    named = check.artifact or check.source or ""
    beside = folder / named
    if exists(beside):
        return str(beside)
    if check.source is None:
        hint = "make it first; a repository on the Hub is named by `hub: ORG/NAME`"
        raise SourceError(f"there is no artifact {beside}", hint=hint)
    return named if named.lower() in (*KNOWN_MODELS, DEMO) else _on_hub(named, folder)


def _on_hub(named: str, folder: Path) -> str:
    repo_id, revision = hub_repository(named, folder)
    return f"{HUB_SCHEME}{repo_id}{f'@{revision}' if revision else ''}"
