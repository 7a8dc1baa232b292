"""From what a user names to what a budget is made for: an artifact, a source, or an artifact to come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from l4pack.artifact.manifest_schema import read_manifest
from l4pack.budget.files import FileSubject, open_files
from l4pack.budget.load import Load
from l4pack.budget.subject import Subject, from_config, from_entries
from l4pack.checkpoint.open import exists, open_source
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError, UsageError
from l4pack.model.config import KNOWN_MODELS, Llama4Config, known_config
from l4pack.plan.assign import assign
from l4pack.recipe import Promise, Recipe, load_recipe, recipe_names

ALTERNATIVES = ("fp8", "int4")
DEFAULT_DEVICE = "h100"


@dataclass(frozen=True)
class Asked:
    """What a budget is asked for: None is for what a recipe promises, where one does, or else the usual."""

    source: str
    recipe: str | None
    device: str | None
    load: Load
    sequences: int | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True)
class Question:
    """What a budget is made for, with the promise it follows, and the recipe that makes it."""

    source: str
    recipe: str | None
    subject: Subject
    device: str
    load: Load
    promised_by: str | None


def question_of(asked: Asked) -> Question:
    """Open what is named, and fill in from the recipe's promise what was not said.

    A shipped recipe that promises a model may stand for both. Raises SourceError, RecipeError and UsageError.
    """
    source, recipe = _named(asked.source, asked.recipe)
    subject = open_subject(source, recipe)
    made = _made_with(source, recipe)
    promise = made.promise if made and _is_for(made.promise, subject.config) else None
    promised = promise or _Nothing()
    load = replace(
        asked.load,
        context=asked.load.context or promised.context,
        sequences=asked.sequences or promised.sequences,
        kv_dtype=asked.kv_dtype or promised.kv_dtype,
    )
    device = asked.device or promised.device
    return Question(source, recipe, subject, device, load, made.name if made and promise else None)


@dataclass(frozen=True)
class _Nothing:
    """What is taken where no recipe promises anything."""

    device: str = DEFAULT_DEVICE
    context: int | None = None
    sequences: int = 1
    kv_dtype: str = "auto"


def _named(source: str, recipe: str | None) -> tuple[str, str | None]:
    """Source and recipe; a shipped recipe alone names the model that it promises."""
    if recipe is not None or source not in recipe_names() or exists(Path(source)):
        return source, recipe
    promise = load_recipe(source).promise
    if promise is None:
        hint = f"name the model too: l4pack budget llama-4-scout --recipe {source}"
        raise UsageError(f"{source} is a recipe, and made for no model in particular", hint=hint)
    return promise.model, source


def _made_with(source: str, recipe: str | None) -> Recipe | None:
    """The recipe named, or the one that an artifact says it was made with."""
    if recipe is not None:
        return load_recipe(recipe)
    try:
        return read_manifest(Path(source)).made_with()
    except UsageError:  # no artifact of ours, or a manifest that `verify` has words for
        return None


def _is_for(promise: Promise | None, config: Llama4Config) -> bool:
    """Whether a promise speaks of this model, not of a stand-in or another one."""
    return promise is not None and promise.model in KNOWN_MODELS and known_config(promise.model).text == config.text


def open_subject(source: str, recipe: str | None = None) -> Subject:
    """The subject of an artifact folder, a checkpoint, a bare configuration, or any of these under a recipe.

    Raises SourceError (nothing there, damaged, or quantized already when a recipe is asked for), RecipeError.
    """
    files = open_files(Path(source))
    if files is not None:
        if recipe:
            raise SourceError(f"{source} is made already", hint="leave --recipe out")
        return files
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
    if subject.config.quantized or isinstance(subject, FileSubject):
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
