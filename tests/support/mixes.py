"""Recipes that mix schemes by role and by layer, drawn with a seed: what a solver may ask for, and runtimes must read."""

from __future__ import annotations

import random
from typing import Any

from l4pack.model.tensors import Catalogue, Role
from l4pack.recipe import Recipe, load_recipe


def _int(num_bits: int, group_size: int | None) -> dict[str, Any]:
    strategy = "channel" if group_size is None else "group"
    return {"format": "pack-quantized", "num_bits": num_bits, "strategy": strategy, "group_size": group_size}


_FP8 = {"format": "float-quantized", "num_bits": 8, "type": "float"}
SCHEMES: dict[str, dict[str, Any]] = {
    **{f"int{bits}-g{group}": _int(bits, group) for bits in (4, 8) for group in (32, 64, 128)},
    "int8-channel": _int(8, None),
    "fp8": {**_FP8, "strategy": "channel", "activations": "dynamic_token"},
    "fp8-block": {**_FP8, "strategy": "block", "block_structure": [128, 128], "activations": "dynamic_group"},
}
WEIGHT_ONLY = {name for name in SCHEMES if name.startswith("int")}
KEEP = "keep"
MIXED_ROLES = (Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP, Role.ATTENTION)


def draw_mix(seed: int, layers: dict[Role, list[int]], schemes: set[str] | None = None) -> Recipe:
    """A recipe that gives each role of `layers` up to three schemes (or none), each in some of its layers."""
    chance = random.Random(seed)
    allowed = sorted(SCHEMES if schemes is None else schemes)
    rules: list[dict[str, Any]] = []
    for role in MIXED_ROLES:
        choices = [name for name in [*allowed, KEEP] if role is not Role.ATTENTION or name != "fp8-block"]
        given: dict[str, list[int]] = {}
        some = chance.sample(choices, min(chance.choice([1, 2, 2, 3]), len(choices)))
        for layer in layers.get(role, []):
            given.setdefault(chance.choice(some), []).append(layer)
        rules += [{"roles": [role.value], "layers": where, "scheme": name} for name, where in given.items()]
    used = sorted({rule["scheme"] for rule in rules} - {KEEP})
    if not used:
        return draw_mix(seed + 1_000_000, layers, schemes)
    values = {
        "name": f"mix-{seed}",
        "title": "a mix",
        "schemes": {name: SCHEMES[name] for name in used},
        "rules": [*rules, {"roles": "all", "scheme": KEEP}],
    }
    return Recipe.model_validate(values)


def matrix_layers(layout: Catalogue) -> dict[Role, list[int]]:
    """The layers in which a model has matrices of each role."""
    return {role: sorted({one.layer for one in layout.linears if one.role is role}) for role in MIXED_ROLES}


def rounding(name: str) -> Recipe:
    """A shipped recipe without its calibration."""
    values = load_recipe(name).model_dump() | {"calibration": None}
    for scheme in values["schemes"].values():
        scheme |= {"method": "rtn", "gptq": None}
    return Recipe.model_validate(values)
