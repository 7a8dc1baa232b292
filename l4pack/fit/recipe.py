"""The recipe that a solution amounts to, as a plain file that `quantize` runs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from l4pack.datafile import validate
from l4pack.errors import UsageError
from l4pack.fit.solve import Picks
from l4pack.fit.units import UnitChoices
from l4pack.model.tensors import Role
from l4pack.quant.grid import E4M3
from l4pack.recipe import KEEP, GptqOptions, Method, Promise, Recipe, RecipeScheme, load_recipe

LIKE = "int4"  # calibrated as this shipped recipe is
LIKE_BEST = "int4-best"  # the same of what is solved for the model's end
FP8_LIKE = "fp8-gptq"  # FP8, which is rounded else, is solved as there
_BEST = "-best"  # ends the name of an option that is solved for the model's end
_NAME = re.compile(r"[^a-z0-9._-]+")


def recipe_values(
    name: str,
    title: str,
    units: Sequence[UnitChoices],
    picks: Picks,
    options: Mapping[str, RecipeScheme],
    promise: Promise | None = None,
    *,
    best: bool = False,
) -> dict[str, Any]:
    """A recipe's keys, as short as they can be: layers are named only where those of a role differ.

    `best`: MLPs of four bits and of FP8 are solved for the model's end.
    """
    rules = _rules(units, picks)
    if best:
        options = {**options, **for_the_end(options)}
        rules = [part for rule in rules for part in _for_the_end(rule, options)]
    used = dict.fromkeys(rule["scheme"] for rule in rules)
    values: dict[str, Any] = {
        "name": name,
        "title": title,
        "schemes": {option: _plain(options[option]) for option in used},
        "rules": [*rules, {"roles": "all", "scheme": KEEP}],
    }
    if any(options[option].calibrated for option in used):
        like = LIKE_BEST if any(option.endswith(_BEST) for option in used) else LIKE
        values["calibration"] = _plain(load_recipe(like).calibration)
    if promise is not None:
        values["promise"] = _plain(promise)
    return values


def for_the_end(options: Mapping[str, RecipeScheme]) -> dict[str, RecipeScheme]:
    """The options of FP8, and those of four bits that are solved, as they are where errors are weighed by what they do to the
    model's end."""
    solved = {name: _solver(scheme) for name, scheme in options.items()}
    return {
        f"{name}{_BEST}": options[name].model_copy(
            update={"method": Method.GPTQ, "gptq": gptq.model_copy(update={"two_sided": True})}
        )
        for name, gptq in solved.items()
        if gptq is not None
    }


def _solver(scheme: RecipeScheme) -> GptqOptions | None:
    """How GPTQ solves an option that is worth solving for the model's end; None for another."""
    if scheme.grid is E4M3:
        return load_recipe(FP8_LIKE).schemes["fp8"].gptq
    return scheme.gptq if scheme.num_bits == 4 else None


def parse_values(values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe those keys make. Raises RecipeError."""
    return validate(Recipe, dict(values), where)


def recipe_text(values: Mapping[str, Any], comments: Sequence[str]) -> str:
    """A recipe's file: comments that say where it is from, then its keys."""
    head = "".join(f"# {line}\n" for line in comments)
    return head + yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=110)


def check_file(path: Path) -> None:
    """Raise UsageError for a name that recipes can't be read from."""
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path}: a recipe's file ends in .yaml", hint="for example --out fit.yaml")


def one_line(text: str) -> str:
    """A comment's text, whatever names it holds, on one line."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def recipe_name(stem: str) -> str:
    """The nearest allowed name to a file's stem."""
    return _NAME.sub("-", stem.lower()).strip("-._")[:64] or "fit"


def _rules(units: Sequence[UnitChoices], picks: Picks) -> list[dict[str, Any]]:
    layers: dict[tuple[Role, str], list[int]] = defaultdict(list)
    counts: dict[Role, int] = defaultdict(int)
    for unit, pick in zip(units, picks, strict=True):
        layers[unit.role, unit.choices[pick].option].extend(unit.layers)
        counts[unit.role] += len(unit.layers)
    together: dict[tuple[str, tuple[int, ...] | None], list[Role]] = defaultdict(list)
    for (role, option), numbers in sorted(layers.items(), key=lambda item: (list(Role).index(item[0][0]), item[1])):
        if option != KEEP:
            together[option, None if len(numbers) == counts[role] else tuple(numbers)].append(role)
    return [
        {"roles": [role.value for role in roles]}
        | ({} if numbers is None else {"layers": list(numbers)})
        | {"scheme": option}
        for (option, numbers), roles in together.items()
    ]


def _for_the_end(rule: Mapping[str, Any], options: Mapping[str, RecipeScheme]) -> list[dict[str, Any]]:
    """A rule, its MLPs apart where their scheme can be solved for the model's end; attention's can't."""
    solved = f"{rule['scheme']}{_BEST}"
    if solved not in options:
        return [dict(rule)]
    attention = [role for role in rule["roles"] if role == Role.ATTENTION]
    mlps = [role for role in rule["roles"] if role != Role.ATTENTION]
    parts = [(mlps, solved), (attention, rule["scheme"])]
    return [{**rule, "roles": roles, "scheme": scheme} for roles, scheme in parts if roles]


def _plain(model: Any) -> dict[str, Any]:
    values: dict[str, Any] = model.model_dump(mode="json", exclude_defaults=True)
    return values
