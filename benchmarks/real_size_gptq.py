"""One Scout MoE layer at its real size, calibrated and solved: wall time, peak memory, and where the time goes.

    python benchmarks/real_size_gptq.py FOLDER [--experts 16] [--tokens 16384] [--recipe int4] [--threads 2]

Makes a checkpoint of one layer with made-up weights (16 experts: 4.4 GB), quantizes it with a shipped recipe and times the
phases from outside, by wrapping the functions they are. Each phase's operations are counted, so that its GFLOP/s stand
beside what the machine does at best, measured in the same run. Phases that go with tokens and phases that go with matrices
are projected apart: to all of Scout and Maverick, at these tokens and at what the recipe asks for. Fails when more memory
was resident than planned. With `--device cuda` experts are solved together there; phases are waited for, so that nothing
overlaps and the whole takes longer than it need. `--hidden 1024 --inner 2048 --experts 4` is a small trial of the benchmark itself.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from l4pack.calibration import batch, mlp, moments, solver, written_units
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.writer import ShardWriter
from l4pack.model.config import known_config, parse_config
from l4pack.model.tensors import catalogue
from l4pack.plan.plan import Plan, RunLimits, make_plan
from l4pack.quant import gptq, gptq_batch, gptq_blocks
from l4pack.quantize.accelerator import quantizer
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe
from l4pack.stream.compute import float32_on
from l4pack.stream.hidden import TokenSequence
from l4pack.stream.layer import LayerPass
from l4pack.stream.prefetch import Prefetch
from l4pack.stream.units import Part
from l4pack.text.sequences import TokenText, token_digest
from l4pack.work.device import CPU, chosen

LENGTH, VOCABULARY = 2048, 1024
LAYERS = 48  # of Scout; half of Maverick's 48 are MoE layers, of 128 experts each, half dense ones of twice the width
SCOUT_EXPERTS, MAVERICK_EXPERTS = 16, 128
TOKENS, MATRICES = "tokens", "matrices"  # what a phase's time goes with
Count = Callable[..., float]


@dataclass
class Phase:
    """CPU seconds and floating-point operations of one kind of work."""

    scales: str
    seconds: float = 0.0
    operations: float = 0.0


PHASES: dict[str, Phase] = {}
_running = threading.local()


def now() -> float:
    """Seconds of the CPU, or where there is a device of the clock, once it has done what it was asked to."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.monotonic()


@contextmanager
def phase_of(name: str, scales: str, operations: float) -> Iterator[None]:
    """Time a phase; phases within it are taken off."""
    stack = _running.__dict__.setdefault("stack", [])
    stack.append(0.0)
    started = now()
    yield
    seconds = now() - started
    phase = PHASES.setdefault(name, Phase(scales))
    phase.seconds += seconds - stack.pop()
    phase.operations += operations
    if stack:
        stack[-1] += seconds


