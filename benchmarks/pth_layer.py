"""One real-size Scout MoE layer as Meta's eight .pth shards: rounded to int4 beside the same layer in safetensors.

    python benchmarks/pth_layer.py --runs 3

Both lie on the disk (9 GB), runs take turns and start from a cold page cache, and the artifacts must be the same bytes. It
fails where the shards take more than 1.5 times as long, or 5 % more memory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from real_size import evict, make_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

SHARDS, EXPERTS = 8, 16
WALL_LIMIT, MEMORY_LIMIT = 1.5, 1.05


@dataclass(frozen=True)
class Run:
    """One process: wall and processor seconds, peak resident bytes, and SHA-256 of the weights it wrote."""

    wall: float
    cpu: float
    rss: int
    digest: str


def quantize(source: Path, out: Path, recipe: str) -> Run:
    """One run from a cold page cache; what it wrote is removed again."""
    for path in source.iterdir():
        evict(path)
    started = time.monotonic()
    command = [sys.executable, "-m", "l4pack", "quantize", str(source), "--recipe", recipe, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    with (out / "model.safetensors").open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    shutil.rmtree(out)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, digest)


def main() -> None:
    """Make both sources, unless they are there, and let them take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recipe", default="int4-rtn")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    options = parser.parse_args()
    plain, shards = options.work / f"scout-{EXPERTS}", options.work / f"scout-{EXPERTS}-pth"
    make_checkpoint(plain, "scout", EXPERTS)
    if not (shards / "params.json").exists():
        from meta_release import write_release

        write_release(plain, shards, SHARDS)
    found: dict[str, list[Run]] = {"safetensors": [], "pth": []}
    for _ in range(options.runs):
        for name, source in (("safetensors", plain), ("pth", shards)):
            found[name].append(quantize(source, options.work / "out", options.recipe))
    for name, runs in found.items():
        wall, cpu, rss = (
            statistics.median(values) for values in zip(*((r.wall, r.cpu, r.rss) for r in runs), strict=True)
        )
        print(f"{name:12} {wall:7.2f} s wall, {cpu:7.2f} CPU s, {rss / 1e9:.3f} GB peak")
    print(
        "artifacts:",
        "the same bytes" if len({run.digest for runs in found.values() for run in runs}) == 1 else "DIFFER",
    )
    judge(found)


def judge(found: dict[str, list[Run]]) -> None:
    """Fail past the limits."""
    (first, second) = found.values()
    wall = statistics.median(run.wall for run in second) / statistics.median(run.wall for run in first)
    memory = max(run.rss for run in second) / max(run.rss for run in first)
    print(f"pth / safetensors: {wall:.2f} x the wall time, {memory:.3f} x the memory")
    if wall > WALL_LIMIT or memory > MEMORY_LIMIT or len({run.digest for run in (*first, *second)}) > 1:
        sys.exit("past the limits")


if __name__ == "__main__":
    main()
