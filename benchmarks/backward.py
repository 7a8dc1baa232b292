"""The walk up and back that two-sided rounding needs, beside a walk forward: processor time, memory and disk.

    python benchmarks/backward.py demo                          # 32 sequences of 512 tokens
    python benchmarks/backward.py .bench/scout-2 --samples 1    # a real-size layer of two experts, made if it is not there

Fails where the way down takes more than three times what the walk forward takes, where the peak resident memory is over the
plan, or where there is more on disk than planned. Each side is a process of its own; tokens are made up. Numbers are of one
thread unless OMP_NUM_THREADS says more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from real_size import make_checkpoint

from l4pack.checkpoint.open import open_source
from l4pack.gradient.moments import GradientMoments, MomentsKeeper
from l4pack.gradient.walk import BackwardWalk
from l4pack.plan.gradient import GradientNeeds, walking_back
from l4pack.plan.memory import Computing
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.modules import Skeleton
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.units import human_bytes
from l4pack.work.identity import Identity
from l4pack.work.machine import peak_rss

MOST = 3.0
JOB = Identity({"job": "benchmark"})


def measured(source: str, samples: int, length: int, way: str) -> dict[str, Any]:
    """One side, in this process."""
    checkpoint, cpu = open_source(source), torch.device("cpu")
    text = checkpoint.config.text
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(1024, text.vocab_size), (samples, length), generator=draw).tolist()
    packed = Packed([TokenSequence(tuple(row)) for row in tokens])
    importlib.import_module("transformers.models.llama4.modeling_llama4")  # takes seconds, once
    with tempfile.TemporaryDirectory(dir=".") as folder, Weights(checkpoint, cpu, torch.float32) as weights:
        model = Model("model", weights, Skeleton(checkpoint.config, cpu, torch.float32))
        started = time.process_time()
        if way == "forward":
            with Walk([Lane("model", model, packed)], Path(folder), JOB, release=True) as walk:
                walk.run()
            return {"seconds": time.process_time() - started, "peak": peak_rss()}
        clock = _Clock(Path(folder))
        keeper = MomentsKeeper(GradientMoments(Path(folder), text.hidden_size), 0)
        BackwardWalk(model, packed, Path(folder), JOB, 0, keeper, progress=Progress(label=clock.label)).walk()
        ended = time.process_time()
    computing = Computing(text, "cpu", 4, length, samples * length)
    needs = GradientNeeds(text, samples, samples * length, walking_back(computing), True)
    return {
        "up": clock.turned - started, "down": ended - clock.turned, "peak": peak_rss(), "disk": clock.disk,
        "planned": needs.memory.ram, "planned_disk": needs.disk_bytes,
    }  # fmt: skip


class _Clock:
    """When the walk turned, and the most that was on disk before any unit."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.turned, self.disk = folder, 0.0, 0

    def label(self, what: str) -> None:
        """A unit begins."""
        if what == "gradient of the answers":
            self.turned = time.process_time()
        files = [path for path in self._folder.rglob("*") if path.is_file() and path.suffix != ".json"]
        self.disk = max(self.disk, sum(path.stat().st_size for path in files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--way", choices=("forward", "back"))
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.source, options.samples, options.length, options.way)))
        return
    kind, _, experts = Path(options.source).name.partition("-")
    if kind in ("scout", "maverick") and experts.isdigit():
        make_checkpoint(Path(options.source), kind, int(experts))
    forward, back = (_in_a_process(way) for way in ("forward", "back"))
    ratio, whole = (one / forward["seconds"] for one in (back["down"], back["up"] + back["down"]))
    print(
        f"forward {forward['seconds']:.1f} s; up {back['up']:.1f} s, down {back['down']:.1f} s: {ratio:.2f} times the walk"
    )
    print(f"forward, up and down together {whole:.2f} times")
    print(
        f"peak memory {human_bytes(back['peak'])} of {human_bytes(back['planned'])}, forward {human_bytes(forward['peak'])}"
    )
    print(f"disk {back['disk']:,} bytes, {back['planned_disk']:,} planned")
    wrong = [ratio > MOST, back["peak"] > back["planned"], back["disk"] > back["planned_disk"]]
    sys.exit(int(any(wrong)))


def _in_a_process(way: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--way", way]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


if __name__ == "__main__":
    main()
