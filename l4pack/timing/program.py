"""The program that measures this machine: `python -m l4pack.timing.program FOLDER DEVICE` prints rates as a JSON object.

Whoever asks for a measurement starts it, and so need not load torch, nor count as its own what measuring takes.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

from l4pack.timing.work import Kind


def loading() -> dict[Kind, float]:
    """How often a second libraries could be loaded: those of the CPU's kernels, then those that run models."""
    rates = {}
    for kind, module in ((Kind.KERNELS, "l4pack.quantize.execute"), (Kind.LIBRARIES, "l4pack.calibration.run")):
        started = time.perf_counter()
        import_module(module)
        rates[kind] = 1 / max(time.perf_counter() - started, 1e-9)
    return rates


def main() -> None:
    """Measure and print."""
    folder, device = sys.argv[1:]
    rates = loading()
    from l4pack.timing.kernels import Kernels, disk_rates

    json.dump(rates | Kernels(device).measured() | disk_rates(Path(folder)), sys.stdout)


if __name__ == "__main__":
    main()
