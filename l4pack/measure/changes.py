"""What is changed in one altered stream: a single unit, or many at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from l4pack.measure.options import MeasureOptions, bits, family
from l4pack.model.config import Llama4Config
from l4pack.model.tensors import Role


@dataclass(frozen=True, slots=True)
class Single:
    """One unit given one option."""

    layer: int
    role: Role
    option: str

    @property
    def key(self) -> str:
        """What it is called in the state of a job."""
        return f"{self.layer}.{self.role.value}.{self.option}"

    @property
    def unit(self) -> tuple[int, Role]:
        """The unit that is changed."""
        return self.layer, self.role

    def option_at(self, layer: int, role: Role) -> str | None:
        """The option that a unit has in this stream; None: it is as it was."""
        return self.option if (layer, role) == self.unit else None


@dataclass(frozen=True, eq=False)
class Mixture:
    """Many units changed at once: `choice` gives options to roles, or to `layer.role`, which counts for more."""

    title: str
    choice: Mapping[str, str]

    @property
    def key(self) -> str:
        """What it is called in the state of a job."""
        return f"joint {self.title}"

    @property
    def layer(self) -> int:
        """The first layer that differs, as far as need be known."""
        return 0

    def option_at(self, layer: int, role: Role) -> str | None:
        """The option that a unit has in this stream; None: it is as it was."""
        return self.choice.get(f"{layer}.{role.value}", self.choice.get(role.value))

    def singles(self, config: Llama4Config) -> list[Single]:
        """The single changes it is made of."""
        units = ((layer, role) for layer in range(config.text.num_hidden_layers) for role in roles_of(config, layer))
        found = ((layer, role, self.option_at(layer, role)) for layer, role in units)
        return [Single(layer, role, option) for layer, role, option in found if option is not None]


Change = Single | Mixture


def roles_of(config: Llama4Config, layer: int) -> tuple[Role, ...]:
    """The roles of a layer's matrices, in the order they run."""
    if layer in config.text.moe_layers:
        return (Role.ATTENTION, Role.SHARED_EXPERT, Role.ROUTED_EXPERT)
    return (Role.ATTENTION, Role.DENSE_MLP)


def singles_of(config: Llama4Config, options: MeasureOptions) -> list[Single]:
    """Every unit with every option it can be given, by layer."""
    return [
        Single(layer, role, option)
        for layer in range(config.text.num_hidden_layers)
        for role in roles_of(config, layer)
        for option in options.by_role.get(role, ())
    ]


def anchors(options: MeasureOptions, role: Role) -> tuple[str, ...]:
    """The coarsest and the finest integer option of a role (or FP8, where there is nothing else)."""
    names = options.by_role[role]
    integers = [name for name in names if family(name) != "fp8"] or list(names)
    ordered = sorted(integers, key=lambda name: bits(options.schemes[name]))
    return tuple(dict.fromkeys((ordered[0], ordered[-1])))


def few_of(config: Llama4Config, options: MeasureOptions) -> list[Single]:
    """Both ends of every role's options in two of its layers, one of each half; roles take turns, so that together they
    stand for all depths."""
    found: set[Single] = set()
    for number, role in enumerate(options.by_role):
        layers = [layer for layer in range(config.text.num_hidden_layers) if role in roles_of(config, layer)]
        places = [(half + (number + 0.5) / len(options.by_role)) / 2 for half in (0, 1)]
        for layer in {layers[int(place * len(layers))] for place in places}:
            found |= {Single(layer, role, option) for option in anchors(options, role)}
    return [single for single in singles_of(config, options) if single in found]


def uniform_of(config: Llama4Config, options: MeasureOptions) -> list[Mixture]:
    """Everything alike: at the coarsest options, at FP8, at the finest integers."""
    return _distinct(config, _uniform(options))


def mixtures_of(config: Llama4Config, options: MeasureOptions) -> list[Mixture]:
    """A handful of joint changes: a role everywhere, everything alike, and two that mix."""
    coarse, fine, fp8 = _ends(options)
    made = [Mixture(f"all of {_words(role)} at {option}", {role.value: option}) for role, option in coarse.items()]
    mlps: dict[Role, str] = {role: option for role, option in coarse.items() if role is not Role.ATTENTION}
    made += [_everywhere("all MLPs, coarsest", mlps), *_uniform(options)]
    experts_coarse: dict[Role, str] = {
        **fp8,
        **{role: name for role, name in coarse.items() if role is Role.ROUTED_EXPERT},
    }
    made.append(_everywhere("routed experts coarsest, the rest fp8", experts_coarse))
    half = config.text.num_hidden_layers // 2
    halves = {
        f"{layer}.{role.value}": (coarse if layer < half else fine)[role]
        for layer in range(config.text.num_hidden_layers)
        for role in roles_of(config, layer)
        if role in coarse
    }
    made.append(Mixture("first half coarsest, second half finest", halves))
    return _distinct(config, made)


def _uniform(options: MeasureOptions) -> list[Mixture]:
    coarse, fine, fp8 = _ends(options)
    titles = ("everything, coarsest", "everything at fp8", "everything, finest integers")
    return [_everywhere(title, choice) for title, choice in zip(titles, (coarse, fp8, fine), strict=True)]


def _ends(options: MeasureOptions) -> tuple[dict[Role, str], dict[Role, str], dict[Role, str]]:
    """By role the coarsest option, the finest integer one, and FP8 where a role has it."""
    coarse = {role: anchors(options, role)[0] for role in options.by_role}
    fine = {role: anchors(options, role)[-1] for role in options.by_role}
    return coarse, fine, {role: "fp8" for role, names in options.by_role.items() if "fp8" in names}


def _everywhere(title: str, choice: Mapping[Role, str]) -> Mixture:
    return Mixture(title, {role.value: option for role, option in choice.items()})


def _words(role: Role) -> str:
    return role.value.replace("_", " ")


def _distinct(config: Llama4Config, made: Iterable[Mixture]) -> list[Mixture]:
    """Those that change several units, each combination once."""
    found: dict[tuple[Single, ...], Mixture] = {}
    for mixture in made:
        changed = tuple(mixture.singles(config))
        if len(changed) > 1:
            found.setdefault(changed, mixture)
    return list(found.values())


def waves_of(changes: Sequence[Change], workers: int, most: int, layers: int) -> list[list[Change]]:
    """Neighbouring changes in as many waves as there are workers, about as long each, or in more of at most so many
    streams: those that change one unit in one way stay together as far as can be, for it is quantized once for them."""
    ends = list(itertools.accumulate(layers - change.layer for change in changes))
    wanted = max(workers, math.ceil(len(changes) / most))
    waves: dict[int, list[Change]] = {}
    for change, end in zip(changes, ends, strict=True):
        waves.setdefault((end - 1) * wanted // ends[-1], []).append(change)
    return [wave[first : first + most] for wave in waves.values() for first in range(0, len(wave), most)]
