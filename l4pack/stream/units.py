"""The parts a decoder layer is run in: attention with the small tensors, then one MLP at a time.

A unit is what is read, computed with and dropped at once: never a layer, and of routed experts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from l4pack.model import parts
from l4pack.model.config import Llama4Config
from l4pack.model.tensors import ROUTER, Role, canonical_naming, mlp_prefix
from l4pack.stream.kv import RoundedCache
from l4pack.stream.tiles import TiledLinear
from l4pack.stream.weights import LinearWeight, TiledWeight, Weights


class Part(StrEnum):
    """What a unit is in its layer."""

    ATTENTION = Role.ATTENTION.value
    DENSE = Role.DENSE_MLP.value
    SHARED = Role.SHARED_EXPERT.value
    EXPERT = Role.ROUTED_EXPERT.value


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of one layer."""

    layer: int
    part: Part
    expert: int | None = None

    def __str__(self) -> str:
        number = "" if self.expert is None else f" {self.expert}"
        return f"layer {self.layer}, {self.part.value.replace('_', ' ')}{number}"


@dataclass(frozen=True)
class UnitWeights:
    """A unit's matrices and small tensors, by their names below the layer (attention) or the MLP.

    Attention may have a KV cache that is not kept as it is.
    """

    linears: Mapping[str, LinearWeight | TiledWeight]
    tensors: Mapping[str, Tensor]
    kv_cache: RoundedCache | None = None

    def on_device(self) -> Iterator[Tensor]:
        """Every tensor that is there to compute with."""
        yield from self.tensors.values()
        for linear in self.linears.values():
            if isinstance(linear, LinearWeight):
                yield linear.weight
            if linear.activations is not None and linear.activations.scale is not None:
                yield linear.activations.scale
        if self.kv_cache is not None:
            yield from (self.kv_cache.key_scale, self.kv_cache.value_scale)


@dataclass(frozen=True)
class LoadedUnit:
    """A unit with its weights, ready to run."""

    unit: Unit
    weights: UnitWeights


def feed_forward_unit(config: Llama4Config, layer: int) -> Unit:
    """The MLP every token of a layer goes through: the dense one, or the shared expert."""
    return Unit(layer, Part.SHARED if layer in config.text.moe_layers else Part.DENSE)


def expert_unit(layer: int, expert: int) -> Unit:
    """One routed expert."""
    return Unit(layer, Part.EXPERT, expert)


def layer_units(config: Llama4Config, layer: int) -> list[Unit]:
    """All units of a layer in the order they run."""
    experts = range(config.text.num_local_experts if layer in config.text.moe_layers else 0)
    units = [Unit(layer, Part.ATTENTION), feed_forward_unit(config, layer)]
    return units + [expert_unit(layer, expert) for expert in experts]


def module_names(config: Llama4Config, unit: Unit) -> dict[str, str]:
    """The unit's matrices: name below the layer or MLP, and runtime module."""
    prefix = canonical_naming(config).layer(unit.layer)
    if unit.part is Part.ATTENTION:
        below = (f"{parts.ATTENTION}.{name}" for name in parts.ATTENTION_MATRICES)
        return {name: f"{prefix}{name}" for name in below}
    prefix += mlp_prefix(Role(unit.part.value), unit.expert)
    return {name: f"{prefix}{name}" for name in parts.MLP_MATRICES}


def load_unit(weights: Weights, unit: Unit) -> UnitWeights:
    """Read a unit. Raises SourceError or L4packError naming what can't be read."""
    config = weights.checkpoint.config
    names = module_names(config, unit)
    by_module = weights.linears(names.values(), tiled=weights.tiled and unit.part is not Part.ATTENTION)
    return UnitWeights(
        {local: by_module[module] for local, module in names.items()},
        {local: weights.tensor(name) for local, name in _small_tensors(weights, unit).items()},
        weights.kv_cache(unit.layer) if unit.part is Part.ATTENTION else None,
    )


def load_small(weights: Weights, layer: int) -> UnitWeights:
    """A layer's norms and router alone. Raises SourceError naming what can't be read."""
    names = _small_tensors(weights, Unit(layer, Part.ATTENTION))
    return UnitWeights({}, {local: weights.tensor(name) for local, name in names.items()})


def unit_bytes(weights: Weights, unit: Unit) -> int:
    """Bytes of a unit's matrices in the checkpoint's files."""
    return weights.nbytes(module_names(weights.checkpoint.config, unit).values())


def _small_tensors(weights: Weights, unit: Unit) -> dict[str, str]:
    if unit.part is not Part.ATTENTION:
        return {}
    config = weights.checkpoint.config
    prefix = canonical_naming(config).layer(unit.layer)
    local = [f"{norm}.{parts.WEIGHT}" for norm in parts.LAYER_NORMS]
    if unit.layer in config.text.moe_layers:
        local.append(f"{ROUTER}.{parts.WEIGHT}")
    if config.text.attention_bias:
        local += [f"{parts.ATTENTION}.{name}.{parts.BIAS}" for name in parts.ATTENTION_MATRICES]
    return {name: f"{prefix}{name}" for name in local}


def place(module: nn.Module, unit: UnitWeights) -> None:
    """Put a unit's weights into a module built without any; its matrices round their inputs as the scheme says."""
    for name, linear in unit.linears.items():
        if isinstance(linear, TiledWeight):
            target: nn.Module = TiledLinear(linear.tiles)
            module.set_submodule(name, target)
        else:
            target = module.get_submodule(name)
            target.weight = nn.Parameter(linear.weight, requires_grad=False)
        if (rounded := linear.activations) is not None:
            target.register_forward_pre_hook(lambda _, inputs, rounded=rounded: (rounded(inputs[0]),))
    for name, tensor in unit.tensors.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
