"""`l4pack-calibration.json`: what calibration did to every matrix, which experts saw how many tokens, and how large
keys and values became.

The file's size is part of the plan, so it is known before the first token runs: room for the longest entry of every
matrix, filled up with spaces. Nothing in it depends on the clock or a path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from l4pack.datafile import read_json, validate
from l4pack.model.config import TextConfig

RECORD_NAME = "l4pack-calibration.json"
SCHEMA_VERSION = 1
MAX_BYTES = 200_000_000
HINT = "calibrate again, or remove the file"
_HEAD, _PER_MATRIX, _PER_EXPERT, _PER_LAYER, _PER_KV_AMAX = 4096, 320, 12, 64, 16
_PER_TWO_SIDED = 224  # more of a matrix that is solved by both sides


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class MatrixRecord(_Data):
    """What became of one matrix; one whose inputs only were looked at has `input_amax` and no `error`."""

    method: Literal["gptq", "rtn"] | None = None


class CalibrationFile(_Data):
    """As much of the file as others read."""

    schema_version: Literal[1]
    text: dict[str, Any]
    routed_tokens: dict[str, list[Annotated[int, Field(ge=0, le=2**60)]]]
    matrices: dict[str, MatrixRecord]


def read_calibration(folder: Path) -> dict[str, Any] | None:
    """An artifact's calibration record, None where it has none. Raises UsageError naming what is wrong with it."""
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    value = read_json(path, MAX_BYTES, HINT)
    validate(CalibrationFile, value, RECORD_NAME, HINT)
    return value


def record_bytes(
    text: TextConfig, modules: Iterable[str], cache_shapes: Iterable[Sequence[int]], two_sided: int = 0
) -> int:
    """Size of the file for the matrices that calibration looks at and the scales of the KV cache it finds; as many of the
    former are `two_sided`."""
    experts = len(text.moe_layers) * text.num_local_experts
    matrices = sum(_PER_MATRIX + len(module) for module in modules)
    cache = sum(_PER_LAYER + _PER_KV_AMAX * math.prod(shape) for shape in cache_shapes)
    return (
        _HEAD
        + matrices
        + _PER_LAYER * text.num_hidden_layers
        + _PER_EXPERT * experts
        + cache
        + _PER_TWO_SIDED * two_sided
    )


def record_json(
    text_record: Mapping[str, Any], results: Mapping[str, Any], size: int, gradient: Mapping[str, int] | None = None
) -> bytes:
    """The file's `size` bytes: the text, what of it the walk back looked at, if there was one, and the results of a job by
    unit, routed tokens among them by layer."""
    matrices: dict[str, dict[str, Any]] = {}
    for unit in results.values():
        for name, found in unit.get(
            "matrices", {}
        ).items():  # one that is solved, and its inputs looked at, has two parts
            matrices[name] = {**matrices.get(name, {}), **found}
    lines = [f'  "{name}": {json.dumps(matrices[name])}' for name in sorted(matrices)]
    layers = [
        f'  "{name}": {json.dumps(found["tokens"])}' for name, found in sorted(results.items()) if "tokens" in found
    ]
    cache = {name: found for unit in results.values() for name, found in unit.get("kv_cache", {}).items()}
    ranges = [f'  "{name}": {json.dumps(cache[name])}' for name in sorted(cache, key=int)]
    back = "" if gradient is None else f' "gradient": {json.dumps(gradient)},\n'
    text = (
        f'{{\n "schema_version": {SCHEMA_VERSION},\n "text": {json.dumps(text_record)},\n{back}'
        f' "routed_tokens": {{\n{_joined(layers)}\n }},\n'
        f' "kv_cache": {{\n{_joined(ranges)}\n }},\n "matrices": {{\n{_joined(lines)}\n }}\n}}\n'
    )
    if len(text) > size:
        raise RuntimeError(f"{RECORD_NAME} takes {len(text)} bytes, {size} were planned")
    return text.ljust(size).encode("ascii")


def _joined(lines: list[str]) -> str:
    return ",\n".join(lines)
