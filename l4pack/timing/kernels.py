"""What this machine does a second, measured in a few seconds: the kernels and products that jobs are made of.

Each rate is the median of the runs that fit its share of the time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l4pack.evaluate.scoring import score
from l4pack.quant import gptq, gptq_blocks, two_sided_waves
from l4pack.quant.dequantize import dequantize
from l4pack.quant.factor import Factor, pull_of
from l4pack.quant.grid import NumberType
from l4pack.quant.layout import Layout
from l4pack.quant.precision import tensor_cores
from l4pack.quant.quantize import quantize_block
from l4pack.quant.scheme import Observer, Scheme, Strategy
from l4pack.quant.solution import Solution
from l4pack.timing.counts import CALLS_A_BLOCK, CALLS_A_FACTOR, CALLS_A_FACTOR_BLOCK, CALLS_A_PIECE, STEPS_A_TILE_TURN
from l4pack.timing.work import Kind
from l4pack.work import machine

Clock = Callable[[], float]
SHARE = 0.3  # seconds of each kernel, at least one run
# Operations that are counted for solving one block of columns: of so few rows, starting them is all that takes time.
CALLS = CALLS_A_PIECE + CALLS_A_BLOCK + CALLS_A_FACTOR + 8 * CALLS_A_FACTOR_BLOCK
ROWS, WIDTH, NARROW, SQUARE = 256, 2048, 256, 768
FILE_BYTES, CHUNK, DISK_SECONDS = 256 << 20, 8 << 20, 1.0
INT4 = Scheme(num_bits=4, group_size=128)
MSE = INT4.model_copy(update={"observer": Observer.MSE})
FP8 = Scheme(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.CHANNEL)


def rate(amount: float, work: Callable[[], Any], clock: Clock = time.perf_counter, share: float = SHARE) -> float:
    """How much of something a second `work` does, which does `amount`: by the median of its runs, the first of which
    warms up and does not count."""
    work()
    runs: list[float] = []
    while sum(runs) < share or not runs:
        started = clock()
        work()
        runs.append(max(clock() - started, 1e-9))
    return amount / median(runs)


class Kernels:
    """Each kind of work that is measured, on one kind of device."""

    def __init__(self, device: str = "cpu", clock: Clock = time.perf_counter) -> None:
        self._device, self._clock = torch.device(device), clock
        self._generator = torch.Generator().manual_seed(0)

    def measured(self) -> dict[Kind, float]:
        """Rates of everything but the disk and the start."""
        found = self._products() | self._solver() | self._memory()
        return found | (self._rounding() if self._device.type == "cpu" else self._steps())

    def _rate(self, amount: float, work: Callable[[], Any]) -> float:
        def waited() -> None:
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return rate(amount, waited, self._clock)

    def _numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, dtype)

    def _products(self) -> dict[Kind, float]:
        rows, square = self._numbers(ROWS, WIDTH), self._numbers(WIDTH, WIDTH)
        errors, upper, rest = self._numbers(ROWS, 128), self._numbers(128, WIDTH), self._numbers(ROWS, 2 * WIDTH)
        double, half = (self._numbers(count, SQUARE, dtype=torch.float64) for count in (SQUARE, 128))
        definite = square @ square.T + WIDTH * torch.eye(WIDTH, device=self._device)
        forward = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        low, low_square = rows.to(forward), square.to(forward)
        return {
            Kind.PRODUCT: self._rate(2.0 * ROWS * WIDTH**2, lambda: rows @ square),
            Kind.TENSOR: self._rate(2.0 * ROWS * WIDTH**2, tensor_cores()(lambda: rows @ square)),
            Kind.FORWARD: self._rate(2.0 * ROWS * WIDTH**2, lambda: low @ low_square),
            Kind.UPDATE: self._rate(2.0 * ROWS * 128 * WIDTH, lambda: rest[:, WIDTH:].addmm_(errors, upper, alpha=-1)),
            Kind.PRODUCT64: self._rate(2.0 * 128 * SQUARE**2, lambda: double.addmm_(half.T, half, alpha=-1)),
            Kind.CHOLESKY: self._rate(WIDTH**3 / 3, lambda: torch.linalg.cholesky_ex(definite)),
            Kind.CALL: self._rate(CALLS, lambda: solve_a_block(self._device)),
        }

    def _solver(self) -> dict[Kind, float]:
        weight, importance = self._numbers(ROWS, WIDTH) * 0.02, torch.ones(WIDTH, device=self._device)
        found = {
            Kind.NEAREST: self._rate(ROWS * WIDTH, lambda: gptq.round_to_nearest(weight, INT4, None)),
            Kind.NEAREST_MSE: self._rate(ROWS * WIDTH, lambda: gptq.round_to_nearest(weight, MSE, importance)),
        }
        return found | (self._loops() if self._device.type == "cpu" else {})

    def _steps(self) -> dict[Kind, float]:
        """A tile's turn in a sweep by both sides: nothing but waiting for what came before."""
        levels = torch.zeros(1, 128, 128, dtype=torch.int8, device=self._device)
        pull, definite = self._numbers(1, 128, 128) * 0.1, torch.eye(128, device=self._device)[None]
        one, none = torch.ones_like(pull), torch.zeros_like(pull)
        given = (levels, pull, definite, definite, one, none, INT4.grid)
        return {Kind.STEP: self._rate(STEPS_A_TILE_TURN, lambda: two_sided_waves.descend_tiles(*given))}

    def _loops(self) -> dict[Kind, float]:
        """GPTQ's loop over a block, and sweeps over narrow and wide rows: what a move costs grows with the row."""
        wide, narrow = _Solved(self._numbers, WIDTH), _Solved(self._numbers, NARROW)
        long, short = (1 / self._rate(1, one.sweep) / (ROWS * len(one.hessian)) for one in (wide, narrow))
        moves = max((long - short) / (WIDTH - NARROW), 1e-15)
        return {
            Kind.COLUMNS: self._rate(ROWS * 128 * 128, wide.block),
            Kind.VISITS: 4 / max(short - moves * NARROW, short / 4),
            Kind.MOVES: 4 / moves,
        }

    def _memory(self) -> dict[Kind, float]:
        source, stored = self._numbers(16 << 20), self._numbers(8 << 20, dtype=torch.bfloat16)
        target, widened = torch.empty_like(source), torch.empty(8 << 20, device=self._device)
        answers = _Flat(self._numbers(512, 8), self._numbers(8192, 8))
        rows, targets = torch.arange(512), torch.zeros(512, dtype=torch.long)
        return {
            Kind.MEMORY: self._rate(8 * len(source), lambda: target.copy_(source)),
            Kind.WIDEN: self._rate(len(stored), lambda: widened.copy_(stored)),
            Kind.LOGITS: self._rate(512 * 8192, lambda: score(answers, rows, targets)),
        }

    def _rounding(self) -> dict[Kind, float]:
        threads, shape = machine.cores(), (WIDTH, 2 * WIDTH)
        source = self._numbers(*shape, dtype=torch.bfloat16).mul_(0.02).view(torch.int16).numpy().view(np.uint16)
        packed = quantize_block(source, Layout.IN_OUT, "BF16", INT4)
        data = bytes(CHUNK)

        def unpack() -> Tensor:
            values = torch.from_numpy(dequantize(packed, INT4, 2 * WIDTH, WIDTH))
            return values.to(torch.bfloat16).to(torch.float32)

        with ThreadPoolExecutor(threads) as pool:

            def everywhere(scheme: Scheme) -> Callable[[], Any]:
                return lambda: list(
                    pool.map(lambda _: quantize_block(source, Layout.IN_OUT, "BF16", scheme), range(threads))
                )

            return {
                Kind.ROUND: self._rate(threads * source.size, everywhere(INT4)),
                Kind.ROUND_MSE: self._rate(threads * source.size, everywhere(MSE)),
                Kind.ROUND_FLOAT: self._rate(threads * source.size, everywhere(FP8)),
                Kind.UNPACK: self._rate(source.size, unpack),
                Kind.HASH: self._rate(CHUNK, lambda: hashlib.sha256(data).digest()),
            }


