"""`l4pack-manifest.json`: what an artifact was made from, how, and the digest of every tensor in it.

Nothing in it depends on the clock, the machine or a path, so the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4pack import __version__
from l4pack.checkpoint.source import HUB_ID, Checkpoint
from l4pack.recipe import Recipe

MANIFEST_NAME = "l4pack-manifest.json"
SCHEMA_VERSION = 1
_CACHE_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")


@dataclass(frozen=True)
class Manifest:
    """The part of a manifest known before the first weight is read."""

    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    calibration: Mapping[str, str] | None = (
        None  # SHA-256 of the text and of the tokens a calibrated artifact looked at
    )

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe) -> Manifest:
        """The manifest of an artifact to be made; a calibrated one's digests are zeros until its text is known."""
        unknown = {"text_sha256": "0" * 64, "tokens_sha256": "0" * 64}
        pinned = None if recipe.calibration is None else unknown
        return cls(source_record(checkpoint), recipe.model_dump(mode="json"), pinned)

    def to_json(self, digests: Mapping[str, str]) -> bytes:
        """The file's bytes, given the hex SHA-256 of every tensor."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "l4pack_version": __version__,
            "source": self.source,
            "recipe": self.recipe,
            **({} if self.calibration is None else {"calibration": self.calibration}),
            "tensors": {name: {"sha256": digest} for name, digest in sorted(digests.items())},
        }
        return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def source_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is, without where it lies on this machine."""
    repo, revision = repository(checkpoint)
    headers = hashlib.sha256()
    for entry in sorted(checkpoint.entries.values(), key=lambda entry: entry.name):
        headers.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
    return {
        "name": repo.rpartition("/")[2] if repo else _folder_name(checkpoint.name),
        "repository": repo,
        "revision": revision,
        "parameters": checkpoint.layout.parameters,
        "weight_bytes": checkpoint.weight_bytes,
        "headers_sha256": headers.hexdigest(),
    }


def _folder_name(name: str) -> str:
    """A folder's own name, with a mark for bytes that are no text."""
    return os.fsencode(Path(name).absolute().name).decode(errors="replace")


def repository(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """The Hub repository and commit a checkpoint came from, as far as its name or cache folder tells."""
    match = _CACHE_FOLDER.search(checkpoint.name)
    if match:
        return f"{match[1]}/{match[2]}", match[3]
    named = HUB_ID.fullmatch(checkpoint.name) if checkpoint.revision else None
    return (named[1], checkpoint.revision) if named else (None, None)
