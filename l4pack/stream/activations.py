"""What a runtime does to the inputs of a quantized matrix: rounding them to FP8 or int8 as the model runs.

The scales are vLLM's (`csrc/quantization/w8a8/fp8/common.cu`, `fp8_utils.per_token_group_quant_fp8`,
`int8/scaled_quant.cu`): one a token, one a token and group of columns, or one fixed for the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from l4pack.errors import L4packError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

E4M3_MAX, INT8_MAX = 448.0, 127.0
SMALLEST_TOKEN_SCALE = 1 / (E4M3_MAX * 512)
SMALLEST_GROUP_AMAX = 1e-10


@dataclass(frozen=True)
class Activations:
    """How the inputs of one matrix are rounded."""

    levels: Literal["float", "int"]
    strategy: Literal["token", "group", "tensor"]
    group_size: int | None = None
    scale: Tensor | None = None  # of a static scheme: float32, one number

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs [..., in_features] as the rounded values they are multiplied as, in their own dtype."""
        values = inputs.float()
        if self.strategy == "group":
            values = values.reshape(*values.shape[:-1], -1, self.group_size or values.shape[-1])
        scale = self._scale(values)
        rounded = (round_e4m3 if self.levels == "float" else _round_int)(values / scale) * scale
        return (rounded.flatten(-2) if self.strategy == "group" else rounded).to(inputs.dtype)

    def _scale(self, values: Tensor) -> Tensor:
        if self.scale is not None:
            return self.scale
        largest = E4M3_MAX if self.levels == "float" else INT8_MAX
        amax = values.abs().amax() if self.strategy == "tensor" else values.abs().amax(-1, keepdim=True)
        if self.strategy == "group":
            return amax.clamp(min=SMALLEST_GROUP_AMAX) / largest
        return (amax / largest).clamp(min=SMALLEST_TOKEN_SCALE if self.levels == "float" else 1e-30)


def round_e4m3(values: Tensor) -> Tensor:
    """float32 values rounded to E4M3, those beyond its range to its ends."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _round_int(values: Tensor) -> Tensor:
    return values.round().clamp(-INT8_MAX - 1, INT8_MAX)


def activations_of(scheme: QuantizationScheme, input_scale: Tensor | None, module: str) -> Activations | None:
    """The rounding a scheme's `input_activations` ask for. Raises L4packError for one that can't be simulated."""
    args = scheme.input_activations
    if args is None:
        return None
    kind, strategy = _text(args.type), _text(args.strategy)
    static = not args.dynamic
    known = args.num_bits == 8 and args.symmetric and strategy in ("token", "group", "tensor")
    if not known or (static and (strategy != "tensor" or input_scale is None)):
        raise L4packError(
            f"{module}: {args.num_bits}-bit {kind} activations by {strategy} are not simulated",
            hint="add --weights-only to evaluate the weights alone",
        )
    scale = input_scale.float().reshape(()) if static and input_scale is not None else None
    return Activations("float" if kind == "float" else "int", strategy, args.group_size, scale)  # type: ignore[arg-type]


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
