"""What each choice is predicted to cost: a measurement, cleaned of noise and brought to the model at hand.

A unit is all matrices of a role in a layer. Losses of units are added up; the record says how well such sums held where
it measured many changes at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l4pack.artifact.original import weights_digest
from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.errors import UsageError
from l4pack.formats.known import load_format
from l4pack.measure.identity import model_fingerprint
from l4pack.measure.record import ChangeRecord, Joint, Sensitivity, read_sensitivity
from l4pack.model.tensors import QUANTIZABLE, Role
from l4pack.recipe import KEEP, RecipeScheme
from l4pack.resources import data_folder

UnitKey = tuple[int, Role]
MAX_KL = 1e3  # nats
_SHIPPED = {True: "maverick", False: "demo"}  # by whether the model has dense MLPs


@dataclass(frozen=True)
class Losses:
    """Predicted KL, in nats, of every unit under every option it may be given, and where it is from."""

    kl: Mapping[UnitKey, Mapping[str, float]]
    options: Mapping[str, RecipeScheme]
    measured_on: str
    stand_in: bool
    joint: tuple[Joint, ...]
    changes: Mapping[tuple[int, Role, str], ChangeRecord]  # of the model itself; none of a stand-in


def shipped_sensitivity(checkpoint: Checkpoint) -> Sensitivity:
    """The stand-in that goes with a model's architecture. Raises UsageError when none is shipped."""
    text = checkpoint.config.text
    wanted = _SHIPPED[len(text.moe_layers) < text.num_hidden_layers]
    found = sorted(data_folder("sensitivities").glob("*.json"))
    if not found:
        raise UsageError("no sensitivities are shipped", hint="give --sensitivity FILE; l4pack measure makes one")
    named: dict[str, Path] = {path.stem: path for path in found}
    return read_sensitivity(named.get(wanted, found[0]))


def losses_for(checkpoint: Checkpoint, sensitivity: Sensitivity) -> Losses:
    """The losses of a model's units.

    A record of another model is carried over by role and relative depth: each layer's KL is spread over its share of the
    depth, so that the sum over a role's layers stays the same for every option. Raises RecipeError, UsageError.
    """
    _check(sensitivity)
    stand_in = is_stand_in(sensitivity, checkpoint)
    cleaned = _cleaned(sensitivity.changes)
    layers = _role_layers(checkpoint)
    kl = _carried(cleaned, layers) if stand_in else _own(cleaned, layers)
    changes = {} if stand_in else {(one.layer, one.role, one.option): one for one in sensitivity.changes}
    return Losses(kl, sensitivity.options, sensitivity.model.name, stand_in, tuple(sensitivity.joint), changes)


def _check(sensitivity: Sensitivity) -> None:
    """Refuse what no measurement holds. Raises RecipeError or UsageError."""
    name = sensitivity.model.name
    for option, scheme in sensitivity.options.items():
        where = f"sensitivity of {name}: options.{option}"
        load_format(scheme.format).check_accepts(scheme, scheme.activations, where)
    if KEEP in sensitivity.options:
        raise UsageError(f"sensitivity of {name}: '{KEEP}' names the original", hint="give the option another name")
    worst = max(abs(change.kl) for change in sensitivity.changes)
    if worst > MAX_KL:
        raise UsageError(f"sensitivity of {name}: a KL of {worst:.3g} nats is no measurement", hint="measure again")


def is_stand_in(sensitivity: Sensitivity, checkpoint: Checkpoint) -> bool:
    """Whether a record is of another model than this one: of other shapes, or of other weights where both are known."""
    model = sensitivity.model
    if model.fingerprint != model_fingerprint(checkpoint):
        return True
    here = isinstance(checkpoint.store, LocalStore) and not checkpoint.bare  # nothing is fetched to find out
    return bool(model.weights) and here and model.weights != weights_digest(checkpoint)


def _role_layers(checkpoint: Checkpoint) -> dict[Role, list[int]]:
    found: dict[Role, set[int]] = defaultdict(set)
    for linear in checkpoint.layout.linears:
        found[linear.role].add(linear.layer)
    return {role: sorted(found[role]) for role in QUANTIZABLE if role in found}


def _cleaned(changes: Sequence[ChangeRecord]) -> dict[UnitKey, dict[str, float]]:
    """Losses without what only noise can have made: none is negative, and within a unit none falls as its error grows."""
    units: dict[UnitKey, list[ChangeRecord]] = defaultdict(list)
    for change in changes:
        units[change.layer, change.role].append(change)
    return {key: _pooled(found) for key, found in units.items()}


def _pooled(changes: Sequence[ChangeRecord]) -> dict[str, float]:
    """Isotonic regression of a unit's KL on its own output's error, weighed by the inverse variance of each KL."""
    from scipy.optimize import isotonic_regression  # takes a while to load

    ordered = sorted(changes, key=lambda change: (change.error, change.option))
    largest = max(change.kl_standard_error for change in ordered) or 1.0
    weights = [1 / max(change.kl_standard_error / largest, 1e-3) ** 2 for change in ordered]
    fitted = isotonic_regression([change.kl for change in ordered], weights=weights).x
    return {change.option: max(0.0, float(value)) for change, value in zip(ordered, fitted, strict=True)}


def _own(
    cleaned: Mapping[UnitKey, Mapping[str, float]], layers: Mapping[Role, Sequence[int]]
) -> dict[UnitKey, dict[str, float]]:
    units = {(layer, role) for role, numbers in layers.items() for layer in numbers}
    return {key: dict(kl) for key, kl in cleaned.items() if key in units}


def _carried(
    cleaned: Mapping[UnitKey, Mapping[str, float]], layers: Mapping[Role, Sequence[int]]
) -> dict[UnitKey, dict[str, float]]:
    found: dict[UnitKey, dict[str, float]] = defaultdict(dict)
    for role, numbers in layers.items():
        measured = [cleaned[key] for key in sorted(cleaned) if key[1] is role]
        everywhere = [name for name in (measured[0] if measured else ()) if all(name in one for one in measured)]
        for name in everywhere:
            spread = _spread([one[name] for one in measured], len(numbers))
            for layer, value in zip(numbers, spread, strict=True):
                found[layer, role][name] = value
    return dict(found)


def _spread(values: Sequence[float], count: int) -> list[float]:
    """`values`, each a stretch of [0, 1], cut anew into `count` stretches; the sum stays the same."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    edges = np.interp(np.linspace(0, 1, count + 1), np.linspace(0, 1, len(values) + 1), total)
    return [max(0.0, float(value)) for value in np.diff(edges)]
