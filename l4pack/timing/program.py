"""The program that measures this machine: `python -m l4pack.timing.program FOLDER DEVICE` prints rates as a JSON object.

Whoever asks for a measurement starts it, and so need not load torch, nor count as its own what measuring takes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from l4pack.timing.work import Kind

MOST_LOADING = 1.5
KERNELS = ("typer", "rich.progress", "l4pack.quantize.run", "l4pack.quant.cpu")
LIBRARIES = (
    "l4pack.calibration.run",
    "l4pack.text.sequences",
    "transformers.models.llama4.modeling_llama4",
    "transformers.tokenization_utils_tokenizers",
)


def loading(clock: Callable[[], float] = time.perf_counter) -> dict[Kind, float]:
    """How often a second libraries could be loaded: those of the CPU's kernels, then those that run models."""
    rates = {}
    for kind, modules in ((Kind.KERNELS, KERNELS), (Kind.LIBRARIES, LIBRARIES)):
        started = clock()
        for module in modules:
            import_module(module)
        rates[kind] = 1 / max(clock() - started, 1e-9)
    rates[Kind.LIBRARIES] = 1 / (1 / rates[Kind.LIBRARIES] + _first_solve(clock))
    return rates


def _first_solve(clock: Callable[[], float]) -> float:
    """Seconds that the solver's kernels take to load, which is when they are first called; where they had to be compiled,
    what loading them takes at most."""
    from l4pack.timing.kernels import solve_a_block

    started = clock()
    solve_a_block("cpu")
    return min(clock() - started, MOST_LOADING)


def main() -> None:
    """Measure and print."""
    folder, device = sys.argv[1:]
    rates = loading()
    from l4pack.timing.kernels import Kernels, disk_rates

    json.dump(rates | Kernels(device).measured() | disk_rates(Path(folder)), sys.stdout)


if __name__ == "__main__":
    main()
