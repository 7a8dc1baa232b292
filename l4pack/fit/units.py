"""The units of a model and what each may be given: exact bytes in the files and on a GPU, and what a runtime can't load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from l4pack.budget.model import Budget
from l4pack.budget.subject import Subject
from l4pack.budget.weights import weights_by_role
from l4pack.checkpoint.source import Checkpoint
from l4pack.fit.losses import Losses, UnitKey
from l4pack.fit.sizes import Sizes
from l4pack.formats.configuration import Activations
from l4pack.formats.known import load_format
from l4pack.formats.limits import LocalMatrix, hindrances, local_matrix
from l4pack.model.tensors import Linear, Role, canonical_naming, catalogue
from l4pack.plan.assign import PlannedTensor, divides, model_dtype, module_tensors, scales_from
from l4pack.recipe import KEEP, RecipeScheme

RUNTIMES = ("vllm", "sglang", "transformers")
"""Those that load the artifact itself; others load files that `export` makes of it (`budget.files.CONTAINERS`)."""


@dataclass(frozen=True)
class Choice:
    """One option of a unit: its bytes in the files, its tensors in the artifact, its predicted KL."""

    option: str
    nbytes: int
    kl: float
    tensors: tuple[PlannedTensor, ...]
    calibrated: bool


@dataclass(frozen=True)
class UnitChoices:
    """All matrices of a role in some layers that get the same; `choices` begin with leaving them as they are."""

    layers: tuple[int, ...]
    role: Role
    numel: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Units:
    """Every unit of a model in order of layers, and why options were left out: (option, role) -> reasons."""

    units: tuple[UnitChoices, ...]
    left_out: Mapping[tuple[str, Role], tuple[str, ...]]

    def alike(self) -> Units:
        """All layers of a role as one unit, with the options that each of them may be given."""
        roles: dict[Role, list[UnitChoices]] = defaultdict(list)
        for unit in self.units:
            roles[unit.role].append(unit)
        return replace(self, units=tuple(_joined(units) for units in roles.values()))


def model_units(checkpoint: Checkpoint, losses: Losses, runtime: str, tp: int, sizes: Sizes) -> Units:
    """The units of a model with the options that `runtime` (or `any`: all of RUNTIMES) can load on `tp` GPUs."""
    runtimes = RUNTIMES if runtime == "any" else (runtime,)
    catalogued = catalogue(checkpoint.config, canonical_naming(checkpoint.config), fused=False).linears
    dtypes = [scales_from(checkpoint, linear.tensor) for linear in checkpoint.layout.linears]
    matrices = sorted(zip(catalogued, dtypes, strict=True), key=lambda pair: _key(pair[0]))
    made = _Choices(losses.options, model_dtype(checkpoint), sizes)
    left_out: dict[tuple[str, Role], tuple[str, ...]] = {}
    units = []
    for (layer, role), grouped in groupby(matrices, key=lambda pair: _key(pair[0])):
        members = list(grouped)
        local = [local_matrix(linear, checkpoint.config.text.num_key_value_heads, tp) for linear, _ in members]
        choices = [made.choice(members, KEEP, 0.0)]
        measured = losses.kl.get((layer, role), {})
        if not measured:
            left_out["every option", role] = ("not measured",)
        for name, kl in sorted(measured.items()):
            reasons = _reasons(losses.options[name], role, members, local, runtimes)
            if reasons:
                left_out[name, role] = reasons
            else:
                choices.append(made.choice(members, name, kl))
        units.append(UnitChoices((layer,), role, sum(linear.numel for linear, _ in members), tuple(choices)))
    return Units(tuple(units), left_out)


def device_bytes(units: Sequence[UnitChoices], found: Budget) -> list[list[int]]:
    """Bytes of every choice of every unit on the GPU that holds its layer, as the memory model of `found` counts them."""
    setting = replace(found.setting, pp=1)
    known: dict[int, int] = {}
    for unit in units:
        for choice in unit.choices:
            if id(choice.tensors) not in known:
                # A runtime that unpacks holds what an unquantized model takes.
                tensors = unit.choices[0].tensors if found.runtime.unpacks else choice.tensors
                subject = Subject("unit", found.subject.config, tensors)
                known[id(choice.tensors)] = sum(weights_by_role(subject, setting, found.runtime)[0].values())
    return [[known[id(choice.tensors)] for choice in unit.choices] for unit in units]


def _joined(units: Sequence[UnitChoices]) -> UnitChoices:
    first = units[0]
    named = [{choice.option: choice for choice in unit.choices} for unit in units]
    everywhere = [choice.option for choice in first.choices if all(choice.option in one for one in named)]
    choices = tuple(_together([one[option] for one in named]) for option in everywhere)
    layers = tuple(layer for unit in units for layer in unit.layers)
    return UnitChoices(layers, first.role, sum(unit.numel for unit in units), choices)


def _together(choices: Sequence[Choice]) -> Choice:
    tensors = tuple(tensor for choice in choices for tensor in choice.tensors)
    nbytes, kl = sum(choice.nbytes for choice in choices), sum(choice.kl for choice in choices)
    return replace(choices[0], nbytes=nbytes, kl=kl, tensors=tensors)


Member = tuple[Linear, str]  # a matrix, and its dtype in the source


class _Choices:
    """The tensors of a unit under an option; units of equal shape share them, as only sizes matter here."""

    def __init__(self, options: Mapping[str, RecipeScheme], kept: str, sizes: Sizes) -> None:
        """`kept` is the dtype that matrices of float32 are kept in."""
        self._options, self._kept, self._sizes = options, kept, sizes
        self._known: dict[tuple[object, ...], tuple[int, tuple[PlannedTensor, ...]]] = {}

    def choice(self, members: Sequence[Member], option: str, kl: float) -> Choice:
        shapes = tuple((linear.projection, linear.out_features, linear.in_features, dtype) for linear, dtype in members)
        key = (option, members[0][0].role, shapes)
        scheme = self._options.get(option)
        if scheme is None:
            members = [(linear, self._kept if dtype == "F32" else dtype) for linear, dtype in members]
        if key not in self._known:
            tensors = tuple(
                tensor for linear, dtype in members for tensor in module_tensors(linear, option, scheme, dtype)
            )
            self._known[key] = self._sizes.unit_bytes([linear for linear, _ in members], tensors, scheme), tensors
        nbytes, tensors = self._known[key]
        return Choice(option, nbytes, kl, tensors, scheme is not None and scheme.calibrated)


def _key(linear: Linear) -> UnitKey:
    return linear.layer, linear.role


def _reasons(
    scheme: RecipeScheme,
    role: Role,
    members: Sequence[Member],
    local: Collection[LocalMatrix],
    runtimes: Collection[str],
) -> tuple[str, ...]:
    """Why a role can't be given a scheme: l4pack can't make it, or a runtime can't load it."""
    if not all(divides(scheme, linear) for linear, _ in members):
        return (f"groups of {scheme.group_size} do not divide every matrix",)
    weight_only = scheme.activations is Activations.NONE
    form = load_format(scheme.format)
    return tuple(hindrances(form, scheme, role, set(local), runtimes, weight_only=weight_only))
