"""Make a mid-size Llama 4 checkpoint with made-up weights: too large to toy with, small enough for tools that load it.

    python benchmarks/midsize.py FOLDER [--layers 4]    # MoE layers, 16 experts, hidden 2048, expert width 4096: 3.5 GB

For costs only: its answers mean nothing. Tokenizer and vision tower are the demo model's. Values are streamed to disk,
one shard a layer. They are as unlike each other as trained ones are: channels differ in spread, a few weights are large,
norms are near one, and router rows are independent, so that tokens spread over the experts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack import demo
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.model.config import parse_config
from l4pack.model.tensors import Role, TensorSpec, catalogue
from l4pack.plan.assign import PlannedTensor
from l4pack.recipe import KEEP

SHARD_BYTES = 1_000_000_000
ROWS = 1 << 23  # values made at a time
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "intermediate_size_mlp": 8192,
    "num_local_experts": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "interleave_moe_layer_step": 1,
}
BY_LAYER = ("no_rope_layers", "moe_layers", "layer_types")
COMPANIONS = ("tokenizer", "special_tokens", "chat_template", "preprocessor", "processor", "generation")


def config(layers: int) -> dict[str, Any]:
    """The demo's config.json with larger sizes, of at most the demo's four layers."""
    raw: dict[str, Any] = json.loads((demo.model_path() / "config.json").read_text())
    text = raw["text_config"]
    text |= SIZES | {"num_hidden_layers": layers}
    text |= {key: text[key][:layers] for key in BY_LAYER if text.get(key) is not None}
    return raw


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint, unless it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    raw = config(layers)
    specs = {spec.name: spec for spec in catalogue(parse_config(raw)).tensors}
    planned = [[PlannedTensor(s.name, "BF16", s.shape, s.role, s.layer, None, KEEP)] for s in specs.values()]
    shards, _ = CONTAINER.lay_out(planned, SHARD_BYTES)
    for shard in shards:
        with (folder / shard.file).open("wb") as stream:
            stream.write(shard.prefix)
            for name in shard.tensors:
                for values in made_up(specs[name], raw["text_config"]["num_hidden_layers"]):
                    stream.write(bfloat16(values).tobytes())
    for path in demo.model_path().iterdir():
        if path.name.startswith(COMPANIONS):
            shutil.copyfile(path, folder / path.name)
    index = CONTAINER.index(shards, sum(tensor.nbytes for (tensor,) in planned))
    if index is not None:
        (folder / CONTAINER.index_name).write_bytes(index)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))


def made_up(spec: TensorSpec, layers: int) -> Iterator[NDArray[np.float32]]:
    """A tensor's values, piece by piece in the order of the file; the same for the same name."""
    generator = np.random.default_rng(zlib.crc32(spec.name.encode()))
    for start in range(0, spec.numel, ROWS):
        count = min(ROWS, spec.numel - start)
        yield _piece(spec, layers, generator, count)


def _piece(spec: TensorSpec, layers: int, generator: np.random.Generator, count: int) -> NDArray[np.float32]:
    values = generator.standard_normal(count, np.float32)
    if "norm" in spec.name and len(spec.shape) == 1:
        return (1 + 0.1 * values).astype(np.float32)
    if spec.role is Role.EMBEDDING or spec.role is Role.ROUTER:
        return values * np.float32(1.0 if spec.role is Role.EMBEDDING else 0.02)
    width = spec.shape[-1]
    spread = 0.02 * generator.lognormal(0.0, 0.3, width).astype(np.float32)
    if "down_proj" in spec.name or "o_proj" in spec.name:
        spread /= np.float32(np.sqrt(2 * layers))  # else each layer would drown those before it
    values[generator.integers(count, size=count // 4096)] *= 6
    return values * np.resize(spread, count)


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even: the upper half of each float32."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def main() -> None:
    """Make it and say what it weighs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    folder: Path = options.folder
    make(folder, options.layers)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
