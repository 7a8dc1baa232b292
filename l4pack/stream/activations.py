"""What a runtime does to the inputs of a quantized matrix: rounding them to FP8 or int8 as the model runs.

The scales are vLLM's (`csrc/quantization/w8a8/fp8/common.cu`, `fp8_utils.per_token_group_quant_fp8`,
`int8/scaled_quant.cu`): one a token, one a token and group of columns, or one fixed for the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from l4pack.errors import L4packError
from l4pack.quant.grid import E4M3, GRIDS, INT8, Grid, NumberType
from l4pack.quant.torch_ops import nearest

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

SMALLEST_TOKEN_SCALE = {E4M3: 1 / (E4M3.highest * 512), INT8: 1e-30}
SMALLEST_GROUP_AMAX = 1e-10


@dataclass(frozen=True)
class RoundedInputs:
    """How the inputs of one matrix are rounded."""

    grid: Grid
    strategy: Literal["token", "group", "tensor"]
    group_size: int | None = None
    scale: Tensor | None = None  # of a static scheme: float32, one number

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs [..., in_features] as the rounded values they are multiplied as, in their own dtype."""
        values = inputs.float()
        if self.strategy == "group":
            values = values.reshape(*values.shape[:-1], -1, self.group_size or values.shape[-1])
        scale = self._scale(values)
        rounded = nearest(values / scale, self.grid) * scale
        return (rounded.flatten(-2) if self.strategy == "group" else rounded).to(inputs.dtype)

    def _scale(self, values: Tensor) -> Tensor:
        if self.scale is not None:
            return self.scale
        amax = values.abs().amax() if self.strategy == "tensor" else values.abs().amax(-1, keepdim=True)
        if self.strategy == "group":
            return amax.clamp(min=SMALLEST_GROUP_AMAX) / self.grid.highest
        return (amax / self.grid.highest).clamp(min=SMALLEST_TOKEN_SCALE[self.grid])


def activations_of(scheme: QuantizationScheme, input_scale: Tensor | None, module: str) -> RoundedInputs | None:
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
    return RoundedInputs(GRIDS[NumberType(kind), 8], strategy, args.group_size, scale)  # type: ignore[arg-type]


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
