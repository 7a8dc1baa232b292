"""One MoE layer calibrated and solved by two versions of the code: CPU seconds, which other work on the machine hardly changes.

    python benchmarks/layer_versions.py FOLDER --before OTHER/TREE [--solve 1] [--experts 16] [--tokens 8192]
        [--hidden 5120] [--inner 8192] [--min-tokens 1024] [--recipe int4] [--threads 1]

The layer is that of real_size_gptq.py. Each version runs attention of both streams, solves the shared expert and `--solve`
of the routed ones, runs them in both streams, and is then stopped as a signal stops it; the other
experts, of which each gets about as many tokens, are counted to take as long. At half the width, halve tokens and
--min-tokens too, and products are an eighth. Kernels should be compiled: let it run on `--hidden 512 --inner 1024` before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from real_size_gptq import LENGTH, elsewhere, make_layer, tokens_of

from l4pack.checkpoint.open import open_source
from l4pack.errors import StoppedError
from l4pack.plan.plan import Plan, make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def planned(options: argparse.Namespace) -> Plan:
    """The job, on a checkpoint that is made where it is missing."""
    source = options.folder / f"layer-{options.experts}-{options.hidden}x{options.inner}"
    if not (source / "model.safetensors.index.json").exists():
        elsewhere(make_layer, source, options)
    samples = options.tokens // LENGTH
    recipe = load_recipe(options.recipe).calibrating(
        samples=samples, sequence_length=LENGTH, max_cold_experts=1, min_tokens=options.min_tokens
    )
    return make_plan(open_source(str(source)), recipe).with_text(tokens_of(options.tokens))


def solve(options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of this process' version: up to the shared expert's end, and of one expert."""
    torch.set_num_threads(options.threads)
    plan, ended = planned(options), list[float]()
    unit_bytes = 3 * options.hidden * options.inner * 2

    def advance(read_bytes: int) -> None:
        if read_bytes == unit_bytes:
            ended.append(time.process_time() - started)
            print(f"unit {len(ended)} after {ended[-1]:.1f} CPU s", file=sys.stderr, flush=True)
        if len(ended) > options.solve:
            os.kill(os.getpid(), signal.SIGTERM)

    started = time.process_time()
    with suppress(StoppedError):
        run_plan(plan, options.folder / f"out-{time.time_ns()}", advance=advance)
    shared, expert = ended[0], (ended[options.solve] - ended[0]) / options.solve
    return {"shared": shared, "expert": expert, "layer": shared + options.experts * expert}


def run(tree: Path, arguments: list[str]) -> dict[str, Any]:
    """`solve` with the code of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, __file__, "--this", *arguments]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, required=True, help="a tree of the code to compare with")
    parser.add_argument("--solve", type=int, default=1, help="routed experts that are solved and timed")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--min-tokens", type=int, default=1024, help="what an expert with fewer borrows up to")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--this", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.this:
        print(json.dumps(solve(options)))
        return
    found = {"this version": run(ROOT, sys.argv[1:]), "before": run(options.before, sys.argv[1:])}
    for name, seconds in found.items():
        words = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
        print(f"{name}, CPU s: {words}")
    for part, value in found["this version"].items():
        print(f"{part}: {value / found['before'][part]:.3f} of the time before")


if __name__ == "__main__":
    main()
