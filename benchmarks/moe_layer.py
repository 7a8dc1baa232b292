"""Run one real-size Scout MoE block (4.2 GB of BF16) layer-streamed, and transformers' own block on the same tokens.

    python benchmarks/moe_layer.py                     # streamed at 512, 2048, 8192 tokens; transformers at 512, 2048
    python benchmarks/moe_layer.py --growth            # whole walks: how cost grows with tokens and layers

Every row is a process of its own, so that its peak memory is its own. "CPU" is processor time, which other jobs on the
machine disturb less than the clock. Streaming reads and converts the weights inside the measured time; transformers'
block has them in memory already, in float32, and the time that took is given beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from real_size import make_checkpoint

from l4pack.checkpoint.header import read_header
from l4pack.checkpoint.source import Checkpoint, open_folder
from l4pack.evaluate.answers import StreamAnswers
from l4pack.plan.memory import computing_on
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import Blocks, LayerPass
from l4pack.stream.modules import Skeleton, text_config
from l4pack.stream.prefetch import Prefetch
from l4pack.stream.sides import StreamFiles
from l4pack.stream.units import Part, Unit, expert_unit, feed_forward_unit, load_unit, place
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.units import human_bytes
from l4pack.work.identity import Identity
from l4pack.work.machine import peak_rss

FOLDER = Path(".bench/scout-16")
SEQUENCE = 512
TARGET = 8.0


class _Clock:
    """Wall and processor seconds of the routed experts alone, since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """Seconds by name."""
        return {"experts": time.perf_counter() - self._wall, "experts_cpu": time.process_time() - self._cpu}


def hidden_states(tokens: int, width: int) -> torch.Tensor:
    """Made-up states of the block's input, the same for both."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))


def streamed(checkpoint: Checkpoint, compute: Compute, tokens: int) -> dict[str, Any]:
    """The feed-forward half of the layer, from the file."""
    config = checkpoint.config
    packed = Packed([TokenSequence((0,) * SEQUENCE)] * (tokens // SEQUENCE))
    skeleton = Skeleton(config, compute.device, compute.dtype)
    with (
        tempfile.TemporaryDirectory(dir=FOLDER) as work,
        Weights(checkpoint, compute.device, compute.dtype, tiled=compute.tiles > 0) as weights,
    ):
        files = StreamFiles(Path(work), "bench", ["bench"], (tokens, config.text.hidden_size, compute.dtype))
        stream = files.open()["bench"]
        stream.middle.data[:] = hidden_states(tokens, config.text.hidden_size)
        clock, cpu = time.perf_counter(), time.process_time()
        one = LayerPass(skeleton, 0, packed, stream, Blocks.on(compute.device, config.text.hidden_size))
        attention, shared = Unit(0, Part.ATTENTION), feed_forward_unit(config, 0)
        with Prefetch(lambda unit: load_unit(weights, unit)) as ready:
            ready.plan([attention, shared])
            place(one._layer, ready.take(attention))
            routing = one.route()
            assert routing is not None
            experts = [expert_unit(0, number) for number, count in enumerate(routing.counts()) if count]
            ready.plan(experts)
            one.feed_forward(shared, one.mlp(shared, ready.take(shared)))
            routed = _Clock()
            for unit in experts:
                one.feed_forward(unit, one.mlp(unit, ready.take(unit)))
            experts_seconds = routed.stop()
        one.finish()
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        found = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
        output = stream.following.data[:64].float() - stream.middle.data[:64].float()
        planned = replace(computing_on(compute, config, packed.sequences), tiles=compute.tiles).memory()
    return {**found, **experts_seconds, "planned_bytes": planned.ram, "output": output.double().sum(1).tolist()}


@torch.inference_mode()
def upstream(checkpoint: Checkpoint, compute: Compute, tokens: int) -> dict[str, Any]:
    """transformers' Llama4TextMoe with all weights in memory."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe, Llama4TextRMSNorm

    text = text_config(checkpoint.config)
    clock = time.perf_counter()
    with torch.device("meta"):
        block = Llama4TextMoe(text).eval()
        norm = Llama4TextRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
    with Weights(checkpoint, compute.device, compute.dtype) as weights:
        for name, _ in list(block.named_parameters()):
            owner, _, last = name.rpartition(".")
            tensor = weights.tensor(f"model.layers.0.feed_forward.{name}")
            setattr(block.get_submodule(owner), last, torch.nn.Parameter(tensor, requires_grad=False))
        norm.weight = torch.nn.Parameter(
            weights.tensor("model.layers.0.post_attention_layernorm.weight"), requires_grad=False
        )
    loading = time.perf_counter() - clock
    states = hidden_states(tokens, text.hidden_size).to(compute.device, compute.dtype)
    clock, cpu = time.perf_counter(), time.process_time()
    routed: list[_Clock] = []
    seen: dict[str, float] = {}
    block.experts.register_forward_pre_hook(lambda *_: routed.append(_Clock()))
    block.experts.register_forward_hook(lambda *_: seen.update(routed[-1].stop()))
    output, _ = block(norm(states))
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
    return {**found, **seen, "loading_seconds": loading, "output": output[:64].double().sum(1).tolist()}


