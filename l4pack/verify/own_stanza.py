"""Telling a stanza that this package writes: compressed-tensors need not be asked whether it takes one.

Asking it means importing torch and transformers, which takes longer than verifying a small artifact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from l4pack.artifact.kv_cache import cache_arguments
from l4pack.artifact.stanza import METHOD
from l4pack.formats.configuration import Activations, arguments, input_arguments, weight_arguments
from l4pack.recipe import KVStrategy
from l4pack.verify.declared import ConfigGroup, Declared

_KEYS = {
    "quant_method", "format", "quantization_status", "global_compression_ratio", "kv_cache_scheme", "ignore",
    "config_groups",
}  # fmt: skip
_GROUP_KEYS = {"targets", "format", "weights", "input_activations", "output_activations"}


def is_own_stanza(stanza: Mapping[str, Any], declared: Declared) -> bool:
    """Whether every key and value of a quantization_config, of which `declared` was read, is one l4pack writes."""
    groups = stanza.get("config_groups")
    return (
        set(stanza) == _KEYS
        and isinstance(groups, Mapping)
        and len(groups) == len(declared.groups)
        and stanza["quant_method"] == METHOD
        and isinstance(stanza["format"], str)
        and stanza["quantization_status"] == "compressed"
        and stanza["global_compression_ratio"] is None
        and _names(stanza["ignore"])
        and _one_of(stanza["kv_cache_scheme"], (None, *map(cache_arguments, KVStrategy)))
        and all(map(_own_group, groups.values(), declared.groups))
    )


def _own_group(group: Mapping[str, Any], read: ConfigGroup) -> bool:
    return (
        set(group) == _GROUP_KEYS
        and read.scheme is not None
        and read.format is not None
        and group["format"] == read.format.name
        and _names(group["targets"])
        and group["output_activations"] is None
        and _one_of(group["weights"], (weight_arguments(read.scheme),))
        and _one_of(group["input_activations"], map(input_arguments, Activations))
    )


def _one_of(given: Any, known: Iterable[Mapping[str, Any] | None]) -> bool:
    """Whether a QuantizationArgs, or null, is written as one of those known, whatever its observer is called."""
    observer = given.get("observer") if isinstance(given, Mapping) else None
    if not isinstance(observer, str | None):
        return False
    spelled = (None if one is None else {**arguments(**one), "observer": observer} for one in known)
    return any(_json(given) == _json(one) for one in spelled)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _json(value: Any) -> str:
    """As JSON writes it, which tells 1 from true and from 1.0."""
    return json.dumps(value, sort_keys=True)
