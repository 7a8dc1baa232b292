"""`l4pack-manifest.json`: what an artifact was made from, how, and the digest of everything else in it.

Three sections hold the artifact: `files` (size and SHA-256 of every file beside the weights), `shards` (size, and SHA-256
of all before the first tensor) and `tensors` (dtype, shape and SHA-256). Version 1 had the tensors' digests alone.

Nothing in it depends on the clock, the machine or a path, so the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from l4pack import __version__
from l4pack.checkpoint.adapter import Adapter
from l4pack.checkpoint.header import TypedTensor
from l4pack.checkpoint.source import HUB_ID, Checkpoint
from l4pack.datafile import parse_json
from l4pack.recipe import Recipe

MANIFEST_NAME = "l4pack-manifest.json"
SCHEMA_VERSION = 2
SAMPLE = "sample_sha256"
UNKNOWN = "0" * 64  # stands in a plan for a SHA-256 that only the run will know
# Room for what a calibrated job knows of its text and its machine only when it begins: file sizes are planned before.
JOB_ROOM = 2560
_CACHE_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")
EARLIER_OPTIONS = {"--text": "--calibration", "--samples": "--calibration-samples"}
"""Options of `l4pack quantize` by what they were called before, which journals and manifests may still say."""


@dataclass(frozen=True)
class Manifest:
    """The part of a manifest known before the first weight is read."""

    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    calibration: Mapping[str, str] | None = (
        None  # SHA-256 of the text and of the tokens a calibrated artifact looked at
    )
    options: Mapping[str, Any] = field(default_factory=dict)  # the command's, as they are typed
    computed_on: Mapping[str, Any] | None = None  # what decides a calibrated artifact's bytes beside its input

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe) -> Manifest:
        """The manifest of an artifact to be made; a calibrated one's digests are zeros until its text is known."""
        unknown = {"text_sha256": "0" * 64, "tokens_sha256": "0" * 64}
        pinned = None if recipe.calibration is None else unknown
        fetches = checkpoint.store is not None and checkpoint.store.fetches
        source = {**source_record(checkpoint), SAMPLE: None if fetches else UNKNOWN}
        return cls(source, recipe.model_dump(mode="json"), pinned)

    def sampled(self, sha256: str | None) -> Manifest:
        """The same manifest with the digest of the source's weights, now that they were read."""
        return replace(self, source={**self.source, SAMPLE: sha256})

    def head(self) -> bytes:
        """The file's first bytes, which say what was made and from what, up to the digests."""
        job: dict[str, Any] = {"options": self.options}
        if self.calibration is None:
            return _opened({**self._known(), "job": job})
        size = len(_opened(self._known())) + JOB_ROOM
        text = _opened({**self._known(), "job": {**job, "computed_on": self.computed_on}})
        if len(text) > size:
            raise RuntimeError(f"{MANIFEST_NAME} begins with {len(text)} bytes, {size} were planned")
        return text.ljust(size)

    def describes(self, raw: bytes) -> bool:
        """Whether a file's bytes are a manifest of this job, whatever machine computed it.

        Of the source its weights are left out: that takes reading them.
        """
        try:
            value = parse_json(raw)
            options = {EARLIER_OPTIONS.get(name, name): given for name, given in value["job"]["options"].items()}
            found = {**value, "source": {**value["source"], SAMPLE: UNKNOWN}, "options": options}
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        known = {**self.sampled(UNKNOWN)._known(), "options": self.options}
        return {key: found.get(key) for key in known} == known

    def _known(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "l4pack_version": __version__,
            "source": self.source,
            "recipe": self.recipe,
            **({} if self.calibration is None else {"calibration": self.calibration}),
        }

    def to_json(self, contents: Contents) -> bytes:
        """The file's bytes; everything in the artifact takes a line."""
        sections = (f' "{name}": {{\n{_lines(values)}\n }}' for name, values in asdict(contents).items())
        return self.head() + ",\n".join(["", *sections]).encode() + b"\n}\n"


@dataclass(frozen=True)
class Contents:
    """What is in an artifact, by name: the records of its files beside the weights, its weight files and its tensors."""

    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def file_record(nbytes: int, sha256: str = UNKNOWN) -> dict[str, Any]:
    """One file beside the weights."""
    return {"bytes": nbytes, "sha256": sha256}


def shard_record(nbytes: int, prefix: bytes) -> dict[str, Any]:
    """One weight file; `prefix` is all before its first tensor."""
    return {"bytes": nbytes, "header_sha256": hashlib.sha256(prefix).hexdigest()}


def tensor_record(tensor: TypedTensor, sha256: str = UNKNOWN) -> dict[str, Any]:
    """One tensor."""
    return {"sha256": sha256, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _opened(value: Mapping[str, Any]) -> bytes:
    """JSON of an object, to which more keys may be added."""
    return json.dumps(value, indent=1, ensure_ascii=False).removesuffix("\n}").encode()


def _lines(values: Mapping[str, Any]) -> str:
    lines = (f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(value)}" for name, value in sorted(values.items()))
    return ",\n".join(lines)


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
        **({} if checkpoint.dequantized is None else {"dequantized_from": checkpoint.dequantized}),
        **({"adapters": [adapter_record(adapter) for adapter in checkpoint.adapters]} if checkpoint.adapters else {}),
    }


def adapter_record(adapter: Adapter) -> dict[str, Any]:
    """What an adapter that was merged into a source is, without where it lies on this machine."""
    base = adapter.config.base_model_name_or_path
    return {
        "name": adapter.name,
        "repository": adapter.files.repository,
        "revision": adapter.files.revision,
        "base": base if base is not None and HUB_ID.fullmatch(base) else None,
        "sha256": adapter.sha256,
    }


def _folder_name(name: str) -> str:
    """A folder's own name, with a mark for bytes that are no text."""
    return os.fsencode(Path(name).absolute().name).decode(errors="replace")


def repository(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """The Hub repository and commit a checkpoint came from, as far as its name or cache folder tells."""
    match = _CACHE_FOLDER.search(os.fspath(Path(checkpoint.name).absolute())) if checkpoint.store else None
    if match:
        return f"{match[1]}/{match[2]}", match[3]
    named = HUB_ID.fullmatch(checkpoint.name) if checkpoint.revision else None
    return (named[1], checkpoint.revision) if named else (None, None)