def disk_rate(folder: Path) -> float:
    """Bytes a second of reading the file once, its pages dropped before."""
    path = next(folder.glob("*.safetensors"))
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    clock, done = time.perf_counter(), 0
    while chunk := os.pread(descriptor, 1 << 26, done):
        done += len(chunk)
    os.close(descriptor)
    return done / (time.perf_counter() - clock)


def walk(layers: int, tokens: int) -> dict[str, Any]:
    """A whole walk over a made-up model of hidden 1024, 8 experts of 2048."""
    checkpoint, compute = open_folder(FOLDER.parent / f"walk-{layers}"), Compute.of("cpu")
    packed = Packed([TokenSequence(tuple(range(SEQUENCE)))] * (tokens // SEQUENCE))
    with (
        tempfile.TemporaryDirectory(dir=FOLDER.parent) as work,
        Weights(checkpoint, compute.device, compute.dtype) as weights,
    ):
        model = Model("bench", weights, Skeleton(checkpoint.config, compute.device, compute.dtype))
        clock, cpu = time.perf_counter(), time.process_time()
        with Walk([Lane("bench", model, packed)], Path(work), Identity({"job": "bench"})) as running:
            running.run()
            StreamAnswers(model, running.streams["bench"].current)
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}


def _small(folder: Path, layers: int) -> None:
    if (folder / "config.json").exists():
        return
    from safetensors.torch import save_file

    from l4pack.model.config import parse_config
    from l4pack.model.tensors import catalogue

    config = {
        "model_type": "llama4_text", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2048,
        "intermediate_size_mlp": 4096, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 128, "num_local_experts": 8, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    state = {
        spec.name: (torch.randn(spec.shape, generator=generator) * 0.02).bfloat16()
        for spec in catalogue(parse_config(config)).tensors
    }
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def in_process(*arguments: object) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, check=False, text=True)
    if ended.returncode:
        sys.exit(ended.stderr)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def one(what: str, *numbers: str) -> None:
    """Carry out one measurement and print it as JSON."""
    if what == "walk":
        found = walk(*map(int, numbers))
    else:
        compute = Compute.of(numbers[1])
        found = (streamed if what == "streamed" else upstream)(open_folder(FOLDER), compute, int(numbers[0]))
    print(json.dumps({**found, "rss": peak_rss()}))


def growth() -> None:
    """How whole walks grow."""
    print(
        "| layers | tokens | seconds | CPU s | CPU ms a layer and 1000 tokens | peak RSS |\n|---|---|---|---|---|---|"
    )
    for layers, tokens in ((2, 4096), (4, 4096), (8, 4096), (4, 2048), (4, 8192), (4, 16384)):
        _small(FOLDER.parent / f"walk-{layers}", layers)
        found = in_process("walk", layers, tokens)
        rate = 1e6 * found["cpu_seconds"] / layers / tokens
        print(
            f"| {layers} | {tokens} | {found['seconds']:.1f} | {found['cpu_seconds']:.1f} | {rate:.0f} | {human_bytes(found['rss'])} |"
        )


def compare(sizes: list[int], against: list[int], place: str) -> None:
    """Both blocks, and their ratio where both were run."""
    make_checkpoint(FOLDER, "scout", 16)
    nbytes = sum(entry.nbytes for entry in read_header(FOLDER / "model.safetensors", "model.safetensors").values())
    print(f"{human_bytes(nbytes)} of weights; the disk alone reads {human_bytes(disk_rate(FOLDER))}/s")
    print(
        "| tokens | block | seconds | CPU s | of that routed experts | peak RSS | weights |\n|---|---|---|---|---|---|---|"
    )
    for tokens in sizes:
        ours = in_process("streamed", tokens, place)
        rate = human_bytes(nbytes / ours["seconds"])
        print(f"| {tokens} | streamed, from disk | {ours['seconds']:.1f} | {ours['cpu_seconds']:.1f} | {ours['experts_cpu']:.1f} | {human_bytes(ours['rss'])} "
              f"(planned {human_bytes(ours['planned_bytes'])}) | {rate}/s |", flush=True)  # fmt: skip
        if tokens not in against:
            continue
        theirs = in_process("upstream", tokens, place)
        print(f"| {tokens} | transformers, in memory | {theirs['seconds']:.1f} | {theirs['cpu_seconds']:.1f} | {theirs['experts_cpu']:.1f} | {human_bytes(theirs['rss'])} "
              f"| loaded in {theirs['loading_seconds']:.1f} s |")  # fmt: skip
        gap = max(abs(a - b) / (1 + abs(b)) for a, b in zip(ours["output"], theirs["output"], strict=True))
        whole = (theirs["seconds"] + theirs["loading_seconds"]) / ours["seconds"]
        print(f"| {tokens} | ratio | {theirs['seconds'] / ours['seconds']:.1f} ({whole:.1f} with loading) | "
              f"{theirs['cpu_seconds'] / ours['cpu_seconds']:.1f} | {theirs['experts_cpu'] / ours['experts_cpu']:.1f} | {theirs['rss'] / ours['rss']:.1f} | largest difference {gap:.1e} |", flush=True)  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--against", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--compute", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one(*chosen.one)
    elif chosen.growth:
        growth()
    else:
        compare(chosen.tokens, chosen.against, chosen.compute)


if __name__ == "__main__":
    main()
