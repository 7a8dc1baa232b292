"""Names and helpers of the tests of packaging and pushing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from l4pack.artifact.policy import Policy, policies
from l4pack.checkpoint.source import open_folder
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe

SECRET = "hf_ThisMustNeverBeSeen"
NAME = "Llama-4-Tiny-W4A16-g128"
REPO = f"me/{NAME}"
BASE = "meta-llama/Llama-4-Tiny"


def policy_named(name: str) -> Policy:
    """A shipped policy."""
    return next(policy for policy in policies() if policy.policy == name)


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an artifact's manifest."""
    path = folder / "l4pack-manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def made(source: Path, out: Path, recipe: dict[str, Any]) -> Path:
    """An artifact of a source, by a recipe that changes `int4-rtn`."""
    file = out.with_name("own.yaml")
    file.write_text(yaml.safe_dump({"name": "own", "title": "Int4, rounded", "extends": "int4-rtn", **recipe}))
    run_plan(make_plan(open_folder(source), load_recipe(str(file))), out)
    return out
