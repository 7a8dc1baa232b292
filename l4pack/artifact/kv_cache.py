"""FP8 KV caches as a checkpoint states them: the scales it brings along, and the scheme in its config.json.

vLLM reads `self_attn.k_scale` and `v_scale`, float32, `[1]` or by head `[kv_heads, 1, 1]` (`CompressedTensorsKVCacheMethod`
in its `compressed_tensors.py`); the scheme alone makes its `--kv-cache-dtype auto` FP8. compressed-tensors calls scales
by head `attn_head`.
"""

from __future__ import annotations

from typing import Any

from l4pack.formats.format import Format
from l4pack.formats.readers import Condition
from l4pack.model import parts
from l4pack.model.tensors import Naming
from l4pack.recipe import KVStrategy

SUFFIXES = ("k_scale", "v_scale")
DTYPE = "F32"
_STRATEGIES = {KVStrategy.TENSOR: "tensor", KVStrategy.HEAD: "attn_head"}


def scale_shape(strategy: KVStrategy, kv_heads: int) -> tuple[int, ...]:
    """Shape of each of a layer's two scales."""
    return (kv_heads, 1, 1) if strategy is KVStrategy.HEAD else (1,)


def scale_names(naming: Naming, layer: int) -> tuple[str, str]:
    """Names of a layer's scales, keys first."""
    key, value = (f"{naming.layer(layer)}{parts.ATTENTION}.{suffix}" for suffix in SUFFIXES)
    return key, value


def cache_arguments(strategy: KVStrategy) -> dict[str, Any]:
    """What is particular to such a cache in compressed-tensors' `QuantizationArgs`."""
    return {"num_bits": 8, "type": "float", "strategy": _STRATEGIES[strategy], "symmetric": True, "dynamic": False}


def cache_limits(form: Format, strategy: KVStrategy, *, vision: bool) -> list[str]:
    """What runtimes can't do with such scales beside matrices of a format, each as `RUNTIME VERSION what`."""
    by_head = strategy is KVStrategy.HEAD
    holds: dict[Condition, bool] = {"kv_cache": True, "kv_cache_vision": vision, "kv_cache_by_head": by_head}
    limits = [(reader, limit) for reader in form.readers for limit in reader.limits]
    return [f"{reader.runtime} {reader.version} {limit.says}" for reader, limit in limits if holds.get(limit.when)]


def declared_strategy(scheme: Any) -> KVStrategy | None:
    """The strategy of a `kv_cache_scheme`; None where there is none, or one that no runtime takes."""
    if isinstance(scheme, dict):
        for strategy in KVStrategy:
            wanted = cache_arguments(strategy)
            if all(scheme.get(key) == value for key, value in wanted.items()):
                return strategy
    return None
