"""The single damages that broken artifacts are made of: each changes a folder of safetensors and JSON in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from l4pack.artifact.manifest import MANIFEST_NAME, file_record, shard_record, tensor_record
from l4pack.checkpoint.header import read_header

Tensors = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.1."
EXPERTS = f"{LAYER}feed_forward.experts."
ROUTER = f"{LAYER}feed_forward.router"
GATE, UP, DOWN = (f"{EXPERTS}2.{name}_proj" for name in ("gate", "up", "down"))
PARTS = ("weight_packed", "weight_scale", "weight_shape")


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    path.unlink()  # hard links of other tests keep their bytes
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def edit_json(folder: Path, change: Callable[[dict[str, Any]], Any], file: str = "config.json") -> None:
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(value))


def stanza(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, lambda config: change(config["quantization_config"]))


def tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return run


def remove(*files: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return run


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def run(state: Tensors) -> None:
        state[name] = change(state[name])

    return tensors(run)


def drop(*names: str) -> Callable[[Path], None]:
    return tensors(lambda state: {name: value for name, value in state.items() if not name.startswith(names)})


def swap(first: str, second: str) -> Callable[[Path], None]:
    def run(state: Tensors) -> None:
        for part in PARTS:
            a, b = f"{first}.{part}", f"{second}.{part}"
            state[a], state[b] = state[b], state[a]

    return tensors(run)


def copy_module(old: str, new: str) -> Callable[[Path], None]:
    return tensors(lambda state: state.update({f"{new}.{part}": state[f"{old}.{part}"] for part in PARTS}))


def quantized(weight: torch.Tensor) -> Tensors:
    """Int4 group 128 of a matrix [out, in], by plain torch."""
    groups = weight.float().reshape(weight.shape[0], -1, 128)
    scale = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
    codes = (torch.clamp(torch.round(groups / scale.float()[..., None]), -8, 7) + 8).to(torch.int64)
    words = (codes.reshape(weight.shape[0], -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    return {
        "weight_packed": (words - ((words >> 31) << 32)).to(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def dequantized(state: Tensors, module: str) -> torch.Tensor:
    words, scale = state[f"{module}.weight_packed"], state[f"{module}.weight_scale"].float()
    codes = (words.to(torch.int64)[..., None] >> torch.arange(0, 32, 4)) & 15
    levels = codes.reshape(*scale.shape, -1) - 8
    return (levels * scale[..., None]).reshape(words.shape[0], -1).to(torch.bfloat16)


def requantize(module: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Quantize what `change` makes of the weights: a rounded artifact of the wrong matrix."""

    def run(state: Tensors) -> None:
        parts = quantized(change(dequantized(state, module)))
        state.update({f"{module}.{name}": value for name, value in parts.items()})

    return tensors(run)


def wrong_axis(state: Tensors) -> None:
    """Cut gate_up [in, 2 out] into halves along `in`, and take each half for an [out, in] matrix."""
    gate_up = torch.cat([dequantized(state, GATE).T, dequantized(state, UP).T], dim=1)
    for module, half in zip((GATE, UP), gate_up.chunk(2, dim=0), strict=True):
        state.update({f"{module}.{name}": value for name, value in quantized(half).items()})


def interleaved(state: Tensors) -> None:
    """Take gate and up for alternating columns of the fused tensor instead of its halves."""
    gate_up = torch.cat([dequantized(state, GATE), dequantized(state, UP)])
    for module, part in ((GATE, gate_up[0::2]), (UP, gate_up[1::2])):
        state.update({f"{module}.{name}": value for name, value in quantized(part).items()})


def in_bfloat16(prefix: str) -> Callable[[Path], None]:
    """Leave modules unquantized, whatever the stanza says."""

    def run(state: Tensors) -> None:
        for name in [name for name in state if name.startswith(prefix) and name.endswith("weight_packed")]:
            module = name.removesuffix(".weight_packed")
            state[f"{module}.weight"] = dequantized(state, module)
            for part in PARTS:
                del state[f"{module}.{part}"]

    return tensors(run)


