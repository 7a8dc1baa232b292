"""The `quantization_config` of an artifact, in compressed-tensors' words (its `QuantizationConfig` schema).

Regular expressions start with `.*` because vLLM matches from the start of a name and SGLang compares suffixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from l4pack.artifact.kv_cache import cache_arguments
from l4pack.formats.configuration import arguments
from l4pack.formats.known import load_format
from l4pack.model import parts
from l4pack.model.names import MODULES
from l4pack.model.tensors import Linear, Role
from l4pack.recipe import KVCache, RecipeScheme

_NEVER = (f"re:.*{parts.HEAD}$", f"re:.*{parts.ROUTER}$")
_VISION = (f"re:.*{parts.VISION_MODEL}.*", f"re:.*{parts.PROJECTOR}.*")


def quantization_config(
    schemes: Mapping[str, RecipeScheme],
    assigned: Sequence[tuple[Linear, str | None]],
    *,
    vision: bool,
    kv_cache: KVCache | None = None,
) -> dict[str, Any]:
    """The stanza for matrices and the scheme names they got (None: kept as they were).

    One scheme targets class `Linear` and lists what is left alone; several schemes target their modules by name.
    """
    used = [name for name in schemes if any(given == name for _, given in assigned)]
    formats = {schemes[name].format for name in used}
    groups = {}
    for number, name in enumerate(used):
        targets = ["Linear"] if len(used) == 1 else _patterns(assigned, {name})
        groups[f"group_{number}"] = load_format(schemes[name].format).configuration(
            schemes[name], schemes[name].activations, targets
        )
    return {
        "quant_method": "compressed-tensors",
        "format": min(formats) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None if kv_cache is None else _kv_cache(kv_cache),
        "ignore": [*_NEVER, *(_VISION if vision else ()), *_patterns(assigned, {None})],
        "config_groups": groups,
    }


def _kv_cache(kv_cache: KVCache) -> dict[str, Any]:
    return arguments(**{**cache_arguments(kv_cache.strategy), "observer": "memoryless_minmax"})


def _patterns(assigned: Iterable[tuple[Linear, str | None]], wanted: set[str | None]) -> list[str]:
    """One regular expression a role, naming its layers only where not all of them are meant."""
    given: dict[Role, dict[int, bool]] = {}
    for linear, name in assigned:
        given.setdefault(linear.role, {})[linear.layer] = name in wanted
    patterns = []
    for role, layers in given.items():
        meant = [layer for layer, yes in sorted(layers.items()) if yes]
        if meant:
            chosen = r"\d+" if len(meant) == len(layers) else f"({'|'.join(map(str, meant))})"
            patterns.append(rf"re:.*{parts.LAYERS}\.{chosen}\.{MODULES[role]}$")
    return patterns