def solve_a_block(device: torch.device | str) -> Solution:
    """Solve a matrix so small that starting operations is all that takes time."""
    return gptq.solve(torch.ones(16, 128, device=device), torch.eye(128, device=device), INT4, sweeps=1)


class _Solved:
    """Rows in the middle of being solved: a block of them, and where a sweep starts."""

    def __init__(self, numbers: Callable[..., Tensor], width: int) -> None:
        inputs = numbers(2 * width, width) * torch.linspace(0.2, 2, width)
        self.hessian = inputs.T @ inputs / len(inputs)
        target = numbers(ROWS, width) * 0.02
        self._start = gptq.round_to_nearest(target, INT4, None)
        self._problem = gptq.prepare_problem(self.hessian)
        factor = self._problem.factor
        assert isinstance(factor, Factor)
        self._factor, self._target = factor, target[:, :128].contiguous()
        self._upper = factor.upper[:128, :128].contiguous()
        self._rounded, errors = gptq.solve_columns(target, factor, self._start, INT4, 128)
        self._pull = pull_of(errors, factor)

    def block(self) -> gptq_blocks.SolvedBlock:
        """The first block's columns."""
        scale, zero_point = self._start.scale[:, :1], self._start.zero_point[:, :1]
        return gptq_blocks.solve_block(
            self._target, self._upper, scale, zero_point, torch.zeros(128, dtype=torch.long), INT4.grid
        )

    def sweep(self) -> Tensor:
        """Four sweeps from where GPTQ ended."""
        start, scale = self._rounded, self._rounded.scale.float()
        return gptq_blocks.descend(
            start.levels.clone(), self._pull.clone(), self.hessian, self._factor.added, scale, start.zero_point, INT4.grid,
            block_size=256, sweeps=4,
        )  # fmt: skip


