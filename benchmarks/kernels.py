"""Speed of the CPU kernels: GB/s of bfloat16 read on one core, against np.copyto of the same bytes and eager torch.

    python benchmarks/kernels.py [--inputs 5120] [--outputs 8192] [--skip-torch]

The block is one half of a fused expert tensor, in x out, so rows are twice as wide as what is read. Each time is the
best of three, in seconds of this process on a processor, so that others on the machine disturb little. Compile times are those of a process whose kernels are not in Numba's cache yet (run with an empty
NUMBA_CACHE_DIR to see them).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from l4pack.quant.dequantize import dequantize
from l4pack.quant.floats import round_to_bfloat16
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block
from l4pack.quant.scheme import Scheme

SCHEMES = {
    "int4 g128": Scheme(num_bits=4, group_size=128),
    "int4 g128 asymmetric": Scheme(num_bits=4, group_size=128, symmetric=False),
    "int4 g32": Scheme(num_bits=4, group_size=32),
    "int4 g128 mse": Scheme(num_bits=4, group_size=128, observer="mse"),
    "int8 channel": Scheme(num_bits=8, strategy="channel"),
    "fp8 channel": Scheme(num_bits=8, type="float", strategy="channel"),
    "fp8 block": Scheme(num_bits=8, type="float", strategy="block", block_structure=(128, 128)),
}


def seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """Best time of `repeats`."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def once(action: Callable[[], object]) -> float:
    return seconds(action, 1)


def torch_seconds(block: np.ndarray, scheme: Scheme) -> float:
    """Eager torch on one thread, on an eighth of the inputs: it is slow."""
    import torch

    from l4pack.quant import torch_ops

    torch.set_num_threads(1)
    weight = torch.from_numpy(block[: len(block) // 8].copy()).view(torch.bfloat16).T
    return seconds(lambda: torch_ops.quantize(weight, scheme), 1) * 8


def row(name: str, size: int, copy: float, taken: float, compiling: float, eager: float | None) -> str:
    against_torch = "" if eager is None else f"{eager / taken:8.1f}x"
    return f"{name:34}{size / taken / 1e9:8.2f}{taken / copy:10.1f}x{compiling:10.2f}{against_torch:>10}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=5120)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--skip-torch", action="store_true")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    fused = np.empty((options.inputs, 2 * options.outputs), np.uint16)
    for i in range(options.inputs):
        fused[i] = round_to_bfloat16(random.standard_normal(2 * options.outputs, np.float32) * np.float32(0.02))
    gate = fused[:, : options.outputs]
    target = np.zeros(gate.shape, np.uint16)
    copy = seconds(lambda: np.copyto(target, gate))
    by_layout = {Layout.IN_OUT: gate, Layout.OUT_IN: np.ascontiguousarray(gate.T)}
    print(f"np.copyto: {gate.nbytes / copy / 1e9:.2f} GB/s")
    print(f"{'kernel':34}{'GB/s':>8}{'of copy':>11}{'first, s':>10}{'of torch':>10}")
    for name in SCHEMES:
        measure(name, by_layout, copy, not options.skip_torch)


def measure(name: str, by_layout: dict[Layout, np.ndarray], copy: float, with_torch: bool) -> None:
    """Print the rows of one scheme."""
    scheme = SCHEMES[name]
    gate = by_layout[Layout.IN_OUT]
    for layout, block in by_layout.items():

        def quantize(block: np.ndarray = block, layout: Layout = layout) -> object:
            return quantize_block(block, layout, "BF16", scheme)

        small = block[:128, :128]
        compiling = once(lambda small=small, quantize=quantize: quantize(small))
        eager = torch_seconds(block, scheme) if with_torch and layout is Layout.IN_OUT else None
        print(row(f"{name}, {layout}", gate.nbytes, copy, seconds(quantize), compiling, eager))
    done = quantize_block(gate, Layout.IN_OUT, "BF16", scheme)

    def back() -> object:
        return dequantize(done, scheme, gate.shape[1], gate.shape[0])

    print(row(f"{name}, dequantize", gate.nbytes, copy, seconds(back), once(back), None))


if __name__ == "__main__":
    main()