def timed(owner: Any, name: str, phase: str | Callable[..., str], scales: str, count: Count | None = None) -> None:
    """Time every call of a function; `count` is given its arguments."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        operations = 0.0 if count is None else count(*arguments, **options)
        with phase_of(phase if isinstance(phase, str) else phase(*arguments), scales, operations):
            return function(*arguments, **options)

    setattr(owner, name, call)


def product(rows: int, columns: int, inner: int) -> float:
    return 2.0 * rows * columns * inner


def of_moments(_: Any, inputs: Any, difference: Any = None) -> float:
    tokens, width = inputs.shape
    triangle = product(width, min(width, (width + moments.COLUMNS) // 2), tokens)
    return triangle + (0 if difference is None else product(width, width, tokens))


def of_unit(self: Any, unit: Any, module: Any) -> float:
    rows, _ = self.rows_of(unit)
    tokens = self._packed.rows if rows is None else len(rows)
    return sum(product(tokens, *part.weight.shape) for part in (module.gate_proj, module.up_proj, module.down_proj))


def of_attention(self: Any, weights: Any, *_: Any, **__: Any) -> float:
    linears = {name.rpartition(".")[2]: linear.weight for name, linear in weights.linears.items()}
    scores = product(self._packed.rows, LENGTH, len(linears["q_proj"]))  # half of the keys, but keys and values
    return scores + sum(product(self._packed.rows, *weight.shape) for weight in linears.values())


def of_rows(rows: Any, *_: Any) -> float:
    return float(len(rows)) * rows.shape[1] ** 2


def of_target(rows: Any, problem: Any) -> float:
    return 0 if isinstance(problem.factor, gptq.ThinFactor) else 2 * of_rows(rows)


def of_inputs(rows: Any, inputs: Any, times: int) -> float:
    return float(times) * len(rows) * inputs.shape[0] * inputs.shape[1]


def name_of_unit(_: Any, unit: Any, *__: Any) -> str:
    return f"outputs of both streams, {'experts' if unit.part is Part.EXPERT else 'shared expert'}"


def watch() -> None:
    """Wrap what is timed. Other versions of the code, for which layer_versions.py imports this file, have not all of it."""

    timed(LayerPass, "attention", "attention of both streams", TOKENS, of_attention)
    timed(LayerPass, "route", "router", TOKENS)
    timed(LayerPass, "normed", "norms and gathering rows", TOKENS)
    timed(LayerPass, "feed_forward", name_of_unit, TOKENS, of_unit)
    timed(LayerPass, "finish", "adding up", TOKENS)
    timed(moments.Moments, "_sum", "moments", TOKENS, of_moments)
    timed(moments.Moments, "add", "moments: keeping tokens", TOKENS)
    timed(moments.Moments, "finish", "moments: other half", MATRICES)
    timed(mlp.Matrices, "inner", "gate and up of both streams, for down's moments", TOKENS,
          lambda self, x: 2 * product(*x.shape, len(self.weights[mlp.UP])))  # fmt: skip
    timed(gptq, "factorize", "Cholesky and inverse", MATRICES, lambda h, **_: 2 / 3 * len(h) ** 3)
    timed(gptq, "asymmetric_target", "asymmetric target: W C", MATRICES, of_target)
    timed(gptq, "times_inverse", "asymmetric target: times H^-1", MATRICES, lambda rows, _: 2 * of_rows(rows))
    timed(gptq, "round_to_nearest", "scales and nearest levels", MATRICES)
    timed(gptq, "solve_columns", "GPTQ: trailing columns", MATRICES, of_rows)
    timed(gptq, "factorize_thin", "few inputs: factors", MATRICES)
    timed(gptq, "thin_target", "few inputs: asymmetric target", MATRICES, lambda w, x, _: of_inputs(w, x, 4))
    timed(gptq, "solve_thin_columns", "few inputs: GPTQ", MATRICES, lambda w, f, *_: of_inputs(w, f.inputs, 4))
    timed(gptq, "thin_pull", "few inputs: start of sweeps", MATRICES, lambda _, w, f: of_inputs(w, f.inputs, 2))
    timed(gptq, "thin_loss", "few inputs: loss of rounding", MATRICES, lambda w, f: of_inputs(w, f.inputs, 2))
    timed(gptq_blocks, "solve_block", "GPTQ: columns of a block", MATRICES, of_rows)
    timed(gptq, "pull_of", "sweeps: start from the errors", MATRICES, of_rows)
    timed(gptq_blocks, "descend", "sweeps: descent", MATRICES)
    timed(gptq, "quadratic_form", "loss of rounding to nearest", MATRICES, of_rows)
    timed(batch, "_moments", "batches: moments", TOKENS)
    timed(gptq_batch, "prepare_problems", "batches: factors", MATRICES)
    timed(gptq_batch, "solve_problems", "batches: columns, sweeps and losses", MATRICES)
    timed(batch, "solve", "batches: the rest of solving", MATRICES)
    timed(solver, "solve_mlp", "the rest of solving", MATRICES)
    timed(written_units, "stored", "packing", MATRICES)
    timed(written_units.WrittenUnits, "_read_back", "reading back", MATRICES)
    timed(ShardWriter, "write", "writing", MATRICES)
    timed(ShardWriter, "sync", "waiting for the disk", MATRICES)
    timed(Prefetch, "take", "waiting for weights", MATRICES)


def make_layer(folder: Path, options: argparse.Namespace) -> None:
    """A text-only checkpoint of one Scout layer, fused, BF16."""
    raw = {
        **known_config("llama-4-scout").raw["text_config"], "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text", "num_hidden_layers": 1, "num_local_experts": options.experts,
        "vocab_size": VOCABULARY, "no_rope_layers": [1], "moe_layers": [0], "layer_types": ["chunked_attention"],
        "hidden_size": options.hidden, "intermediate_size": options.inner,
        "num_attention_heads": options.hidden // 128, "num_key_value_heads": math.gcd(8, options.hidden // 128),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, spec in enumerate(catalogue(parse_config(raw)).tensors):
        tensor = torch.empty(spec.shape, dtype=torch.bfloat16)
        for part in tensor if tensor.ndim == 3 else [tensor]:
            part.copy_(
                torch.ones(part.shape) if part.ndim == 1 else torch.randn(part.shape, generator=generator) * 0.02
            )
        file = f"model-{number:05}.safetensors"
        save_file({spec.name: tensor}, folder / file, {"format": "pt"})
        weight_map[spec.name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tokens_of(count: int) -> TokenText:
    rng = np.random.default_rng(0)
    ids = [tuple(int(t) for t in rng.integers(0, VOCABULARY, LENGTH)) for _ in range(count // LENGTH)]
    digests = {"sha256": "0" * 64, "tokens_sha256": token_digest(ids)}
    record = {"source": "random", "tokens": len(ids) * LENGTH, "sequence_length": LENGTH, **digests}
    return TokenText(tuple(TokenSequence(one) for one in ids), record)


def seconds_of(work: Callable[[], Any], times: int = 3) -> float:
    """The best of some runs."""
    best = float("inf")
    for _ in range(times):
        started = time.monotonic()
        work()
        best = min(best, time.monotonic() - started)
    return best


@dataclass(frozen=True)
class Machine:
    """What it does at best: GFLOP/s of a float32 product and of Cholesky, GB/s read and written by a copy."""

    product: float
    cholesky: float
    copy: float

    @classmethod
    def measured(cls, threads: int) -> Machine:
        torch.set_num_threads(threads)
        size = 4096
        a = torch.randn(size, size)
        definite = torch.eye(size) + 1e-4 * (a + a.T)
        target = torch.empty(128 * 2**20)
        source = torch.ones_like(target)
        return cls(
            2 * size**3 / seconds_of(lambda: a @ a) / 1e9,
            size**3 / 3 / seconds_of(lambda: torch.linalg.cholesky_ex(definite)) / 1e9,
            8 * len(target) / seconds_of(lambda: target.copy_(source)) / 1e9,
        )

    def describe(self) -> str:
        return f"product {self.product:.0f} GFLOP/s, Cholesky {self.cholesky:.0f} GFLOP/s, copy {self.copy:.0f} GB/s"


def elsewhere(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of work in a process of its own, whose memory does not count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def projected(tokens: float, experts: int, maverick: bool) -> float:
    """Hours for a whole model, at `tokens` times the tokens; solving goes with the number of experts."""
    by_token = sum(phase.seconds for phase in PHASES.values() if phase.scales == TOKENS) * tokens
    solving = sum(phase.seconds for phase in PHASES.values() if phase.scales == MATRICES) / experts
    if not maverick:
        return LAYERS * (by_token + SCOUT_EXPERTS * solving) / 3600
    dense = 2 * PHASES["outputs of both streams, shared expert"].seconds
    dense = (dense + PHASES["attention of both streams"].seconds) * tokens
    return LAYERS / 2 * (by_token + MAVERICK_EXPERTS * solving + dense) / 3600


def print_phases(seconds: float, best: float) -> None:
    print(f"  {'phase':50} {'s':>8} {'share':>6} {'GFLOP':>9} {'GFLOP/s':>8} {'of best':>7}")
    for name, phase in sorted(PHASES.items(), key=lambda item: -item[1].seconds):
        line = f"  {name:50} {phase.seconds:8.1f} {phase.seconds / seconds:6.1%}"
        if phase.operations:
            rate = phase.operations / phase.seconds / 1e9
            line += f" {phase.operations / 1e9:9.0f} {rate:8.0f} {rate / best:7.0%}"
        print(line)
    counted = sum(phase.seconds for phase in PHASES.values())
    print(f"  {'what is not in a phase':50} {seconds - counted:8.1f}")


def print_projection(options: argparse.Namespace, recipe: Recipe) -> None:
    assert recipe.calibration is not None
    asked = recipe.calibration.samples * LENGTH
    print(f"projected from {options.experts} experts and {options.tokens:,} tokens, same machine:")
    for model, maverick in (("Scout", False), ("Maverick", True)):
        for count in (options.tokens, 65536, asked):
            hours = projected(count / options.tokens, options.experts, maverick)
            print(f"  {model:9} {count:8,} tokens: {hours:7.1f} h")


def print_device(plan: Plan) -> None:
    assert plan.needs is not None
    took, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    print(
        f"{name}: {plan.needs.together} experts together, hidden states there: {plan.needs.resident}, phases in turn;"
    )
    print(f"device memory {took / 1e9:.2f} GB, planned {plan.peak_vram_bytes / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=SCOUT_EXPERTS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    best = elsewhere(Machine.measured, options.threads)
    source = options.folder / f"layer-{options.experts}-{options.hidden}x{options.inner}"
    if not (source / "model.safetensors.index.json").exists():
        elsewhere(make_layer, source, options)
    shipped = load_recipe(options.recipe)
    recipe = shipped.calibrating(samples=options.tokens // LENGTH, sequence_length=LENGTH, max_cold_experts=1)
    device = chosen(options.device)
    limits = RunLimits(accelerated=device != CPU, free_vram=float32_on(device).device_room())
    plan = make_plan(open_source(str(source)), recipe, limits).with_text(tokens_of(options.tokens))
    watch()
    started = time.monotonic()
    out = options.folder / f"out-{source.name}-{time.time_ns()}"
    result = run_plan(plan, out, quantize=quantizer(device), device=device)
    seconds = time.monotonic() - started
    print(
        f"one layer of {options.experts} experts {options.hidden} x {options.inner}, recipe {options.recipe}, "
        f"{options.tokens:,} tokens, {options.threads} threads: {seconds:.1f} s"
    )
    print(f"peak memory {result.peak_rss_bytes / 1e9:.2f} GB, planned {plan.peak_ram_bytes / 1e9:.2f} GB")
    if plan.accelerated:
        print_device(plan)
    after = elsewhere(Machine.measured, options.threads)
    print(f"the machine at best: before {best.describe()}; after {after.describe()}")
    print_phases(seconds, max(best.product, after.product))
    print_projection(options, shipped)
    phases = {name: [phase.seconds, phase.operations] for name, phase in PHASES.items()}
    print(json.dumps({"seconds": seconds, "peak_rss": result.peak_rss_bytes, "phases": phases}))
    sys.exit(result.peak_rss_bytes > plan.peak_ram_bytes)


if __name__ == "__main__":
    main()
