"""Writing a checks file to begin with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.model import Budget, budget
from l4pack.budget.named import Asked, Question, question_of
from l4pack.budget.solve import max_context
from l4pack.checkpoint.open import exists
from l4pack.errors import BudgetError, UsageError
from l4pack.units import GIB
from l4pack.work.files import write_atomic

HEADROOM_STEP = GIB // 4


def write_checks(asked: Asked, path: Path) -> dict[str, Any]:
    """Write one check that holds now, half of its headroom asked for; the check's keys as written.

    Raises BudgetError when it does not hold, UsageError when there is such a file already, and what opening raises.
    """
    if path.exists():
        raise UsageError(f"{path} is there already", hint="add a check to it by hand, or name another with --out")
    question = question_of(asked)
    host = find_host(question.device, load_devices())
    found = budget(question.subject, host, question.load)
    if not found.fits:
        hint = f"l4pack budget {asked.source} --device {host.name} says what would; {max_context(found):,} tokens fit"
        raise BudgetError(f"{host.name} {found.lacking('lacks')}", hint=hint)
    check = _check(question, found, path.parent)
    text = "# Checked by `l4pack budget check`.\n" + yaml.safe_dump({"checks": [check]}, sort_keys=False)
    write_atomic(path, text.encode())
    return check


def _check(question: Question, found: Budget, folder: Path) -> dict[str, Any]:
    setting, subject = found.setting, found.subject
    return {
        "name": question.promised_by or "-".join(filter(None, (subject.name, subject.recipe, found.host.name))),
        **_place(question, folder),
        "device": found.host.name,
        "context": setting.context,
        "sequences": setting.sequences,
        "kv_dtype": setting.kv_dtype,
        "min_headroom": found.headroom_bytes // 2 // HEADROOM_STEP * HEADROOM_STEP,
    }


def _place(question: Question, folder: Path) -> dict[str, Any]:
    """How the file names the subject: a folder by its way from the file's."""
    source, recipe = question.source, question.recipe
    here = Path(source)
    name = os.path.relpath(here, folder) if exists(here) else source
    if recipe is not None:
        return {"source": name, "recipe": recipe}
    if question.subject.config.quantized:
        return {"artifact" if exists(here) else "hub": name}
    return {"source": name}
