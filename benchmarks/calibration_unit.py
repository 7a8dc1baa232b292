"""One expert's three matrices solved by two versions of the code: CPU seconds, peak memory, and the errors they end with.

    python benchmarks/calibration_unit.py --before OTHER/TREE [--hidden 2048] [--inner 3072] [--rows 1024] [--recipe int4]

Both versions get the same made-up weights and inputs (correlated, some channels loud; the original's differ a little), each
in a process of its own on one thread. CPU time, unlike wall time, hardly sees what else runs on the machine. What solving
adds to memory stands beside what a plan counts for it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from l4pack.calibration.mlp import Matrices, solve_mlp
from l4pack.calibration.rows import Block
from l4pack.model.parts import DOWN, GATE, UP
from l4pack.recipe import RecipeScheme, load_recipe

ROWS_AT_ONCE = 256
ROOT = Path(__file__).resolve().parent.parent


def made_up(options: argparse.Namespace) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Weights by projection, and inputs [rows, hidden] of the quantized model and of the original."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, inner = options.hidden, options.inner
    shapes = {GATE: (inner, hidden), UP: (inner, hidden), DOWN: (hidden, inner)}
    weights = {name: (normal(*shape) * 0.02).bfloat16().float() for name, shape in shapes.items()}
    inputs = normal(options.rows, hidden // 8) @ normal(hidden // 8, hidden) / (hidden // 8) ** 0.5
    inputs = (inputs + 0.3 * normal(options.rows, hidden)) * (1 + 9 * (torch.arange(hidden) % 97 == 0))
    return weights, inputs, inputs + 0.05 * normal(options.rows, hidden)


def warm_up(options: argparse.Namespace) -> None:
    """Solve a small unit, so that compiling kernels is no part of what is measured."""
    small = argparse.Namespace(hidden=256, inner=256, rows=64)
    weights, inputs, original = made_up(small)
    scheme = gptq_scheme(options.recipe)
    matrices = Matrices(weights, ACT2FN["silu"], torch.bfloat16)
    solve_mlp(matrices, lambda: [Block(inputs, original, None, None)], scheme, dict.fromkeys(weights, "BF16"))


def gptq_scheme(recipe: str) -> RecipeScheme:
    """The first scheme of a recipe that is solved."""
    return next(one for one in load_recipe(recipe).schemes.values() if one.gptq is not None)


def solve(options: argparse.Namespace) -> dict[str, Any]:
    """What this process' version of the code takes."""
    torch.set_num_threads(options.threads)
    weights, inputs, original = made_up(options)
    scheme = gptq_scheme(options.recipe)

    def blocks() -> Iterator[Block]:
        for part in zip(inputs.split(ROWS_AT_ONCE), original.split(ROWS_AT_ONCE), strict=True):
            yield Block(*part, None, None)

    matrices = Matrices(weights, ACT2FN["silu"], torch.bfloat16)
    with torch.inference_mode():
        warm_up(options)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        solved = solve_mlp(matrices, blocks, scheme, dict.fromkeys(weights, "BF16"))
        seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "added_bytes": (peak - before) * 1024,
        "errors": {name: one.error / one.rtn_error for name, one in solved.items()},
        "rows_rounded": sum(one.rtn_rows for one in solved.values()),
    }


def run(tree: Path, arguments: list[str]) -> dict[str, Any]:
    """`solve` with the code of a tree."""
    command = [sys.executable, __file__, "--solve", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def describe(name: str, found: dict[str, Any]) -> str:
    errors = ", ".join(f"{projection} {value:.4f}" for projection, value in found["errors"].items())
    return (
        f"{name}: {found['seconds']:.1f} CPU s, {found['added_bytes'] / 1e9:.2f} GB added, "
        f"error over rounding's: {errors}; {found['rows_rounded']} rows rounded"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, help="a tree of the code to compare with")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=3072)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--solve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.solve:
        print(json.dumps(solve(options)))
        return
    after = run(ROOT, sys.argv[1:])
    print(describe("this version", after))
    if options.before is not None:
        before = run(options.before, sys.argv[1:])
        print(describe("before", before))
        print(f"ratio of CPU time: {after['seconds'] / before['seconds']:.3f}")


if __name__ == "__main__":
    main()
