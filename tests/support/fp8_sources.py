"""Checkpoints released in FP8, made with torch alone: compressed-tensors as Meta's Maverick has it, and fbgemm_fp8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from models import unfuse, write_weights
from safetensors.torch import load_file

FP8 = torch.float8_e4m3fn
State = dict[str, torch.Tensor]


def _weights(folder: Path) -> State:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def scales(weight: torch.Tensor, strategy: str, side: int = 128) -> torch.Tensor:
    """float32 scales of an [out, in] matrix: [out, 1], [1] or [out / side, in / side]."""
    amax = weight.float().abs()
    if strategy == "channel":
        return amax.amax(dim=1, keepdim=True) / 448
    if strategy == "tensor":
        return amax.amax().reshape(1) / 448
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(amax, (0, -columns % side, 0, -rows % side))
    blocks = padded.reshape(-(-rows // side), side, -(-columns // side), side)
    return blocks.amax(dim=(1, 3)) / 448


def spread(scale: torch.Tensor, shape: torch.Size, side: int = 128) -> torch.Tensor:
    """One scale a weight."""
    if scale.ndim == 2 and scale.shape[1] != 1:
        return scale.repeat_interleave(side, 0).repeat_interleave(side, 1)[: shape[0], : shape[1]]
    return scale.expand(shape)


def coded(weight: torch.Tensor, strategy: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales in `dtype`, and the float32 products."""
    scale = scales(weight, strategy).to(dtype)
    wide = spread(scale.float(), weight.shape)
    codes = (weight.float() / wide).clamp(-448, 448).to(FP8)
    return codes, scale, codes.float() * wide


def _stanza(strategy: str, ignore: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, "observer": "minmax",
        "block_structure": [128, 128] if strategy == "block" else None,
    }  # fmt: skip
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "kv_cache_scheme": None, "ignore": ignore, "config_groups": {"group_0": group},
    }  # fmt: skip


def _finish(source: Path, out: Path, state: State, stanza: dict[str, Any] | None, shards: int) -> None:
    out.mkdir(parents=True)
    for path in source.iterdir():
        if not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy(path, out / path.name)
    write_weights(out, {name: tensor.contiguous() for name, tensor in state.items()}, shards)
    config = json.loads((source / "config.json").read_text())
    if stanza is not None:
        config["quantization_config"] = stanza
    (out / "config.json").write_text(json.dumps(config))


def compressed_fp8(
    source: Path, out: Path, *, strategy: str = "channel", dtype: torch.dtype = torch.bfloat16,
    roles: tuple[str, ...] = (".experts.",), shards: int = 1, plain: Path | None = None,
) -> Path:  # fmt: skip
    """Meta's layout: matrices whose names contain one of `roles` are FP8, experts one by one.

    `plain` gets the same model unquantized, with the float32 products in their place.
    """
    state, products = unfuse(_weights(source)), {}
    ignore = []
    for name, weight in list(state.items()):
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and "vision" not in name and any(role in name for role in roles):
            codes, scale, products[name] = coded(weight, strategy, dtype)
            state[name], state[f"{module}.weight_scale"] = codes, scale
        elif weight.ndim == 2:
            ignore.append(module)
    _finish(source, out, state, _stanza(strategy, ignore), shards)
    if plain is not None:
        _finish(source, plain, {**unfuse(_weights(source)), **products}, None, shards)
    return out


def fbgemm_fp8(source: Path, out: Path, *, linears: tuple[str, ...] = (), plain: Path | None = None) -> Path:
    """transformers' layout, as its `FbgemmFp8Quantize` writes it: fused experts in x out, scales in float32."""
    state, products = _weights(source), {}
    for name, weight in list(state.items()):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made = [coded(one.T, "channel", torch.float32) for one in weight]
            codes, scale, product = (torch.stack([one[index] for one in made]) for index in range(3))
            state[name], products[name] = codes.transpose(1, 2), product.transpose(1, 2)
            state[f"{name}_scale"] = scale if name.endswith("down_proj") else scale.transpose(1, 2)
        elif any(one in name for one in linears) and weight.ndim == 2:
            state[name], state[f"{name}_scale"], products[name] = coded(weight, "channel", torch.float32)
    stanza = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["router"]}
    _finish(source, out, state, stanza, 1)
    if plain is not None:
        dense = {name: tensor.contiguous() for name, tensor in {**_weights(source), **products}.items()}
        _finish(source, plain, dense, None, 1)
    return out
