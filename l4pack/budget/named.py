"""From what a user names to what a budget is made for: an artifact, a source, or an artifact to come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from l4pack.budget.subject import Subject, from_config, from_entries
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError
from l4pack.plan.assign import assign
from l4pack.recipe import load_recipe

ALTERNATIVES = ("fp8", "int4")


def open_subject(source: str, recipe: str | None = None) -> Subject:
    """The subject of an artifact folder, a checkpoint, a bare configuration, or any of these under a recipe.

    Raises SourceError (nothing there, damaged, or quantized already when a recipe is asked for), RecipeError.
    """
    checkpoint = open_source(source)
    return planned(checkpoint, recipe) if recipe else _as_it_is(checkpoint)


def planned(checkpoint: Checkpoint, recipe: str) -> Subject:
    """The artifact to come: the tensors that quantizing would write, from headers or a configuration alone."""
    if checkpoint.config.quantized:
        raise SourceError(f"{checkpoint.name} is quantized already", hint="leave --recipe out")
    loaded = load_recipe(recipe)
    tensors = tuple(tensor for group in assign(checkpoint, loaded).groups for tensor in group)
    return Subject(checkpoint.name, checkpoint.config, tensors, loaded.name)


def alternatives(source: str, subject: Subject) -> dict[str, Callable[[], Subject]]:
    """Other recipes worth trying for a subject that is not an artifact yet."""
    if subject.config.quantized:
        return {}
    checkpoint = open_source(source)
    return {name: partial(planned, checkpoint, name) for name in ALTERNATIVES}


def candidate_subjects(sources: Iterable[str], recipe: str | None) -> list[Subject]:
    """What a table of budgets compares: each source as it is and under the generic recipes, or under one."""
    found = []
    for source in sources:
        checkpoint = open_source(source)
        names = [recipe] if recipe else [] if checkpoint.config.quantized else ALTERNATIVES
        found += [] if recipe else [_as_it_is(checkpoint)]
        found += [planned(checkpoint, name) for name in names]
    return found


def _as_it_is(checkpoint: Checkpoint) -> Subject:
    if checkpoint.bare:
        if checkpoint.config.quantized:
            raise SourceError(f"{checkpoint.name} describes a quantized model", hint="give the artifact's folder")
        return from_config(checkpoint.name, checkpoint.config)
    return from_entries(checkpoint.name, checkpoint.config, checkpoint.entries.values())
