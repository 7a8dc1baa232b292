"""What a runtime does to the inputs of a quantized matrix: rounding them to FP8, int8 or FP4 as the model runs.

The scales are vLLM's (`csrc/quantization/w8a8/fp8/common.cu`, `fp8_utils.per_token_group_quant_fp8`,
`int8/scaled_quant.cu`): one a token, one a token and group of columns, or one fixed for the whole matrix; for FP4
(`csrc/quantization/fp4/nvfp4_quant_kernels.cu`) E4M3 scales of groups over a fixed global one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from l4pack.errors import L4packError
from l4pack.quant.grid import E4M3, GRIDS, INT8, Grid, NumberType, ScaleDtype
from l4pack.quant.torch_ops import nearest
from l4pack.quant.torch_scales import codes_of, values_of

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

SMALLEST_TOKEN_SCALE = {E4M3: 1 / (E4M3.highest * 512), INT8: 1e-30}
SMALLEST_GROUP_AMAX = 1e-10


@dataclass(frozen=True)
class RoundedInputs:
    """How the inputs of one matrix are rounded."""

    grid: Grid
    strategy: Literal["token", "group", "tensor", "tensor_group"]
    group_size: int | None = None
    scale: Tensor | None = None  # fixed, float32, one number: for `tensor_group` the global scale

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs [..., in_features] as the rounded values they are multiplied as, in their own dtype."""
        values = inputs.float()
        grouped = self.strategy in ("group", "tensor_group")
        if grouped:
            values = values.reshape(*values.shape[:-1], -1, self.group_size or values.shape[-1])
        scale = self._scale(values)
        rounded = nearest(values / scale, self.grid) * scale
        return (rounded.flatten(-2) if grouped else rounded).to(inputs.dtype)

    def _scale(self, values: Tensor) -> Tensor:
        if self.strategy == "tensor_group" and self.scale is not None:
            codes = codes_of(values.abs().amax(-1, keepdim=True), ScaleDtype.E4M3, self.scale)
            return values_of(codes, ScaleDtype.E4M3, self.scale)
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
    fixed = not args.dynamic or args.dynamic == "local"
    wanted = 4 if strategy == "tensor_group" and kind == "float" else 8
    known = args.num_bits == wanted and args.symmetric and strategy in ("token", "group", "tensor", "tensor_group")
    if not known or (fixed and (strategy not in ("tensor", "tensor_group") or input_scale is None)):
        raise L4packError(
            f"{module}: {args.num_bits}-bit {kind} activations by {strategy} are not simulated",
            hint="add --weights-only to evaluate the weights alone",
        )
    scale = input_scale.float().reshape(()) if fixed and input_scale is not None else None
    return RoundedInputs(GRIDS[NumberType(kind), wanted], strategy, args.group_size, scale)  # type: ignore[arg-type]


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
