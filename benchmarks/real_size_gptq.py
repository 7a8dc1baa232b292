"""One Scout MoE layer at its real size, calibrated and solved: wall time, peak memory, and where the time goes.

    python benchmarks/real_size_gptq.py FOLDER [--experts 16] [--tokens 32768] [--threads 2]

Makes a checkpoint of one layer with made-up weights (16 experts: 4.4 GB), quantizes it with the shipped int4 recipe, and
times the phases from outside. Then it measures what the machine can do at best in the same run (a large float32 product)
and projects the layer's time to all 48 layers. With fewer experts or tokens than Scout's 16 and 524,288 it says so.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from l4pack.calibration import mlp, moments, walk
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.writer import ShardWriter
from l4pack.model.tensors import catalogue
from l4pack.plan import make_plan
from l4pack.quant import gptq
from l4pack.recipe import load_recipe
from l4pack.run import run_plan
from l4pack.stream.hidden import TokenSequence
from l4pack.stream.layer import LayerPass
from l4pack.stream.text import TokenText, token_digest
from l4pack.stream.weights import Weights

LENGTH = 2048
TIMES: Counter[str] = Counter()


def make_layer(folder: Path, experts: int) -> None:
    """A text-only checkpoint of one Scout layer, fused, BF16."""
    from l4pack.model.config import known_config, parse_config

    raw = {
        **known_config("llama-4-scout").raw["text_config"], "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text", "num_hidden_layers": 1, "num_local_experts": experts, "vocab_size": 1024,
        "no_rope_layers": [1], "moe_layers": [0], "layer_types": ["chunked_attention"],
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
    ids = [tuple(int(t) for t in rng.integers(0, 1024, LENGTH)) for _ in range(count // LENGTH)]
    record = {"source": "random", "sha256": "0" * 64, "tokens": len(ids) * LENGTH, "tokens_sha256": token_digest(ids)}
    return TokenText(tuple(TokenSequence(one) for one in ids), record)


def timed(owner: Any, name: str, phase: str) -> None:
    """Count the time of a function; nested phases are taken off the outer one."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        with phase_of(phase):
            return function(*arguments, **options)

    setattr(owner, name, call)


_stack: list[list[float]] = []


@contextmanager
def phase_of(phase: str) -> Any:
    started = time.monotonic()
    _stack.append([0.0])
    yield
    seconds = time.monotonic() - started
    TIMES[phase] += seconds - _stack.pop()[0]
    if _stack:
        _stack[-1][0] += seconds


def watch() -> None:
    timed(moments.Moments, "add", "Hessians")
    timed(gptq, "factorize", "factorizations")
    timed(gptq, "round_to_nearest", "scales")
    timed(gptq, "_asymmetric_target", "asymmetric target")
    timed(gptq, "solve_columns", "GPTQ columns")
    timed(gptq, "descend", "descent sweeps")
    timed(gptq, "_better_rows", "comparison with RTN")
    timed(mlp.Matrices, "inner", "rows through gate and up for down's Hessian")
    timed(LayerPass, "feed_forward", "outputs of both streams")
    timed(LayerPass, "attention", "attention of both streams")
    timed(LayerPass, "normed", "norms and gathering")
    timed(walk.CalibrationRun, "_read_back", "reading back")
    timed(ShardWriter, "sync", "waiting for the disk")
    timed(Weights, "linears", "reading weights (in a thread, beside the others)")


def gflops() -> float:
    a = torch.randn(4096, 4096)
    a @ a
    started = time.monotonic()
    for _ in range(3):
        a @ a
    return 3 * 2 * 4096**3 / (time.monotonic() - started) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = options.folder / f"layer-{options.experts}"
    if not (source / "model.safetensors.index.json").exists():
        make_layer(source, options.experts)
    recipe = load_recipe("int4").calibrating(samples=options.tokens // LENGTH, sequence_length=LENGTH)
    plan = make_plan(open_source(str(source)), recipe).with_text(tokens_of(options.tokens))
    before = gflops()
    watch()
    started = time.monotonic()
    result = run_plan(plan, options.folder / f"out-{options.experts}-{time.time_ns()}")
    seconds = time.monotonic() - started
    print(f"{options.experts} experts, {options.tokens:,} tokens, {options.threads} threads: {seconds:.1f} s")
    print(f"peak memory {result.peak_rss_bytes / 1e9:.2f} GB, planned {plan.peak_ram_bytes / 1e9:.2f} GB")
    for phase, taken in TIMES.most_common():
        print(f"  {phase:52} {taken:8.1f} s")
    print(f"the machine's float32 product: {before:.0f} GFLOP/s before, {gflops():.0f} after")
    print(f"48 such layers: {48 * seconds / 3600:.1f} h")
    print(json.dumps({"seconds": seconds, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                      "phases": dict(TIMES)}))  # fmt: skip


if __name__ == "__main__":
    main()
