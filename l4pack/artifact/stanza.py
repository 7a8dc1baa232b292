"""The `quantization_config` of an artifact, in compressed-tensors' words (its `QuantizationConfig` schema): made and read.

Regular expressions start with `.*` because vLLM matches from the start of a name and SGLang compares suffixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from l4pack.artifact.kv_cache import cache_arguments
from l4pack.formats.configuration import arguments
from l4pack.formats.known import load_format
from l4pack.model import parts
from l4pack.model.names import MODULES
from l4pack.model.tensors import Linear, Role
from l4pack.recipe import KVCache, RecipeScheme

METHOD = "compressed-tensors"
MIXED = "mixed-precision"  # the format of a stanza whose groups have several
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
        "quant_method": METHOD,
        "format": format_of_groups(formats),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None if kv_cache is None else _kv_cache(kv_cache),
        "ignore": [*_NEVER, *(_VISION if vision else ()), *_patterns(assigned, {None})],
        "config_groups": groups,
    }


def format_of_groups(formats: Set[str]) -> str:
    """The `format` of a stanza, from those of its groups."""
    return min(formats) if len(formats) == 1 else MIXED


@dataclass(frozen=True)
class StanzaGroup:
    """One config group as it stands; None for a part that is not there or not of its type. Targets are unchecked."""

    name: str
    targets: tuple[Any, ...]
    format: str | None  # its own, else the stanza's
    weights: Mapping[str, Any] | None
    inputs: Mapping[str, Any] | None
    outputs: Any


@dataclass(frozen=True)
class Stanza:
    """The parts of a stanza as they stand, whoever wrote it: what is not of its type is left out, nothing is checked.

    The scheme of a KV cache may be anything: only what is empty says that there is none.
    """

    method: str | None
    format: str | None
    ignore: tuple[Any, ...]
    kv_cache: Any
    groups: tuple[StanzaGroup, ...]


def read_stanza(given: Mapping[str, Any]) -> Stanza:
    """The stanza that a config.json holds; empty where it holds none."""
    groups = given.get("config_groups")
    named = groups.items() if isinstance(groups, Mapping) else ()
    form = given.get("format")
    return Stanza(
        method=given.get("quant_method"),
        format=form,
        ignore=_entries(given.get("ignore")),
        kv_cache=given.get("kv_cache_scheme"),
        groups=tuple(_read_group(str(name), group, form) for name, group in named if isinstance(group, Mapping)),
    )


def _read_group(name: str, group: Mapping[str, Any], form: str | None) -> StanzaGroup:
    return StanzaGroup(
        name,
        _entries(group.get("targets")),
        group.get("format") or form,
        _mapping(group.get("weights")),
        _mapping(group.get("input_activations")),
        group.get("output_activations"),
    )


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def _entries(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else ()


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