class _Flat:
    """Answers of a model whose head costs nothing."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self._hidden, self._head, self.vocabulary = hidden, head, len(head)

    def normed(self, rows: Tensor) -> Tensor:
        return self._hidden[rows]

    def head(self, tokens: slice) -> Tensor:
        return self._head[tokens]


def disk_rates(folder: Path) -> dict[Kind, float]:
    """Bytes a second written to a folder and on its disk, and read again from there; waits a second for little."""
    path = folder / f".l4pack-speed-{os.getpid()}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        written, seconds = _write(descriptor)
        started = time.perf_counter()
        for _ in range(5):
            os.pwrite(descriptor, b"l4pack", 0)
            os.fsync(descriptor)
        waits = 5 / max(time.perf_counter() - started, 1e-9)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        read = sum(len(chunk) for chunk in _chunks(descriptor))
        return {
            Kind.WRITE: written / seconds,
            Kind.READ: read / max(time.perf_counter() - started, 1e-9),
            Kind.SYNC: waits,
        }
    finally:
        os.close(descriptor)
        path.unlink()


def _write(descriptor: int) -> tuple[int, float]:
    data, written, started = os.urandom(CHUNK), 0, time.perf_counter()
    while written < FILE_BYTES and time.perf_counter() - started < DISK_SECONDS:
        written += os.write(descriptor, data)
    os.fsync(descriptor)
    return written, time.perf_counter() - started


def _chunks(descriptor: int) -> Iterator[bytes]:
    place, started = 0, time.perf_counter()
    while chunk := os.pread(descriptor, CHUNK, place):
        yield chunk
        place += len(chunk)
        if time.perf_counter() - started > DISK_SECONDS:
            return