def quantize_plain(name: str) -> Callable[[Path], None]:
    def run(state: Tensors) -> None:
        module, weight = name.removesuffix(".weight"), state.pop(name)
        state.update({f"{module}.{part}": value for part, value in quantized(weight).items()})

    return tensors(run)


def fuse_packed(state: Tensors) -> None:
    for projection in ("gate", "up", "down"):
        for part in PARTS:
            names = [f"{EXPERTS}{expert}.{projection}_proj.{part}" for expert in range(4)]
            values = torch.stack([state.pop(name) for name in names])
            if projection == "down" and part == "weight_packed":
                state[f"{EXPERTS}down_proj.weight_packed"] = values
            elif projection == "gate" and part == "weight_packed":
                state[f"{EXPERTS}gate_up_proj.weight_packed"] = values


def kv_scales(value: float) -> Callable[[Path], None]:
    def scheme(config: dict[str, Any]) -> None:
        config["kv_cache_scheme"] = {
            "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False,
        }  # fmt: skip

    def run(state: Tensors) -> None:
        for layer in range(4):
            for suffix in ("k_scale", "v_scale"):
                state[f"language_model.model.layers.{layer}.self_attn.{suffix}"] = torch.tensor([value])

    return both(stanza(scheme), tensors(run))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[:-1000])


def extra_shard(folder: Path) -> None:
    save_file({"language_model.model.norm.weight": torch.ones(128)}, folder / "left-over.safetensors", {"format": "pt"})


def transposed_shape(value: torch.Tensor) -> torch.Tensor:
    return value + torch.tensor([0, 8])


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def first_is(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def one_level_up(words: torch.Tensor) -> torch.Tensor:
    """Move one code by two levels (bit 1 of a nibble)."""
    words[3, 5] ^= 2 << 8
    return words


def set_ignore(*entries: str) -> Callable[[Path], None]:
    return stanza(lambda config: config.update(ignore=list(entries)))


def set_group(**weights: Any) -> Callable[[Path], None]:
    return stanza(lambda config: config["config_groups"]["group_0"]["weights"].update(weights))


def rename_tensors(old: str, new: str) -> Callable[[Path], None]:
    return tensors(lambda state: {name.replace(old, new, 1): value for name, value in state.items()})


def text_of(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        changed = change((folder / file).read_text())
        (folder / file).unlink()
        (folder / file).write_text(changed)

    return run


def unsigned(folder: Path) -> Path:
    """Take the manifest away, so that damage must be found by what it is and not by its digest."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    return folder


def resigned(folder: Path) -> Path:
    """Damage done before the manifest was written: it agrees with the files, and its recipe is what was asked for."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    shards = sorted(folder.glob("*.safetensors"))
    manifest["files"] = {
        file.name: file_record(file.stat().st_size, sha256(file.read_bytes()).hexdigest())
        for file in folder.iterdir()
        if file.name != MANIFEST_NAME and file not in shards
    }
    manifest["shards"], manifest["tensors"] = {}, {}
    for shard in shards:
        raw = shard.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        manifest["shards"][shard.name] = shard_record(len(raw), raw[:start])
        for entry in read_header(shard, shard.name).values():
            digest = sha256(raw[entry.start : entry.start + entry.nbytes]).hexdigest()
            manifest["tensors"][entry.name] = tensor_record(entry, digest)
    path.unlink()
    path.write_text(json.dumps(manifest))
    return folder


def config(*keys: str, value: Any) -> Callable[[Path], None]:
    """Set a value of config.json."""

    def change(raw: dict[str, Any]) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return lambda folder: edit_json(folder, change)


def add(file: str, text: str = "x") -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)

    return run


def group(**values: Any) -> Callable[[Path], None]:
    return stanza(lambda config: config["config_groups"]["group_0"].update(values))


def times(factor: float, row: int = 5, column: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """One scale times a factor."""

    def change(scale: torch.Tensor) -> torch.Tensor:
        scale[row, column] *= factor
        return scale

    return change


def turned(words: torch.Tensor) -> torch.Tensor:
    """The signs of a group's codes (the first 16 words of a row) the other way round: q to -1 - q."""
    words[5, :16] = ~words[5, :16]
    return words
