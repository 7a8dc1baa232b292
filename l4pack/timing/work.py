"""Amounts of work: what a job does, by phase and by what decides how fast it goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum


class Kind(StrEnum):
    """What work is counted in; a machine does so many of each a second."""

    PRODUCT = "product"  # operations of float32 products, a multiplication and an addition being two
    TENSOR = "tensor"  # the same whose factors a GPU rounds to TF32, see `quant.precision`
    UPDATE = "update"  # the same of a column block's products: long rows, sums of 128 terms
    PRODUCT64 = "product64"  # the same in float64
    FORWARD = "forward"  # the same in the dtype that is evaluated in: float32 on a CPU, BF16 on a GPU
    CHOLESKY = "cholesky"  # operations of factorizing in float32
    COLUMNS = "columns"  # weights x columns of their block, in GPTQ's loop over a block
    VISITS = "visits"  # weights that take a turn in a sweep
    MOVES = "moves"  # weights x inputs, for what a sweep's moves do to the rest of a row
    NEAREST = "nearest"  # weights rounded to nearest, by one thread, scales from a group's extremes
    NEAREST_MSE = "nearest_mse"  # the same, scales by the least error
    ROUND = "round"  # weights rounded to integers from a source by all threads, scales from extremes
    ROUND_MSE = "round_mse"
    ROUND_FLOAT = "round_float"  # to FP8, or FP4 with scales from extremes
    WIDEN = "widen"  # stored weights made numbers to compute with
    UNPACK = "unpack"  # quantized weights read back
    MEMORY = "memory"  # bytes that elementwise operations read and write
    LOGITS = "logits"  # tokens x vocabulary, summed up in float64
    STEP = "step"  # of a GPU's kernel that wait for one another: some loads from its cache, or a sum over its threads
    CALL = "call"  # operations, each with its own start
    HASH = "hash"  # bytes digested by one thread
    READ = "read"  # bytes from disk
    WRITE = "write"  # bytes to disk
    SYNC = "sync"  # waits for the disk
    KERNELS = "kernels"  # loading NumPy and the CPU's kernels, once
    LIBRARIES = "libraries"  # loading torch and transformers, once


DISK = (Kind.READ, Kind.WRITE)


class Work:
    """Amounts of each kind of work by phase, in the order phases come in."""

    def __init__(self) -> None:
        self.phases: dict[str, defaultdict[Kind, float]] = {}

    def add(self, phase: str, kind: Kind, amount: float) -> None:
        """Count an amount of some kind in a phase."""
        self.phases.setdefault(phase, defaultdict(float))[kind] += amount

    def include(self, other: Work, times: float = 1) -> None:
        """Count what another holds, `times` over."""
        for phase, kind, amount in other.items():
            self.add(phase, kind, times * amount)

    def items(self) -> Iterator[tuple[str, Kind, float]]:
        """Phase, kind and amount of everything counted."""
        for phase, amounts in self.phases.items():
            for kind, amount in amounts.items():
                yield phase, kind, amount

    def total(self, *kinds: Kind) -> float:
        """The amounts of some kinds over all phases."""
        return sum(amount for _, kind, amount in self.items() if kind in kinds)
