"""The `quantization_config` of an artifact, in compressed-tensors' words (its `QuantizationConfig` schema).

Regular expressions start with `.*` because vLLM matches from the start of a name and SGLang compares suffixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from l4pack.artifact.kv_cache import cache_arguments
from l4pack.model import parts
from l4pack.model.names import MODULES
from l4pack.model.tensors import Linear, Role
from l4pack.quant.scheme import Scheme
from l4pack.recipe import Activations, KVCache, RecipeScheme

_NEVER = (f"re:.*{parts.HEAD}$", f"re:.*{parts.ROUTER}$")
_VISION = (f"re:.*{parts.VISION_MODEL}.*", f"re:.*{parts.PROJECTOR}.*")

ACTIVATIONS: dict[Activations, dict[str, Any] | None] = {
    Activations.NONE: None,
    Activations.DYNAMIC_TOKEN: {"strategy": "token"},
    Activations.DYNAMIC_GROUP: {"strategy": "group", "group_size": 128},
    Activations.STATIC_TENSOR: {"strategy": "tensor", "dynamic": False, "observer": "memoryless_minmax"},
}


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
        groups[f"group_{number}"] = _group(schemes[name], targets)
    return {
        "quant_method": "compressed-tensors",
        "format": min(formats) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None if kv_cache is None else _kv_cache(kv_cache),
        "ignore": [*_NEVER, *(_VISION if vision else ()), *_patterns(assigned, {None})],
        "config_groups": groups,
    }


def _group(scheme: RecipeScheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": scheme.format,
        "weights": weight_arguments(scheme),
        "input_activations": input_arguments(scheme.activations),
        "output_activations": None,
    }


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """How a scheme's weights are quantized."""
    return arguments(
        num_bits=scheme.num_bits,
        type=scheme.type.value,
        symmetric=scheme.symmetric,
        strategy=scheme.strategy.value,
        group_size=scheme.group_size,
        block_structure=list(scheme.block_structure) if scheme.block_structure else None,
        observer="memoryless_minmax" if scheme.observer.value == "minmax" else "memoryless_mse",
    )


def input_arguments(activations: Activations) -> dict[str, Any] | None:
    """How a scheme's inputs are quantized; None where they are not."""
    given = ACTIVATIONS[activations]
    return None if given is None else arguments(**{"type": "float", "dynamic": True, **given})


def _kv_cache(kv_cache: KVCache) -> dict[str, Any]:
    return arguments(**{**cache_arguments(kv_cache.strategy), "observer": "memoryless_minmax"})


def arguments(**values: Any) -> dict[str, Any]:
    """A `QuantizationArgs` of compressed-tensors, its defaults filled in."""
    defaults = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": None,
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }
    return {**defaults, **values}


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
