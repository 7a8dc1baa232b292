"""Recipes that are rounded in seconds and hold every kind of matrix that can be exported."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.export.ahead import check_ahead
from l4pack.plan.plan import make_plan
from l4pack.recipe import Recipe, load_recipe, recipe_names

_INT: dict[str, Any] = {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32}
SCHEMES: dict[str, dict[str, Any]] = {
    "int4-g32": _INT,
    "int4-g64": {**_INT, "group_size": 64},
    "int4-asym": {**_INT, "symmetric": False},
    "int4-float32": {**_INT, "scale_dtype": "float32"},
    "int8-g64": {**_INT, "num_bits": 8, "group_size": 64},
    "int8-channel": {**_INT, "num_bits": 8, "strategy": "channel", "group_size": None},
    "int8-asym": {**_INT, "num_bits": 8, "symmetric": False},
    "q4_k": {"format": "ggml-q4_k", "num_bits": 4, "scale_dtype": "q4_k"},
    "mxfp4": {"format": "mxfp4-pack-quantized", "num_bits": 4, "type": "float", "group_size": 32},
    "nvfp4": {
        "format": "nvfp4-pack-quantized",
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
    },
    "fp8": {"format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "channel"},
}


def recipe_of(**schemes: str) -> Recipe:
    """Roles by their schemes of `SCHEMES`; all else is kept."""
    names = sorted(set(schemes.values()))
    rules = [{"roles": [role for role in schemes if schemes[role] == name], "scheme": name} for name in names]
    return Recipe.model_validate(
        {
            "name": "export",
            "title": "a mix",
            "schemes": {name: SCHEMES[name] for name in names},
            "rules": [*rules, {"roles": "all", "scheme": "keep"}],
        }
    )


@cache
def carried(container: str) -> list[str]:
    """Shipped recipes without a promise that a container carries exactly."""
    maverick = open_source("llama-4-maverick")
    return [
        name for name in recipe_names() if load_recipe(name).promise is None and _carries(container, maverick, name)
    ]


def _carries(container: str, source: Checkpoint, name: str) -> bool:
    try:
        check_ahead(make_plan(source, load_recipe(name)), (container,))
    except UsageError:
        return False
    return True


WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "intermediate_size_mlp": 256,
}  # groups and super-blocks divide these
MIX = recipe_of(routed_expert="int4-g64", shared_expert="int8-g64", dense_mlp="int8-g64", attention="int8-channel")
"""What every runtime's container carries exactly."""


def with_merge(source: Path, folder: Path) -> Path:
    """A copy of a tiny checkpoint whose tokenizer merges a pair: llama.cpp loads none that has only bytes."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    last = tokenizer["added_tokens"].pop()
    tokenizer["model"]["vocab"]["th"] = last["id"]
    tokenizer["model"]["merges"] = [["t", "h"]]
    path.write_text(json.dumps(tokenizer))
    return folder
