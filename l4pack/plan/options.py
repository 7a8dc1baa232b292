"""The command line that makes an artifact, as its manifest keeps it, and the recipe as parts of a job's identity."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from l4pack.containers.safetensors_folder import DEFAULT_SHARD_BYTES
from l4pack.recipe import CALIBRATION_OPTIONS, Recipe, load_recipe, recipe_names
from l4pack.work.identity import flat

_RECIPE = "recipe: "
JobOptions = dict[str, str | int | list[str]]  # a list is an option given several times, true one without a value


def plan_options(recipe: Recipe, shard_bytes: int, included: Sequence[str]) -> JobOptions:
    """Options of `l4pack quantize` that are known before the text is; those that don't decide bytes are left out.

    A recipe that is not shipped is named as the file that holds what the manifest says of it.
    """
    size = {} if shard_bytes == DEFAULT_SHARD_BYTES else {"--shard-size": f"{shard_bytes}B"}
    files: JobOptions = {"--include": list(included)} if included else {}
    flags: JobOptions = {"--keep-float32": True} if recipe.keep_float32 else {}
    return {"--recipe": recipe.name if _shipped(recipe) else f"{recipe.name}.yaml", **size, **files, **flags}


def text_options(recipe: Recipe, record: Mapping[str, Any]) -> JobOptions:
    """Options of the text to calibrate with, from its record."""
    assert recipe.calibration is not None
    return {
        "--calibration": os.fsencode(str(record["source"])).decode(errors="replace"),
        "--calibration-samples": recipe.calibration.samples,
        "--sequence-length": int(record["sequence_length"]),
        "--seed": recipe.calibration.seed,
    }


def recipe_parts(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe but for those that are options, which name them."""
    parts = {f"{_RECIPE}{key}": value for key, value in recipe.model_dump(mode="json", exclude={"name"}).items()}
    found: dict[str, Any] = {}
    for name, value in parts.items():
        found |= flat(value, name)
    for key in ("keep_float32", *(f"calibration.{name}" for name in CALIBRATION_OPTIONS)):
        found.pop(f"{_RECIPE}{key}", None)
    return found


def _shipped(recipe: Recipe) -> bool:
    return recipe.name in recipe_names() and recipe_parts(recipe) == _shipped_parts(recipe.name)


@cache
def _shipped_parts(name: str) -> dict[str, Any]:
    return recipe_parts(load_recipe(name))
