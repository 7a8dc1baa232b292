"""Quantize one real-size MoE layer to int4 and compare with `cp` of the same file in the same run.

    python benchmarks/real_size.py scout               # 16 experts, 4.2 GB
    python benchmarks/real_size.py maverick --experts 128   # 32 GB; fewer experts where the disk is short

The layer has Llama 4's exact shapes and made-up values: normal weights whose spread differs from channel to channel,
with a few outliers. Everything but the layer is kept small (vocabulary of 1024, no vision tower).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import open_folder
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.model.config import known_config, parse_config
from l4pack.model.tensors import TensorSpec, catalogue
from l4pack.plan.assign import PlannedTensor
from l4pack.recipe import KEEP
from l4pack.units import human_bytes

CHUNK = 1 << 24
RSS_LIMIT = 1_500_000_000
RATIO_LIMIT = 1.5


@dataclass(frozen=True)
class Measured:
    """One process: wall seconds and peak resident bytes."""

    seconds: float
    peak_rss_bytes: int


def layer_config(model: str, experts: int) -> dict[str, object]:
    """A one-layer text-only configuration with the model's own layer sizes."""
    text = dict(known_config(f"llama-4-{model}").raw["text_config"])
    text |= {"num_hidden_layers": 1, "num_local_experts": experts, "interleave_moe_layer_step": 1}
    text |= {"no_rope_layers": [1], "vocab_size": 1024, "architectures": ["Llama4ForCausalLM"]}
    return text


def make_checkpoint(folder: Path, model: str, experts: int) -> None:
    """Write the layer as one safetensors file, unless it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = layer_config(model, experts)
    specs = catalogue(parse_config(config)).tensors
    planned = [PlannedTensor(s.name, "BF16", s.shape, s.role, s.layer, None, KEEP) for s in specs]
    shards, places = CONTAINER.lay_out([[tensor] for tensor in planned], limit=1 << 62)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(shards[0].prefix)
        for spec in specs:
            assert stream.tell() == places[spec.name].start
            for block in values(spec):
                stream.write(block)
    (folder / "config.json").write_text(json.dumps(config))


@cache
def made_up() -> np.ndarray:
    """Normal BF16 weights whose spread differs from channel to channel, one in 4096 ten times larger."""
    generator = np.random.default_rng(0)
    block = generator.standard_normal(CHUNK, np.float32)
    block *= np.resize(generator.uniform(0.01, 0.03, 1024).astype(np.float32), CHUNK)
    block[::4096] *= 10
    return (block.view(np.uint32) >> 16).astype(np.uint16)


def values(spec: TensorSpec) -> Iterator[bytes]:
    """BF16 bytes of a tensor: the made-up block, turned by another amount each time."""
    generator = np.random.default_rng(zlib.crc32(spec.name.encode()))
    for start in range(0, spec.numel, CHUNK):
        turned = np.roll(made_up(), int(generator.integers(CHUNK)))
        yield turned[: spec.numel - start].tobytes()


def evict(path: Path) -> None:
    """Drop a file from the page cache, so that every run starts at the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(command: list[str]) -> Measured:
    """Run a command to its end, what it wrote safely on disk, and take its time and memory."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.monotonic() - started
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return Measured(seconds, usage.ru_maxrss * 1024)


def copy(source: Path, out: Path) -> Measured:
    """`cp` of the weights."""
    return measure(["cp", str(source / "model.safetensors"), str(out)])


def quantize(source: Path, out: Path, recipe: str) -> Measured:
    """`l4pack quantize` of the layer."""
    return measure([sys.executable, "-m", "l4pack", "quantize", str(source), "--recipe", recipe, "--out", str(out)])


def repeated(
    runs: int, source: Path, work: Path, jobs: dict[str, Callable[[Path], Measured]]
) -> dict[str, list[Measured]]:
    """Run the jobs in turn, `runs` times, each from a cold cache and with its output removed after."""
    results: dict[str, list[Measured]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            out = work / "out"
            evict(source / "model.safetensors")
            results[name].append(job(out))
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return results


def eager_seconds(source: Path, experts: int) -> float:
    """Seconds eager torch and compressed-tensors' packer need for `experts` experts, reading included.

    Not read through safetensors' own reader: it maps the whole file, which a small machine may refuse.
    """
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    checkpoint = open_folder(source)
    started = time.monotonic()
    with Reader(checkpoint.entries, lambda file: source / file) as reader:
        for name in ("gate_up_proj", "down_proj"):
            for expert in range(experts):
                stored = reader.matrix(f"model.layers.0.feed_forward.experts.{name}", expert)
                weight = torch.from_numpy(stored).view(torch.bfloat16).T.contiguous().float()
                groups = weight.unflatten(-1, (-1, 128))
                scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
                levels = (groups / scale).round().clamp(-8, 7).to(torch.int8).flatten(-2)
                pack_to_int32(levels, 4)
    return time.monotonic() - started


def report(source: Path, results: dict[str, list[Measured]], eager: tuple[int, float], experts: int) -> None:
    """Print the table."""
    size = (source / "model.safetensors").stat().st_size
    base = statistics.median(run.seconds for run in results["cp"])
    print(f"{human_bytes(size)}, {experts} experts; medians of {len(results['cp'])} cold runs, output synced to disk")
    for name, runs in results.items():
        seconds = statistics.median(run.seconds for run in runs)
        peak = max(run.peak_rss_bytes for run in runs)
        print(f"{name:24} {seconds / base:6.2f} x cp   {size / seconds / 1e9:5.2f} GB/s   peak {human_bytes(peak)}")
    some, taken = eager
    whole = taken * experts / some
    print(f"{'eager torch':24} {whole / base:6.2f} x cp   (from {some} of {experts} experts)")


def main() -> None:
    """Make the layer, measure, print, and fail where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("scout", "maverick"))
    parser.add_argument("--experts", type=int)
    parser.add_argument("--recipes", nargs="+", default=["int4-rtn"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    arguments = parser.parse_args()
    experts = arguments.experts or {"scout": 16, "maverick": 128}[arguments.model]
    source = arguments.work / f"{arguments.model}-{experts}"
    make_checkpoint(source, arguments.model, experts)
    jobs: dict[str, Callable[[Path], Measured]] = {"cp": lambda out: copy(source, out)}
    for recipe in arguments.recipes:
        jobs[recipe] = lambda out, recipe=recipe: quantize(source, out, recipe)  # type: ignore[misc]
    results = repeated(arguments.runs, source, arguments.work, jobs)
    some = min(2, experts)
    report(source, results, (some, eager_seconds(source, some)), experts)
    main_runs = results[arguments.recipes[0]]
    ratio = statistics.median(r.seconds for r in main_runs) / statistics.median(r.seconds for r in results["cp"])
    peak = max(run.peak_rss_bytes for run in main_runs)
    if ratio > RATIO_LIMIT or peak > RSS_LIMIT:
        sys.exit(f"{arguments.recipes[0]}: {ratio:.2f} x cp (limit {RATIO_LIMIT}), peak {human_bytes(peak)}")


if __name__ == "__main__":
    main()
