"""What the parameters of a loaded vLLM model stand for, as plain matrices named after their checkpoint projections.

Works on the layout vLLM keeps between `load_weights` and `process_weights_after_loading`: compressed-tensors' own, fused
(qkv, gate and up) or stacked (experts), with rows of q and k already permuted for vLLM's rotary embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FUSED_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FP4_BITS, E8M0_BIAS = 4, 127
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
STACKED = {"w13_": ("gate_proj", "up_proj"), "w2_": ("down_proj",)}


@dataclass(frozen=True)
class Matrix:
    """One projection's weight, or any other parameter. `num_bits` is None where nothing was quantized."""

    name: str
    values: torch.Tensor
    num_bits: int | None

    @property
    def kind(self) -> str:
        """The name without layer and expert numbers, from the text model's or the vision model's root."""
        parts = [part for part in self.name.split(".") if not part.isdigit()]
        return ".".join(part for part in parts if part not in ("language_model", "model", "layers", "weight"))


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Every parameter of the model as float32 values, quantized ones dequantized, fused ones split by projection."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod):
            continue
        if isinstance(module, RoutedExperts):
            yield from _experts(name.removesuffix(".routed_experts"), module)
        elif isinstance(module, LinearBase):
            yield from _linear(name, module)
        else:
            yield from _plain(name, module, seen)


def _plain(name: str, module: nn.Module, seen: set[int]) -> Iterator[Matrix]:
    for suffix, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield Matrix(f"{name}.{suffix}", parameter.data.float(), None)


def _linear(name: str, module: Any) -> Iterator[Matrix]:
    prefix, _, last = name.rpartition(".")
    sizes = list(module.output_partition_sizes)
    projections = FUSED_NAMES.get(last, (last,))
    parameters = dict(module.named_parameters(recurse=False))
    if "bias" in parameters:
        yield Matrix(f"{name}.bias", parameters["bias"].data.float(), None)
    num_bits = _num_bits(parameters, "", getattr(module, "scheme", None))
    values = _dequantize(parameters, "", num_bits, sizes)
    for projection, part in zip(projections, values.split(sizes), strict=True):
        yield Matrix(f"{prefix}.{projection}.weight", part, num_bits)


def _experts(name: str, module: Any) -> Iterator[Matrix]:
    parameters = dict(module.named_parameters(recurse=False))
    for stack, projections in STACKED.items():
        num_bits = _num_bits(parameters, stack, module.quant_method)
        own = {key: parameter.data for key, parameter in parameters.items() if key.startswith(stack)}
        rows = next(own[f"{stack}{kind}"] for kind in ("weight_packed", "weight") if f"{stack}{kind}" in own).shape[1]
        sizes = [rows // len(projections)] * len(projections)
        for expert in range(module.global_num_experts):
            one = {key: stacked[expert] for key, stacked in own.items()}
            values = _dequantize(one, stack, num_bits, sizes)
            for projection, part in zip(projections, values.split(sizes), strict=True):
                yield Matrix(f"{name}.{expert}.{projection}.weight", part, num_bits)


def _num_bits(parameters: dict[str, Any], stack: str, owner: Any) -> int | None:
    if f"{stack}weight_packed" in parameters:
        return int(getattr(owner, "num_bits", FP4_BITS))
    return 8 if f"{stack}weight_scale" in parameters else None


def _dequantize(
    parameters: dict[str, torch.Tensor], stack: str, num_bits: int | None, row_sizes: list[int]
) -> torch.Tensor:
    if num_bits is None:
        return parameters[f"{stack}weight"].float()
    scale = parameters[f"{stack}weight_scale"].float()
    packed = parameters.get(f"{stack}weight_packed")
    if packed is None:
        weight = parameters[f"{stack}weight"].float()
        return weight * _expand(scale, weight.shape, row_sizes)
    if packed.dtype is torch.uint8:
        over = parameters.get(f"{stack}weight_global_scale")
        return _fp4(packed, parameters[f"{stack}weight_scale"], over, row_sizes)
    levels = unpack(packed, num_bits)
    packed_zero_point = parameters.get(f"{stack}weight_zero_point")
    if packed_zero_point is None:
        zero_point = torch.tensor(2.0 ** (num_bits - 1))
    else:
        zero_point = _expand(unpack(packed_zero_point.T, num_bits).T, levels.shape, row_sizes)
    return (levels - zero_point) * _expand(scale, levels.shape, row_sizes)


def _fp4(packed: torch.Tensor, scale: torch.Tensor, over: torch.Tensor | None, row_sizes: list[int]) -> torch.Tensor:
    """E2M1 codes, the low half of a byte first, times E4M3 scales over a global one, or powers of two where there is none."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])[codes]
    if over is None:
        return values * _expand(torch.exp2(scale.float() - E8M0_BIAS), values.shape, row_sizes)
    return values * _expand(scale.float(), values.shape, row_sizes) / _expand(over.reshape(-1), values.shape, row_sizes)


def unpack(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Split int32 words `[rows, columns]` into `32 / num_bits` unsigned levels each, low bits first, as float32.

    Raises NotImplementedError for other than 4 and 8 bits.
    """
    if num_bits not in (4, 8):
        raise NotImplementedError(f"values of {num_bits} bits are not compared, only of 4 and 8")
    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32)
    levels = (words.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
    return levels.flatten(-2).float()


def _expand(grid: torch.Tensor, shape: torch.Size, row_sizes: list[int]) -> torch.Tensor:
    """Repeat scales or zero points of any strategy to one value for each weight.

    One value for each of the fused projections (per tensor), or a grid `[rows or row blocks, groups]`.
    """
    if grid.dim() < 2:
        return grid.reshape(-1).repeat_interleave(torch.tensor(row_sizes)).unsqueeze(1).expand(shape)
    rows, columns = (-(-size // count) for size, count in zip(shape, grid.shape, strict=True))
    return grid.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
