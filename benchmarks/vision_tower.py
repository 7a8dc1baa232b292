"""Tiles of images through Scout's whole vision tower, streamed layer by layer; fails past the memory that is planned.

    python benchmarks/vision_tower.py --tiles 1

The tower is at its real size, in front of a text model of width 128: a file of 1.7 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from real_size import values
from transformers.models.llama4 import modeling_llama4  # noqa: F401  loaded before memory is measured

from l4pack.checkpoint.source import open_folder
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.model.config import known_config, parse_config
from l4pack.model.tensors import catalogue
from l4pack.plan.assign import PlannedTensor
from l4pack.plan.memory import Sight
from l4pack.recipe import KEEP
from l4pack.stream.compute import Compute
from l4pack.stream.embed import image_features
from l4pack.stream.modules import Skeleton, upstream_config
from l4pack.stream.weights import Weights
from l4pack.timing.counts import seeing
from l4pack.timing.work import Kind
from l4pack.units import human_bytes
from l4pack.work.machine import peak_rss

FOLDER = Path(".bench/scout-vision")
NARROW = {"hidden_size": 128, "num_hidden_layers": 1, "num_local_experts": 1, "num_attention_heads": 1,
          "num_key_value_heads": 1, "intermediate_size": 128, "vocab_size": 256, "no_rope_layers": [1]}  # fmt: skip


def make(folder: Path) -> None:
    """Write the checkpoint, unless it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = dict(known_config("llama-4-scout").raw)
    raw["text_config"] = {**raw["text_config"], **NARROW}
    specs = catalogue(parse_config(raw)).tensors
    planned = [PlannedTensor(s.name, "BF16", s.shape, s.role, s.layer, None, KEEP) for s in specs]
    shards, _ = CONTAINER.lay_out([[tensor] for tensor in planned], limit=1 << 62)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(shards[0].prefix)
        for spec in specs:
            stream.writelines(values(spec))
    (folder / "config.json").write_text(json.dumps(raw))


def main() -> None:
    """Measure, and fail past the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=4)
    tiles = parser.parse_args().tiles
    make(FOLDER)
    checkpoint, compute = open_folder(FOLDER), Compute.of("cpu")
    config = checkpoint.config
    assert config.vision is not None
    side = config.vision.image_size
    pixels = torch.randn(tiles, config.vision.num_channels, side, side).bfloat16()
    skeleton = Skeleton(config, compute.device, compute.dtype)
    before, started, clock = peak_rss(), time.process_time(), time.perf_counter()
    with Weights(checkpoint, compute.device, compute.dtype) as weights:
        image_features(weights, skeleton, pixels, upstream_config(config))
    taken, planned = peak_rss() - before, Sight(config.vision, tiles, 0).running(config.text, 4)
    operations = seeing(config, tiles).total(Kind.FORWARD)
    print(
        f"{tiles} tiles: {human_bytes(taken)} of {human_bytes(planned)} planned, {time.perf_counter() - clock:.0f} s, "
        f"{time.process_time() - started:.0f} s of processor time for {operations / 1e12:.2f} TFLOP"
    )
    sys.exit(taken > planned)


if __name__ == "__main__":
    main()
