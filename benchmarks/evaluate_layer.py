"""Evaluate one real-size Scout layer at few tokens beside its original, against reading the same bytes once.

    python benchmarks/evaluate_layer.py                # the original alone, then int4-rtn beside it; 1,024 tokens

The checkpoints walk as `l4pack evaluate ARTIFACT --against SOURCE` makes them, layer errors included, and are scored; the
disk's time is that of reading their files once, in the same run. Every measurement begins with no page of them in memory, in
a process of its own. On a busy machine the clock says little: processor seconds shared out to the cores are what the walk
takes on a quiet one where nothing waits for the disk.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from real_size import evict, make_checkpoint, quantize

from l4pack.checkpoint.source import open_folder
from l4pack.evaluate.answers import StreamAnswers
from l4pack.evaluate.layer_errors import SAMPLED_ROWS, LayerErrors
from l4pack.evaluate.outcome import score_models
from l4pack.plan.memory import computing_on
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.modules import Skeleton
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.units import human_bytes
from l4pack.work.identity import Identity
from l4pack.work.machine import peak_rss

SEQUENCE = 512
UPSTREAM = "transformers.models.llama4.modeling_llama4"
TARGET = 2.0
CHUNK = 1 << 26


def walked(folders: list[Path], tokens: int) -> dict[str, Any]:
    """Walk and score; the first folder is the original's."""
    compute = Compute.of("cpu")
    generator = torch.Generator().manual_seed(0)
    made_up = torch.randint(1024, (tokens // SEQUENCE, SEQUENCE), generator=generator).tolist()
    packed = Packed([TokenSequence(tuple(row)) for row in made_up])
    importlib.import_module(UPSTREAM)  # takes seconds, once
    clock, cpu = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        models = []
        for folder in folders:
            checkpoint = open_folder(folder)
            weights = stack.enter_context(Weights(checkpoint, compute.device, compute.dtype, tiled=True))
            models.append(Model(folder.name, weights, Skeleton(checkpoint.config, compute.device, compute.dtype)))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folders[0].parent)))
        config = models[0].weights.checkpoint.config
        lanes = [Lane(model.name, model, packed) for model in models]
        walk = stack.enter_context(
            Walk(lanes, work, Identity({"job": "bench"}), LayerErrors(config, paired=len(models) > 1))
        )
        walk.run()
        answers = [StreamAnswers(model, walk.streams[model.name].current) for model in models]
        score_models(answers, None, packed)
    found = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
    computing = computing_on(compute, config, packed.sequences, models=len(models), streams=len(models))
    computing = replace(computing, tiles=compute.tiles)
    found["planned_bytes"] = computing.memory(held=2 * SAMPLED_ROWS * computing.row, scored=True).ram
    return found


def read(folders: list[Path]) -> dict[str, Any]:
    """Read all weights once."""
    clock, cpu, buffer = time.perf_counter(), time.process_time(), bytearray(CHUNK)
    for folder in folders:
        descriptor, place = os.open(folder / "model.safetensors", os.O_RDONLY), 0
        while count := os.preadv(descriptor, [buffer], place):
            os.posix_fadvise(descriptor, place, count, os.POSIX_FADV_DONTNEED)
            place += count
        os.close(descriptor)
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}


def in_process(what: str, folders: list[Path], tokens: int) -> dict[str, Any]:
    """One measurement from a cold page cache, in a process of its own."""
    for folder in folders:
        evict(folder / "model.safetensors")
    command = [sys.executable, __file__, "--one", what, "--tokens", str(tokens), "--folders", *map(str, folders)]
    ended = subprocess.run(command, capture_output=True, check=False, text=True)
    if ended.returncode:
        sys.exit(ended.stderr)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def compare(folders: list[Path], tokens: int) -> float:
    """Print how long both take, and return the ratio: the walk's processor seconds, shared out, over the disk's time."""
    nbytes = sum((folder / "model.safetensors").stat().st_size for folder in folders)
    disk, walk = in_process("read", folders, tokens), in_process("walk", folders, tokens)
    cores = os.cpu_count() or 1
    print(f"{' and '.join(folder.name for folder in folders)}, {human_bytes(nbytes)}, {tokens} tokens:")
    print(f"  disk  {disk['seconds']:6.1f} s wall, {human_bytes(nbytes / disk['seconds'])}/s")
    print(f"  walk  {walk['seconds']:6.1f} s wall, {walk['cpu_seconds']:.1f} CPU s; peak RSS {human_bytes(walk['rss'])} "
          f"(planned {human_bytes(walk['planned_bytes'])})")  # fmt: skip
    if walk["rss"] > walk["planned_bytes"]:
        sys.exit("more was resident than planned")
    ratio = walk["cpu_seconds"] / cores / disk["seconds"]
    print(f"  ratio {walk['seconds'] / disk['seconds']:6.2f} by the clock; {ratio:.2f} by CPU seconds on {cores} cores")
    return ratio


def main() -> None:
    """Make both checkpoints, measure, print, and fail where the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--recipe", default="int4-rtn")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--one", choices=("walk", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--folders", type=Path, nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        found = walked(chosen.folders, chosen.tokens) if chosen.one == "walk" else read(chosen.folders)
        print(json.dumps({**found, "rss": peak_rss()}))
        return
    source, made = chosen.work / "scout-16", chosen.work / f"scout-16-{chosen.recipe}"
    make_checkpoint(source, "scout", 16)
    if not made.exists():
        quantize(source, made, chosen.recipe)
    compare([source], chosen.tokens)
    if compare([source, made], chosen.tokens) > TARGET:
        sys.exit(f"more than {TARGET} times the disk's time")


if __name__ == "__main__":
    main()
