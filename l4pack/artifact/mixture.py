"""What a recipe makes of a model: the scheme of every role, layer by layer, in words for cards and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from l4pack.formats.configuration import Activations
from l4pack.model.config import Llama4Config
from l4pack.model.tensors import Role, catalogue
from l4pack.quant.grid import E2M1
from l4pack.quant.scheme import Strategy
from l4pack.recipe import KEEP, Recipe, RecipeScheme

Layers = dict[str, list[int | None]]  # scheme name -> the layers in which a role has it, None outside of them

_HEAVIEST_FIRST = (Role.ROUTED_EXPERT, Role.DENSE_MLP, Role.SHARED_EXPERT, Role.ATTENTION)


def scheme_tag(scheme: RecipeScheme) -> str:
    """The field's short word for a scheme: `W4A16-g128`, `FP8-dynamic`, `FP8-block`, `NVFP4A16`, `MXFP4A16`, `Q4_K`."""
    kept = scheme.activations is Activations.NONE
    kind = scheme.activations.value.partition("_")[0]
    if scheme.grid is E2M1:
        return f"{'NV' if scheme.globally_scaled else 'MX'}FP4{'A16' if kept else ''}"
    if scheme.super_blocked:
        return scheme.scale_dtype.value.upper()
    if scheme.type.value == "float":
        how = "block" if scheme.strategy is Strategy.BLOCK else "weight-only" if kept else kind
        return f"FP{scheme.num_bits}-{how}"
    group = f"-g{scheme.group_size}" if scheme.strategy is Strategy.GROUP else ""
    return f"W{scheme.num_bits}A{16 if kept else 8}{group}" + ("" if scheme.symmetric else "-asym")


def recipe_tag(recipe: Recipe) -> str:
    """One word for a whole recipe: the scheme that most weights have, and `-mixed` when others have another."""

    def weight(name: str) -> tuple[int, int]:
        """How heavy the heaviest role is that a scheme is given to, and in how many layers; smallest is most."""
        rules = [rule for rule in recipe.rules if rule.scheme == name and rule.roles != "all"]
        rank = min(_HEAVIEST_FIRST.index(role) for rule in rules for role in rule.roles)
        mine = [rule.layers for rule in rules if _HEAVIEST_FIRST[rank] in rule.roles]
        return rank, -sum(10_000 if layers is None else len(layers) for layers in mine)

    tags = list(dict.fromkeys(scheme_tag(recipe.schemes[name]) for name in sorted(recipe.schemes, key=weight)))
    return tags[0] if len(tags) == 1 else f"{tags[0]}-mixed"


def scheme_layers(recipe: Recipe, config: Llama4Config) -> dict[Role, Layers]:
    """The schemes of each role that the model has, KEEP among them, and the layers that have them."""
    given: dict[Role, Layers] = {}
    for spec in catalogue(config).tensors:
        number = recipe.rule_for(spec.role, spec.layer, config.text.num_hidden_layers)
        name = KEEP if number is None else recipe.rules[number].scheme
        layers = given.setdefault(spec.role, {}).setdefault(name, [])
        if spec.layer not in layers:
            layers.append(spec.layer)
    return given


def scheme_rows(recipe: Recipe, config: Llama4Config) -> list[tuple[str, list[Role]]]:
    """What roles got, in words, and the roles that got it; those that got the same stand together."""
    given = scheme_layers(recipe, config)
    got: dict[str, list[Role]] = {}
    for role in sorted(given, key=list(Role).index):
        got.setdefault(scheme_text(recipe, given[role]), []).append(role)
    return list(got.items())


def scheme_text(recipe: Recipe, layers: Layers) -> str:
    """What a role got, with the layers where not all of them got the same."""
    by_tag: dict[str, set[int]] = {}
    for name, where in layers.items():
        tag = "as in the original" if name == KEEP else scheme_tag(recipe.schemes[name])
        by_tag.setdefault(tag, set()).update(layer for layer in where if layer is not None)
    if len(by_tag) == 1:
        return next(iter(by_tag))
    every = sorted(set().union(*by_tag.values()))
    return "; ".join(f"{tag} in layers {_runs(sorted(mine), every)}" for tag, mine in by_tag.items())


def _runs(numbers: Sequence[int], every: Sequence[int]) -> str:
    """`0-3, 7`: numbers that follow each other in `every` are one run."""
    place: Mapping[int, int] = {number: index for index, number in enumerate(every)}
    runs: list[list[int]] = []
    for number in numbers:
        if runs and place[number] == place[runs[-1][-1]] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
