"""Predicted time beside what it took: quantizing the demo or a mid-size model, solving one expert of Scout's real size.

    python benchmarks/predicted.py demo [--samples 4]
    python benchmarks/predicted.py midsize FOLDER [--samples 4] [--layers 1] [--experts 4]
    python benchmarks/predicted.py expert [--tokens 512] [--two-sided] [--narrower 4]

Kernels are measured before the job and after it, on one thread like the job. Seconds are the processor's, so that others on
the machine disturb them little, and waiting for the disk is not among them; `--wall` takes the clock's, disk and all, for a
quiet machine. Needs: 0.5 GB of disk a layer of 4 mid-size experts, 2 GB of memory for an expert of Scout. Says how many times
the predicted seconds it took, and fails when that is off by more than 25 %.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn.functional import silu

from l4pack.calibration.mlp import Matrices, solve_mlp
from l4pack.calibration.rows import Block
from l4pack.model.config import TextConfig
from l4pack.model.parts import mlp_shapes
from l4pack.recipe import load_recipe
from l4pack.stream.rows import rows_at_once
from l4pack.timing.counts import Tokens, solving_mlp
from l4pack.timing.kept import Measurement, keep, machine_identity
from l4pack.timing.speeds import Prediction, Speeds, predict
from l4pack.timing.work import DISK, Kind

FAR = 1.25
NEVER_WAITS = 1e30
Job = tuple[Callable[[], dict[str, float]], Callable[[], tuple[float, float]]]  # predicts by phase; runs: seconds

_KERNELS = """
import json, sys, time
from pathlib import Path
from l4pack.timing.program import loading
clock = time.perf_counter if sys.argv[1] == "wall" else time.process_time
rates = loading(clock)
from l4pack.timing.kernels import Kernels, disk_rates
print(json.dumps(rates | Kernels("cpu", clock).measured() | disk_rates(Path(sys.argv[2]))))
"""


def kernels(clock: str, folder: Path) -> dict[Kind, float]:
    """Rates of this machine by a clock; the disk never lets a job wait unless it is the wall's."""
    command = [sys.executable, "-c", _KERNELS, clock, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    rates = {Kind(name): rate for name, rate in json.loads(ended.stdout).items()}
    return rates if clock == "wall" else {**rates, **dict.fromkeys((*DISK, Kind.SYNC), NEVER_WAITS)}


def command_of(clock: str, source: str, options: list[str], work: Path) -> Job:
    """Quantizing by the command, predicted by its dry run."""
    command = ["quantize", source, "--out", str(work / "out"), *options, "--json"]

    def run(*more: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "l4pack", *command, *more], capture_output=True, text=True, check=False
        )
        return ended.stdout if ended.returncode == 0 else sys.exit(ended.stderr)

    def predicted() -> dict[str, float]:
        shutil.rmtree(work / "cache", ignore_errors=True)
        keep(Measurement(machine=machine_identity(work, "cpu"), taken="now", rates=kernels(clock, work)))
        phases: dict[str, float] = json.loads(run("--dry-run"))["predicted"]["phases"]
        return phases

    def took() -> tuple[float, float]:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        shutil.rmtree(work / "out")
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return spent, time.perf_counter() - started

    os.environ["L4PACK_CACHE"] = str(work / "cache")
    return predicted, took


def expert_of(chosen: argparse.Namespace, clock: str, work: Path) -> Job:
    """Solving gate, up and down of one expert, made up, as large as Scout's or so many times `narrower`."""
    whole, scheme, tokens = TextConfig(), load_recipe("int4").schemes["int4"], chosen.tokens
    hidden, inner = whole.hidden_size // chosen.narrower, whole.intermediate_size // chosen.narrower
    text = whole.model_copy(update={"hidden_size": hidden, "intermediate_size": inner})
    assert scheme.gptq is not None
    scheme = scheme.model_copy(update={"gptq": scheme.gptq.model_copy(update={"two_sided": chosen.two_sided})})

    def predicted() -> dict[str, float]:
        found: Prediction = predict(
            [solving_mlp(text, inner, Tokens(tokens, tokens, 2), scheme, "cpu")],
            Speeds("here", kernels(clock, work), "measured"),
        )
        return dict(found.phases)

    def took() -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(shape, generator=generator) * 0.02 for name, shape in mlp_shapes(hidden, inner).items()
        }
        inputs = torch.randn(tokens, hidden, generator=generator) * torch.linspace(0.2, 2, hidden)
        original = inputs + 0.05 * torch.randn(tokens, hidden, generator=generator)
        step = rows_at_once("cpu", hidden)
        parts = [slice(first, first + step) for first in range(0, tokens, step)]
        blocks = [Block(inputs[part], original[part], None, None) for part in parts]
        outputs = None
        if chosen.two_sided:
            gradients = torch.randn(hidden, 2 * hidden, generator=generator) * torch.linspace(0.2, 2, hidden)[:, None]
            outputs = gradients @ gradients.T
        spent, started = time.process_time(), time.perf_counter()
        with torch.inference_mode():
            mlp = Matrices(weights, silu, torch.bfloat16)
            solve_mlp(mlp, lambda: blocks, scheme, dict.fromkeys(weights, "BF16"), outputs)
        return time.process_time() - spent, time.perf_counter() - started

    return predicted, took


def job_of(chosen: argparse.Namespace, work: Path) -> Job:
    """What was chosen; makes the mid-size model if it is not there."""
    clock = "wall" if chosen.wall else "cpu"
    if chosen.what == "expert":
        return expert_of(chosen, clock, work)
    options = ["--recipe", chosen.recipe, "--calibration-samples", str(chosen.samples)]
    if chosen.what == "demo":
        return command_of(clock, "demo", options, work)
    import midsize

    midsize.SIZES["num_local_experts"] = chosen.experts
    midsize.make(chosen.folder, chosen.layers)
    return command_of(clock, str(chosen.folder), [*options, "--sequence-length", "512"], work)


def main() -> None:
    """Measure, run, measure, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["demo", "midsize", "expert"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--two-sided", action="store_true")
    parser.add_argument("--narrower", type=int, default=1)
    parser.add_argument("--wall", action="store_true")
    chosen = parser.parse_args()
    if chosen.what == "midsize" and chosen.folder is None:
        parser.error("midsize needs a FOLDER")
    with tempfile.TemporaryDirectory(dir=chosen.folder and chosen.folder.parent) as name:
        predicted, took = job_of(chosen, Path(name))
        before, seconds, after = predicted(), took()[int(chosen.wall)], predicted()
    sums = sum(before.values()), sum(after.values())
    ratio = seconds / mean(sums)
    print(
        f"{chosen.what}: predicted {sums[0]:.1f} s before and {sums[1]:.1f} s after, took {seconds:.1f}: {ratio:.2f} times"
    )
    print(", ".join(f"{phase} {time:.2f}" for phase, time in sorted(after.items(), key=lambda item: -item[1])))
    if not 1 / FAR <= ratio <= FAR:
        sys.exit("further off than 25 %")


if __name__ == "__main__":
    main()
