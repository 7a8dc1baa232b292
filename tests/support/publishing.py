"""Names and helpers of the tests of packaging and pushing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l4pack.artifact.policy import Policy, policies

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
