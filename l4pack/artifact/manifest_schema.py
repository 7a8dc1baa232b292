"""The schema of `l4pack-manifest.json`: read with pydantic, shipped as JSON Schema for everybody else.

`manifest_schema.json` beside this file is made from these classes; a test holds the two together.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from l4pack.artifact.manifest import MANIFEST_NAME, SCHEMA_VERSION
from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.datafile import Sha256, first_fault, read_json, validate
from l4pack.errors import UsageError
from l4pack.recipe import Recipe

SCHEMA_FILE = Path(__file__).with_suffix(".json")
MAX_BYTES = 256 * 1024**2
RepositoryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterRecord(_Data):
    """A LoRA adapter that was merged into the source: `base` is the model it says it was trained on."""

    name: str
    repository: RepositoryName | None
    revision: str | None
    base: RepositoryName | None
    sha256: Sha256  # of its configuration's and its weights' digests


class SourceRecord(_Data):
    """The checkpoint an artifact was made from."""

    name: str
    repository: RepositoryName | None
    revision: str | None
    parameters: Annotated[int, Field(gt=0)]
    weight_bytes: Annotated[int, Field(ge=0)]
    headers_sha256: Sha256
    # Of a little of every tensor (`checkpoint/sample.py`); null where no file was kept to take it from.
    sample_sha256: Sha256 | None = None
    # What it was quantized to itself, where the artifact was made of products of codes and scales.
    dequantized_from: str | None = None
    adapters: list[AdapterRecord] = []  # merged into it in this order, as it was read


class CalibrationRecord(_Data):
    """What a calibrated artifact looked at."""

    text_sha256: Sha256
    tokens_sha256: Sha256


class FileRecord(_Data):
    """One file beside the weights."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class ShardRecord(_Data):
    """One weight file: its size, and the digest of all before its first tensor."""

    bytes: Annotated[int, Field(ge=0)]
    header_sha256: Sha256


class JobRecord(_Data):
    """The options of the command that made an artifact, as they are typed, but for its source and its folder.

    For a calibrated artifact, also what decides its bytes beside all that: where it was computed, and with what.
    """

    # A list is an option given several times, true one without a value.
    options: dict[str, str | bool | int | list[str]]
    computed_on: dict[str, str | int] | None = None


class TensorRecord(_Data):
    """One tensor of the artifact."""

    sha256: Sha256
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]


class ManifestFile(_Data):
    """A whole manifest."""

    schema_version: Literal[2]
    l4pack_version: str
    source: SourceRecord
    recipe: dict[str, Any]  # every default filled in, in the words of the version that wrote it
    calibration: CalibrationRecord | None = None
    files: dict[str, FileRecord]  # all but this one, and those that `package` and `evaluate` add
    shards: dict[str, ShardRecord]
    tensors: dict[str, TensorRecord]
    job: JobRecord

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(one.shape) * DTYPE_BITS[one.dtype] // 8 for one in self.tensors.values())

    def made_with(self) -> Recipe:
        """The recipe. Raises UsageError when this version does not know its words."""
        return validate(Recipe, self.recipe, f"{MANIFEST_NAME}: recipe")


def schema_json() -> str:
    """The JSON Schema of the current version, as the file holds it."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{MANIFEST_NAME}, version {SCHEMA_VERSION}",
        **{key: value for key, value in ManifestFile.model_json_schema().items() if key != "title"},
    }
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> ManifestFile:
    """An artifact's manifest. Raises UsageError naming what is wrong with it."""
    path = folder / MANIFEST_NAME
    hint = "name a folder that l4pack quantize made"
    if not path.exists():
        raise UsageError(f"{folder} has no {MANIFEST_NAME}", hint=hint)
    value = read_json(path, MAX_BYTES, hint)
    try:
        return ManifestFile.model_validate(value)
    except ValidationError as error:
        key, message = first_fault(error)
        raise UsageError(f"{path}: {key or 'the file'}: {message}", hint=hint) from error


def quantized_files(folder: Path, manifest: ManifestFile) -> dict[str, int]:
    """Every file that `quantize` wrote and its bytes: what `plan` plans, without what `evaluate` and `package` add."""
    files = {name: file.bytes for name, file in manifest.files.items()}
    shards = {name: shard.bytes for name, shard in manifest.shards.items()}
    return {**files, **shards, MANIFEST_NAME: (folder / MANIFEST_NAME).stat().st_size}


def artifact_bytes(folder: Path) -> int:
    """The size of an artifact, the same before it is made and after it is packaged. Raises UsageError."""
    return sum(quantized_files(folder, read_manifest(folder)).values())
