"""What runs where: models x recipes x devices in one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from l4pack.budget.devices import Host
from l4pack.budget.load import Load, longest_context
from l4pack.budget.model import Budget, budget
from l4pack.budget.solve import max_context
from l4pack.budget.subject import Subject
from l4pack.errors import UsageError

HOSTS = ("rtx5090", "rtx6000-pro", "a100-80", "h100", "2xh100", "4xh100", "8xh100", "h200", "8xh200", "b200", "mi300x")


@dataclass(frozen=True)
class Cell:
    """The largest context that fits on a host, at the dear end and at the cheap one; 0 when the weights don't fit.

    `gpus` is what one copy takes of the host's; None where the runtime would refuse to split the model so.
    """

    host: str
    max_context: int
    max_context_high: int
    gpus: int | None = None


@dataclass(frozen=True)
class Row:
    """One model under one recipe on every host."""

    model: str
    recipe: str | None
    weight_bytes: int
    longest: int
    cells: tuple[Cell, ...]

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "weight_bytes": self.weight_bytes,
            "cells": [
                {"device": cell.host, "max_context": cell.max_context, "max_context_high": cell.max_context_high}
                for cell in self.cells
            ],
        }


def matrix(subjects: Iterable[Subject], hosts: Sequence[Host], load: Load, runtime: str) -> list[Row]:
    """The largest context of each subject on each host; 0 where the runtime would refuse it."""
    return [_row(subject, hosts, load, runtime) for subject in subjects]


def _row(subject: Subject, hosts: Sequence[Host], load: Load, runtime: str) -> Row:
    cells = tuple(_cell(subject, host, load, runtime) for host in hosts)
    longest = longest_context(subject.config.text)
    return Row(subject.name, subject.recipe, subject.weight_bytes, longest, cells)


def _cell(subject: Subject, host: Host, load: Load, runtime: str) -> Cell:
    found = _try(subject, host, load, runtime)
    if found is None:
        return Cell(host.name, 0, 0)
    return Cell(host.name, max_context(found), max_context(found, high=False), found.setting.gpus)


def _try(subject: Subject, host: Host, load: Load, runtime: str) -> Budget | None:
    try:
        return budget(subject, host, replace(load, context=1), runtime)
    except UsageError:
        return None
