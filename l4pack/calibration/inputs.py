"""The largest magnitude of every matrix' inputs, for scales that are fixed beforehand.

All routed experts of a layer share one scale for gate and up and one for down: runtimes fuse them and take the largest
(vLLM's `CompressedTensorsW8A8Fp8MoEMethod`), so what is written is what is served, and an expert that the text leaves
cold gets the scale of its layer. That holds for the global scales of NVFP4 inputs too, some of vLLM's kernels fuse them, and
one that is larger than an expert needs costs it nothing: scales of groups have 15 binades.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from l4pack.model import parts
from l4pack.quant.floats import store_scale
from l4pack.quant.grid import E4M3
from l4pack.quant.scales import input_global_scale
from l4pack.quant.suffixes import Suffix
from l4pack.stream.units import Part, Unit

if TYPE_CHECKING:
    from l4pack.plan.assign import Target
    from l4pack.quant.dtypes import FloatName


class InputScales:
    """Watches the matrices of some targets while one layer runs."""

    def __init__(self, observed: Sequence[Target]) -> None:
        self._observed = {target.module for target in observed}
        self._amax: dict[tuple[Unit, str], Tensor] = {}
        self._members: dict[tuple[Unit, str], list[str]] = {}

    def watch(self, unit: Unit, module: Any, names: Mapping[str, str]) -> None:
        """Look at the inputs of a unit's matrices, whose runtime names are given by their names in the unit."""
        shared = Unit(unit.layer, unit.part, None) if unit.part is Part.EXPERT else unit
        for local, name in names.items():
            if name in self._observed:
                key = (shared, "down" if local == parts.DOWN else "gate_up")
                self._members.setdefault(key, []).append(name)
                self._amax.setdefault(key, torch.zeros(()))
                submodule: nn.Module = module.get_submodule(local)
                submodule.register_forward_pre_hook(lambda _, inputs, key=key: self._see(key, inputs[0]))

    def _see(self, key: tuple[Unit, str], inputs: Tensor) -> None:
        if inputs.numel():
            self._amax[key] = torch.maximum(self._amax[key], inputs.abs().amax().cpu())

    def join(self, other: InputScales) -> None:
        """Take in what another has seen."""
        for key, names in other._members.items():
            mine = self._members.setdefault(key, [])
            mine += [name for name in names if name not in mine]
            self._amax[key] = torch.maximum(self._amax.get(key, torch.zeros(())), other._amax[key])

    def finish(self) -> dict[str, float]:
        """The largest magnitudes by module since the last call."""
        found = {name: float(self._amax[key]) for key, names in self._members.items() for name in names}
        self._amax, self._members = {}, {}
        return found


def stored_scale(amax: float, target: Target) -> NDArray[Any]:
    """The scale [1] of a target's inputs, as stored: what maps `amax` to the largest E4M3 value, or the global scale under
    which that value is the scale of a group of FP4 numbers."""
    tensor = target.input_scale
    if target.suffix(tensor) == Suffix.INPUT_GLOBAL_SCALE:
        return np.array([input_global_scale(amax)], np.float32)
    return store_scale(np.array([amax / E4M3.highest], np.float32), cast("FloatName", tensor.dtype))
