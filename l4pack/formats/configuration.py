"""A scheme in compressed-tensors' words (its `QuantizationArgs`), and a scheme read from them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from l4pack.quant.grid import ScaleDtype
from l4pack.quant.scheme import Observer, Scheme

SCHEME_KEYS = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
"""What decides the numbers of a group's `weights`."""
_OBSERVERS = {Observer.MINMAX: "memoryless_minmax", Observer.MSE: "memoryless_mse"}


class Activations(StrEnum):
    """What a runtime does to the inputs of a matrix."""

    NONE = "none"
    DYNAMIC_TOKEN = "dynamic_token"
    DYNAMIC_GROUP = "dynamic_group"
    STATIC_TENSOR = "static_tensor"
    LOCAL_GROUP = "local_tensor_group"


OBSERVED = (Activations.STATIC_TENSOR, Activations.LOCAL_GROUP)
"""Those that take a scale out of the file, which calibration finds; for `local_tensor_group` a global one."""


_INPUTS: dict[Activations, dict[str, Any]] = {
    Activations.DYNAMIC_TOKEN: {"strategy": "token"},
    Activations.DYNAMIC_GROUP: {"strategy": "group", "group_size": 128},
    Activations.LOCAL_GROUP: {
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "observer": "static_minmax",
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    },
    Activations.STATIC_TENSOR: {"strategy": "tensor", "dynamic": False, "observer": _OBSERVERS[Observer.MINMAX]},
}


def arguments(**values: Any) -> dict[str, Any]:
    """A `QuantizationArgs`, its defaults filled in."""
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


_CODED_SCALES = {ScaleDtype.E8M0: "torch.uint8", ScaleDtype.E4M3: "torch.float8_e4m3fn"}
_OWN_SCALES = ScaleDtype.Q4_K  # a word that compressed-tensors does not know, and refuses


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """How a scheme's weights are quantized."""
    coded = _CODED_SCALES.get(scheme.scale_dtype)
    return arguments(
        **({} if coded is None else {"scale_dtype": coded, "zp_dtype": coded}),
        **({"scale_dtype": _OWN_SCALES.value} if scheme.super_blocked else {}),
        num_bits=scheme.num_bits,
        type=scheme.type.value,
        symmetric=scheme.symmetric,
        strategy=scheme.strategy.value,
        group_size=scheme.group_size,
        block_structure=list(scheme.block_structure) if scheme.block_structure else None,
        observer=_OBSERVERS[scheme.observer],
    )


def input_arguments(activations: Activations) -> dict[str, Any] | None:
    """How a scheme's inputs are quantized; None where they are not."""
    if activations is Activations.NONE:
        return None
    return arguments(**{"type": "float", "dynamic": True, **_INPUTS[activations]})


def read_scheme(given: Mapping[str, Any]) -> Scheme:
    """The scheme that a group's `weights` state, as far as it shows in files. Raises pydantic's ValidationError."""
    own = ("scale_dtype",) if given.get("scale_dtype") == _OWN_SCALES else ()
    return Scheme.model_validate({key: given[key] for key in (*SCHEME_KEYS, *own) if given.get(key) is not None})


def as_compressed_tensors(group: Mapping[str, Any]) -> dict[str, Any]:
    """A config group of a format that compressed-tensors does not have, in words that it checks: the nearest it has."""
    given = group["weights"]
    weights = {key: given[key] for key in given if key != "scale_dtype"} if isinstance(given, Mapping) else given
    return {**group, "format": "pack-quantized", "weights": weights}


def read_inputs(given: Mapping[str, Any] | None) -> str:
    """A group's `input_activations` as one of `Activations`, or another word put together alike."""
    if given is None:
        return Activations.NONE
    dynamic = given.get("dynamic")
    when = "local" if dynamic == "local" else "dynamic" if dynamic else "static"
    return f"{when}_{given.get('strategy')}"
