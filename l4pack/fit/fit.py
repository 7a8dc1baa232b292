"""From a model, a measurement and a wish to the recipe that hurts least within the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from l4pack.budget.files import CONTAINERS
from l4pack.budget.load import resolve
from l4pack.budget.model import Budget
from l4pack.budget.runtimes import load_runtime
from l4pack.budget.subject import from_config
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import L4packError, SourceError, UsageError
from l4pack.fit.budgets import ANY, LAYER, ROLE, DeviceBudget, Goal, Wish, file_costs, make_goal
from l4pack.fit.frontier import FrontierPoint, Ground, frontier, steps_around, uniform_points
from l4pack.fit.losses import Losses, losses_for
from l4pack.fit.recipe import one_line, parse_values, recipe_name, recipe_text, recipe_values
from l4pack.fit.sizes import sizes_for
from l4pack.fit.solve import CostLimit, Picks, Selection, select, smallest, total
from l4pack.fit.units import RUNTIMES, UnitChoices, Units, model_units
from l4pack.measure.record import Sensitivity, combined
from l4pack.model.config import KNOWN_MODELS, known_config
from l4pack.model.tensors import Role
from l4pack.recipe import KEEP, Promise, Recipe

EXACT_ROUNDS, MAX_ROUNDS = 40, 60


@dataclass(frozen=True)
class Fitted:
    """A choice for every unit of a model, the recipe it makes, and what lies around it."""

    model: str
    wish: Wish
    budget: str
    losses: Losses
    by: str
    units: tuple[UnitChoices, ...]
    left_out: Mapping[tuple[str, Role], tuple[str, ...]]
    solution: Selection
    recipe: Recipe
    recipe_text: str
    weight_bytes: int
    artifact_bytes: int
    bits: float
    combined: float | None
    memory: Budget | None
    uniform: tuple[FrontierPoint, ...]
    frontier: tuple[FrontierPoint, ...]
    steps: tuple[FrontierPoint, ...]


def fit(checkpoint: Checkpoint, sensitivity: Sensitivity, wish: Wish, stem: str = "fit") -> Fitted:
    """The recipe of least predicted KL within a budget, called after `stem`.

    Raises UsageError (a wish that makes no sense, or one that the original meets as it is), BudgetError (nothing that
    the runtime can load is small enough), SourceError (quantized already).
    """
    wish.check()
    if checkpoint.config.quantized:
        raise SourceError(f"{checkpoint.name} is quantized already", hint="start from the original BF16 checkpoint")
    return _Fit(checkpoint, sensitivity, wish, stem).run()


class _Fit:
    def __init__(self, checkpoint: Checkpoint, sensitivity: Sensitivity, wish: Wish, stem: str) -> None:
        self._checkpoint, self._wish, self._stem = checkpoint, wish, stem
        self._sizes = sizes_for(checkpoint, wish.runtime)
        found = losses_for(checkpoint, sensitivity)
        options = {name: self._sizes.held(scheme) for name, scheme in found.options.items()}
        self._losses = replace(found, options=options)
        self._by = wish.by or (ROLE if self._losses.stand_in else LAYER)
        units_found = model_units(checkpoint, self._losses, wish.runtime, self._parallel(), self._sizes)
        self._found: Units = units_found if self._by == LAYER else units_found.alike()
        units = self._found.units
        costs = file_costs(units)
        if not any(len(unit.choices) > 1 for unit in units):
            raise self._nothing_measured()
        self._least = smallest(costs)
        values = [[choice.kl for choice in unit.choices] for unit in units]
        fixed = self._sizes.weight_bytes(self._recipe(self._least)) - total(costs, self._least)
        self._ground = Ground(units, values, costs, fixed)

    def run(self) -> Fitted:
        units, ground, wish = self._found.units, self._ground, self._wish
        goal = make_goal(self._sizes, wish, units, self._least, self._recipe(self._least))
        solution = self._solve(goal)
        recipe = self._recipe(solution.picks)
        uniform = uniform_points(ground)
        steps = steps_around(ground, solution.picks)
        here = ground.point("chosen", solution.picks)
        numel = sum(unit.numel for unit in units)
        return Fitted(
            model=self._checkpoint.name,
            wish=wish,
            budget=goal.describe(),
            losses=self._losses,
            by=self._by,
            units=units,
            left_out=self._found.left_out,
            solution=solution,
            recipe=recipe,
            recipe_text=recipe_text(self._values(solution.picks), self._comments(goal, solution)),
            weight_bytes=here.nbytes,
            artifact_bytes=self._sizes.artifact_bytes(recipe),
            bits=8 * total(ground.nbytes, solution.picks) / numel,
            combined=self._combined(solution.picks),
            memory=goal.budget(recipe) if isinstance(goal, DeviceBudget) else None,
            uniform=tuple(uniform),
            frontier=tuple(frontier(ground, [*uniform, *steps, here])),
            steps=tuple(steps),
        )

    def _combined(self, picks: Picks) -> float | None:
        """KL by the record's own rule for many changes at once, where it measured what that needs."""
        changes = self._losses.changes
        if not any(change.rerouting for change in changes.values()):
            return None
        picked = [(unit, unit.choices[pick].option) for unit, pick in zip(self._ground.units, picks, strict=True)]
        keys = ((layer, unit.role, option) for unit, option in picked for layer in unit.layers)
        return max(0.0, combined(changes[key] for key in keys if key in changes))

    def _solve(self, goal: Goal) -> Selection:
        """Solve, ask the plan or the memory model, and lower the bounds by the least that matters until they agree."""
        ground, limits = self._ground, list(goal.limits)
        for number in range(MAX_ROUNDS):
            solution = select(ground.losses, ground.nbytes, limits)
            if solution is None:
                return self._smallest(goal)
            if all(unit.choices[pick].option == KEEP for unit, pick in zip(ground.units, solution.picks, strict=True)):
                raise self._nothing_to_do(goal)
            excess = goal.excess(self._recipe(solution.picks))
            if excess <= 0:
                return solution
            lower = 1 if number < EXACT_ROUNDS else excess
            limits = [
                CostLimit(limit.costs, min(limit.bound, total(limit.costs, solution.picks)) - lower) for limit in limits
            ]
        raise L4packError("solutions keep exceeding the budget", hint="ask for a little less")

    def _smallest(self, goal: Goal) -> Selection:
        """The smallest artifact, when it fits and nothing else does. Raises BudgetError when it doesn't."""
        rows = zip(*(limit.costs for limit in goal.limits), strict=True)
        costs = [[sum(parts) for parts in zip(*unit, strict=True)] for unit in rows]
        sizes = zip(costs, self._ground.nbytes, strict=True)
        picks = smallest([list(zip(*unit, strict=True)) for unit in sizes])
        recipe = self._recipe(picks)
        beyond = any(total(limit.costs, picks) > limit.bound for limit in goal.limits)
        if beyond or goal.excess(recipe) > 0:
            raise goal.impossible(recipe)
        return Selection(picks, float(total(self._ground.losses, picks)), 0.0)

    def _parallel(self) -> int:
        host = self._wish.host()
        if host is None or self._wish.runtime in CONTAINERS:
            return 1
        subject = from_config(self._checkpoint.name, self._checkpoint.config)
        return resolve(subject, host, load_runtime(self._wish.memory_runtime), self._wish.load).tp

    def _recipe(self, picks: Picks) -> Recipe:
        return parse_values(self._values(picks), "the fitted recipe")

    def _values(self, picks: Picks) -> dict[str, Any]:
        units = self._found.units
        kl = sum(unit.choices[pick].kl for unit, pick in zip(units, picks, strict=True))
        by = ", by the sensitivities of a stand-in" if self._losses.stand_in else ""
        title = f"Fitted to a budget: predicted KL {kl:.3e}{by}"  # as long for every budget: it is in the artifact
        promise = self._promise()
        name, options = recipe_name(self._stem), self._losses.options
        return recipe_values(name, title, units, picks, options, promise, best=self._wish.best)

    def _promise(self) -> Promise | None:
        """What the recipe is made for, when it is for a device and a model that promises name."""
        wish, config = self._wish, self._checkpoint.config
        host = wish.host()
        model = next((name for name in KNOWN_MODELS if known_config(name).text == config.text), None)
        if host is None or model is None or wish.runtime in CONTAINERS:  # promises are of servers of artifacts
            return None
        subject = from_config(self._checkpoint.name, config)
        setting = resolve(subject, host, load_runtime(wish.memory_runtime), wish.load)
        return Promise(
            model=model,
            device=host.name,
            context=setting.context,
            sequences=setting.sequences,
            kv_dtype="fp8" if setting.kv_dtype == "fp8" else "bfloat16",
        )

    def _comments(self, goal: Goal, solution: Selection) -> list[str]:
        losses, wish = self._losses, self._wish
        proven = "proven optimal" if solution.optimal else f"within {100 * solution.gap:.2g} % of the optimum"
        lines = [
            f"Made by `l4pack fit` for {goal.describe()},",
            f"to be loaded by {', '.join(RUNTIMES) if wish.runtime == ANY else wish.runtime}; {proven}.",
            f"Predicted KL {solution.loss:.6g} nats, the sum of what each choice alone does.",
        ]
        if wish.best:
            lines.append(
                "MLPs of four bits and of FP8 are solved for the model's end, which harms less than was predicted."
            )
        if losses.stand_in:
            lines.append(
                f"The sensitivities are a stand-in's, measured on {losses.measured_on}: carried over, not measured here."
            )
        return [one_line(line) for line in lines]

    def _nothing_measured(self) -> UsageError:
        reasons = next(iter(self._found.left_out.values()), ("no unit of this model was measured",))
        return UsageError(
            f"no option is left for any part of {self._checkpoint.name}: {reasons[0]}",
            hint="measure more options, or choose another --runtime",
        )

    def _nothing_to_do(self, goal: Goal) -> UsageError:
        return UsageError(
            f"{self._checkpoint.name} meets the budget as it is ({goal.describe()}): nothing needs to be quantized",
            hint="serve the original, or give a smaller budget",
        )
