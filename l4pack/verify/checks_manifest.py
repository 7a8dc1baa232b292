"""Checks against the manifest: it must be whole, and everything that it speaks of must be as it says.

Digests of tensors are held against their bytes where these are read anyway (`checks_values`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from l4pack import __version__
from l4pack.artifact.manifest import MANIFEST_NAME, SCHEMA_VERSION
from l4pack.artifact.manifest_schema import MAX_BYTES, FileRecord, ManifestFile, ShardRecord
from l4pack.artifact.policy import written_files
from l4pack.artifact.stanza import quantization_config
from l4pack.checkpoint.header import LENGTH_BYTES
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.datafile import first_fault, parse_json
from l4pack.errors import UsageError
from l4pack.recipe import KEEP, Recipe
from l4pack.verify.findings import Findings
from l4pack.verify.opened import OpenedArtifact

_CHUNK = 8 * 1024**2


def read_manifest_of(artifact: OpenedArtifact, found: Findings) -> ManifestFile | None:
    """The manifest, None when there is none or it can't be believed, which is a finding."""
    if MANIFEST_NAME not in artifact.files:
        return None
    try:
        if artifact.files[MANIFEST_NAME] > MAX_BYTES:
            raise ValueError("it is implausibly large")
        value = parse_json((artifact.folder / MANIFEST_NAME).read_bytes())
        version = value.get("schema_version") if isinstance(value, dict) else None
        if isinstance(value, dict) and version != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {version!r}, this l4pack reads {SCHEMA_VERSION}: quantize again")
        manifest = ManifestFile.model_validate(value)
        manifest.made_with()
    except ValidationError as error:
        where, message = first_fault(error)
        found.error("manifest", MANIFEST_NAME, f"{where or 'the file'}: {message}")
    except ValueError as error:
        found.error("manifest", MANIFEST_NAME, f"can't be read: {error}")
    except UsageError as error:
        found.error("manifest", MANIFEST_NAME, error.message)
    else:
        return manifest
    return None


def check_manifest(artifact: OpenedArtifact, manifest: ManifestFile, found: Findings) -> None:
    """Files, headers, names, dtypes and shapes are those of the manifest, and config.json is what its recipe makes."""
    for name, record in manifest.files.items():
        if name not in written_files():
            _check_file(artifact, name, record, found)
    for name, shard in manifest.shards.items():
        _check_shard(artifact, name, shard, found)
    weights = {name for name in artifact.files if CONTAINER.is_weights(name)}
    for name in sorted(weights - manifest.shards.keys()):
        found.error("digest", name, "is a weight file that the manifest does not have")
    if CONTAINER.config_name not in manifest.files:
        found.error("manifest", MANIFEST_NAME, f"says nothing of {CONTAINER.config_name}")
    _check_tensors(artifact, manifest, found)
    _check_stanza(artifact, manifest, found)


def _check_file(artifact: OpenedArtifact, name: str, record: FileRecord, found: Findings) -> None:
    if name not in artifact.files:
        found.error("digest", name, "is in the manifest and not here")
    elif artifact.files[name] != record.bytes:
        found.error("digest", name, f"has {artifact.files[name]:,} bytes, {record.bytes:,} in the manifest")
    elif _sha256(artifact.folder / name, record.bytes) != record.sha256:
        found.error("digest", name, "its SHA-256 is not the manifest's")


def _check_shard(artifact: OpenedArtifact, name: str, record: ShardRecord, found: Findings) -> None:
    if name not in artifact.files:
        found.error("digest", name, "is in the manifest and not here")
    elif artifact.files[name] != record.bytes:
        found.error("digest", name, f"has {artifact.files[name]:,} bytes, {record.bytes:,} in the manifest")
    elif name not in artifact.unreadable:
        with (artifact.folder / name).open("rb") as stream:
            size = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if _sha256(artifact.folder / name, LENGTH_BYTES + size) != record.header_sha256:
            found.error("digest", name, "the SHA-256 of its header is not the manifest's")


def _sha256(path: Path, size: int) -> str:
    """Of the first bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while size > 0 and (chunk := stream.read(min(size, _CHUNK))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def _check_tensors(artifact: OpenedArtifact, manifest: ManifestFile, found: Findings) -> None:
    for name in sorted(manifest.tensors.keys() - artifact.entries.keys()):
        found.error("digest", name, "is in the manifest and not in the files")
    for name in sorted(artifact.entries.keys() - manifest.tensors.keys()):
        found.error("digest", name, "is in the files and not in the manifest")
    for name, record in manifest.tensors.items():
        entry = artifact.entries.get(name)
        if entry is not None and (entry.dtype, entry.shape) != (record.dtype, tuple(record.shape)):
            message = f"is {entry.dtype} {list(entry.shape)}, {record.dtype} {record.shape} in the manifest"
            found.error("digest", name, message)


def _check_stanza(artifact: OpenedArtifact, manifest: ManifestFile, found: Findings) -> None:
    """Another version may have had other words for the same recipe."""
    if manifest.l4pack_version != __version__ or not artifact.stanza:
        return
    expected = stanza_of(manifest.made_with(), artifact)
    for key in [*expected, *(key for key in artifact.stanza if key not in expected)]:
        if _text(artifact.stanza.get(key)) != _text(expected.get(key)):
            found.error(
                "manifest", f"quantization_config.{key}", "is not what the manifest's recipe makes of this model"
            )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def stanza_of(recipe: Recipe, artifact: OpenedArtifact) -> Mapping[str, Any]:
    """The quantization_config that a recipe makes of the artifact's model."""
    layers = artifact.config.text.num_hidden_layers
    assigned = []
    for linear in artifact.layout.linears:
        number = recipe.rule_for(linear.role, linear.layer, layers)
        name = KEEP if number is None else recipe.rules[number].scheme
        assigned.append((linear, None if name == KEEP else name))
    vision = artifact.config.vision is not None
    return quantization_config(recipe.schemes, assigned, vision=vision, kv_cache=recipe.kv_cache)
