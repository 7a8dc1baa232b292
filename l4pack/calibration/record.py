"""`l4pack-calibration.json`: what calibration did to every matrix, which experts saw how many tokens, and how large
keys and values became.

The file's size is part of the plan, so it is known before the first token runs: room for the longest entry of every
matrix, filled up with spaces. Nothing in it depends on the clock or a path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4pack.plan import Plan

RECORD_NAME = "l4pack-calibration.json"
SCHEMA_VERSION = 1
_HEAD, _PER_MATRIX, _PER_EXPERT, _PER_LAYER, _PER_KV_AMAX = 4096, 320, 12, 64, 16


def record_bytes(plan: Plan) -> int:
    """Size of the file."""
    text = plan.checkpoint.config.text
    experts = len(text.moe_layers) * text.num_local_experts
    matrices = sum(_PER_MATRIX + len(target.module) for target in (*plan.calibrated, *plan.observed))
    cache = sum(_PER_LAYER + _PER_KV_AMAX * math.prod(tensor.shape) for tensor in plan.kv_scales)
    return _HEAD + matrices + _PER_LAYER * text.num_hidden_layers + _PER_EXPERT * experts + cache


def record_json(plan: Plan, results: Mapping[str, Any]) -> bytes:
    """The file's bytes from the results in the journal: by unit, and the routed tokens by layer."""
    assert plan.text is not None
    matrices = {name: found for unit in results.values() for name, found in unit.get("matrices", {}).items()}
    lines = [f'  "{name}": {json.dumps(matrices[name])}' for name in sorted(matrices)]
    layers = [
        f'  "{name}": {json.dumps(found["tokens"])}' for name, found in sorted(results.items()) if "tokens" in found
    ]
    cache = {name: found for unit in results.values() for name, found in unit.get("kv_cache", {}).items()}
    ranges = [f'  "{name}": {json.dumps(cache[name])}' for name in sorted(cache, key=int)]
    text = (
        f'{{\n "schema_version": {SCHEMA_VERSION},\n "text": {json.dumps(plan.text.record)},\n'
        f' "routed_tokens": {{\n{_joined(layers)}\n }},\n'
        f' "kv_cache": {{\n{_joined(ranges)}\n }},\n "matrices": {{\n{_joined(lines)}\n }}\n}}\n'
    )
    size = record_bytes(plan)
    if len(text) > size:
        raise RuntimeError(f"{RECORD_NAME} takes {len(text)} bytes, {size} were planned")
    return text.ljust(size).encode("ascii")


def _joined(lines: list[str]) -> str:
    return ",\n".join(lines)
