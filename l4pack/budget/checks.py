"""Budgets as code: `l4pack-budget.yaml` declares checks, and all of them are run.

checks:
  - name: scout-int4-1xh100
    artifact: out/scout-int4          # a folder; or `hub: ORG/NAME`; or `source:` with `recipe:`
    device: h100
    context: 131072
    sequences: 1
    min_headroom: 0.25GiB
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from l4pack.budget.devices import Device, WrittenSize, find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.model import Budget, budget
from l4pack.budget.record import budget_record
from l4pack.budget.solve import LargestLoads, limits
from l4pack.budget.subject import Subject
from l4pack.checkpoint.open import DEMO, HUB_SCHEME, exists, hub_repository
from l4pack.datafile import PositiveCount, read_yaml, validate
from l4pack.errors import L4packError, RecipeError, SourceError, UsageError
from l4pack.model.config import KNOWN_MODELS

DEFAULT_FILE = "l4pack-budget.yaml"
HELP = "see docs/how-to/budget-in-ci.md"
OpenSubject = Callable[[str, str | None], Subject]


class Check(BaseModel):
    """One promise about memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)]
    artifact: str | None = None
    hub: str | None = None
    source: str | None = None
    recipe: str | None = None
    device: str
    context: PositiveCount
    sequences: PositiveCount = 1
    kv_dtype: Literal["auto", "bfloat16", "bf16", "fp8"] = "auto"
    runtime: str = "vllm"
    tp: PositiveCount | None = None
    pp: PositiveCount | None = None
    expert_parallel: bool = False
    hybrid: bool | None = None
    batched_tokens: PositiveCount | None = None
    max_num_seqs: PositiveCount | None = None
    max_positions: PositiveCount | None = None
    images: Annotated[int, Field(ge=0)] | None = None
    utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    min_headroom: WrittenSize = 0

    @model_validator(mode="after")
    def _one_subject(self) -> Check:
        if not self.name.isprintable():
            raise ValueError("'name' must be one printable line")
        if [self.artifact, self.hub, self.source].count(None) != 2:
            raise ValueError("give either 'artifact' or 'source', or 'hub'")
        if self.artifact is not None and self.recipe is not None:
            raise ValueError("'recipe' goes with 'source'; an artifact is quantized already")
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
    """What became of one check of a file: a budget, or the error that kept it from being made."""

    check: Check
    file: Path
    found: Budget | None = None
    limits: LargestLoads | None = None
    error: L4packError | None = None

    @property
    def passed(self) -> bool:
        """Whether it fits at both ends with the headroom asked for."""
        return self.found is not None and self.found.headroom_bytes >= self.check.min_headroom

    @property
    def missing_headroom(self) -> bool:
        """Whether it fits, but not with the headroom asked for."""
        return self.found is not None and self.found.fits and not self.passed

    def record(self) -> dict[str, Any]:
        """Plain data, stable keys."""
        head = {"name": self.check.name, "passed": self.passed, "min_headroom_bytes": self.check.min_headroom}
        if self.found is None or self.limits is None:
            message = self.error.message if self.error else ""
            return head | {"error": message, "hint": self.error.hint if self.error else ""}
        return head | budget_record(self.found, self.limits)


def load_checks(path: Path) -> CheckFile:
    """Read a checks file. Raises UsageError naming file and key, and for a file without checks: that proves nothing."""
    if not path.is_file():
        raise UsageError(f"{path} is not there", hint=f"write {DEFAULT_FILE}; {HELP}")
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


def run_checks(path: Path, open_subject: OpenSubject) -> list[CheckResult]:
    """Run every check of the file `path`; paths in it are relative to its folder. Raises UsageError for a bad file."""
    file, folder = load_checks(path), path.parent
    devices = load_devices(folder / file.devices if file.devices else None)
    opened: dict[tuple[str, str | None], Subject] = {}

    def opening(source: str, recipe: str | None) -> Subject:
        key = (source, recipe)
        if key not in opened:
            opened[key] = open_subject(source, recipe)
        return opened[key]

    return [_run(check, path, devices, opening) for check in file.checks]


def exit_code(results: Iterable[CheckResult]) -> int:
    """0 when all hold; 3 when one does not fit; otherwise the code of the first error."""
    failed = [result for result in results if not result.passed]
    errors = [result.error.exit_code for result in failed if result.error]
    return 0 if not failed else errors[0] if len(errors) == len(failed) else 3


def _run(check: Check, path: Path, devices: dict[str, Device], opening: OpenSubject) -> CheckResult:
    try:
        subject = opening(_place(check, path.parent), check.recipe)
        found = budget(subject, find_host(check.device, devices), check.load(), check.runtime)
    except L4packError as error:
        return CheckResult(check, path, error=error)
    return CheckResult(check, path, found, limits(found))


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
