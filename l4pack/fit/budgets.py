"""What a solution must stay within: all files of the artifact, bits a weight, or the memory of a GPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from l4pack.budget.devices import Host, find_host, load_devices
from l4pack.budget.files import CONTAINERS, FileSubject
from l4pack.budget.lines import LineGroup
from l4pack.budget.load import Load
from l4pack.budget.local import device_layers
from l4pack.budget.model import Budget, budget
from l4pack.budget.solve import changes
from l4pack.budget.weights import stage_layers
from l4pack.errors import BudgetError, UsageError
from l4pack.fit.sizes import Sizes
from l4pack.fit.solve import CostLimit, Picks, total
from l4pack.fit.units import RUNTIMES, Choice, UnitChoices, device_bytes
from l4pack.recipe import Recipe
from l4pack.units import KIB, human_bytes, human_gib

ANY = "any"
LAYER, ROLE = KINDS = ("layer", "role")  # what may differ: every layer's parts, or roles in all layers alike
MARGIN, LEAST_MARGIN = 0.03, 16 * KIB


@dataclass(frozen=True)
class Wish:
    """What a user asks for: one of `max_bytes` (all files of the artifact), `bits` (a weight, over all matrices of
    attention and MLPs, scales counted, kept ones too) and `device` (with a load), the runtime that must load it, and
    what may differ."""

    max_bytes: int | None = None
    bits: float | None = None
    device: str | None = None
    context: int | None = None
    sequences: int | None = None
    kv_dtype: str | None = None
    runtime: str = "vllm"
    by: str | None = None  # "layer" or "role"; None: by layer where the model itself was measured
    gpu_layers: int | None = None  # of llama.cpp: layers that are not in the machine's own memory
    best: bool = False  # MLPs of four bits and of FP8 are solved for the model's end

    def check(self) -> None:
        """Raise UsageError for a wish that says nothing, or two things at once."""
        given = [name for name in ("max_bytes", "bits", "device") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none is given"
            raise UsageError(
                f"fit needs one budget: {said}", hint="give --device NAME, --max-bytes SIZE or --bits NUMBER"
            )
        known = (*RUNTIMES, *CONTAINERS)
        if self.runtime not in (*known, ANY):
            raise UsageError(
                f"no runtime is named '{self.runtime}'",
                hint=f"use {', '.join(known)}, or {ANY} for what {', '.join(RUNTIMES)} all load",
            )
        if self.by not in (None, *KINDS):
            raise UsageError(f"nothing can be fitted by {self.by}", hint=f"use {' or '.join(KINDS)}")
        if self.bits is not None and not 0 < self.bits <= 64:
            raise UsageError(f"{self.bits} bits a weight is no budget", hint="for example --bits 4.5")
        load = [name for name in ("context", "sequences", "kv_dtype", "gpu_layers") if getattr(self, name) is not None]
        if load and self.device is None:
            raise UsageError(f"--{load[0].replace('_', '-')} goes with --device", hint="give --device, or leave it out")

    def words(self) -> str:
        """The budget in a few words."""
        if self.max_bytes is not None:
            return f"{self.max_bytes:,} bytes"
        if self.bits is not None:
            return f"{self.bits:g} bits a weight"
        context = "its own context" if self.context is None else f"{self.context:,} tokens"
        return f"{self.device}, {self.sequences or 1} x {context}"

    @property
    def load(self) -> Load:
        """The load in the memory model's terms."""
        return Load(
            context=self.context,
            sequences=self.sequences or 1,
            kv_dtype=self.kv_dtype or "auto",
            gpu_layers=self.gpu_layers,
        )

    @property
    def what(self) -> str:
        """What the runtime loads, all of whose files `max_bytes` counts."""
        return {"gguf": "a GGUF export", "mlx": "an MLX export"}.get(CONTAINERS.get(self.runtime, ""), "an artifact")

    @property
    def memory_runtime(self) -> str:
        """The runtime whose memory is counted."""
        return RUNTIMES[0] if self.runtime == ANY else self.runtime

    def host(self) -> Host | None:
        """The device asked for. Raises UsageError."""
        return None if self.device is None else find_host(self.device, load_devices())


class Goal(Protocol):
    """One kind of budget: limits to solve within, and the last word on a recipe."""

    limits: list[CostLimit]

    def excess(self, recipe: Recipe) -> int:
        """By how many bytes a recipe's artifact is too large; 0 or less: it fits."""
        ...

    def impossible(self, recipe: Recipe) -> BudgetError:
        """What to say when not even the smallest artifact, `recipe`'s, fits."""
        ...

    def describe(self) -> str:
        """The budget in words."""
        ...


def make_goal(sizes: Sizes, wish: Wish, units: Sequence[UnitChoices], picks: Picks, least: Recipe) -> Goal:
    """The goal of a wish; `least` is the recipe of `picks`, the smallest artifact."""
    if wish.max_bytes is not None:
        return _Files(sizes, wish, units, picks, least)
    if wish.bits is not None:
        return _Bits(units, wish.bits)
    return DeviceBudget(sizes, wish, units, picks, least)


def file_costs(units: Sequence[UnitChoices]) -> list[list[int]]:
    """Bytes of tensors of every choice of every unit."""
    return [[choice.nbytes for choice in unit.choices] for unit in units]


class _Files:
    """All files of the artifact.

    What headers, index and manifest say of a tensor is counted with it, but only nearly: lengths of numbers depend on
    where it lies. So the bound starts a little high, and falls until the recipe's plan holds it. It falls by the least
    that changes the solution, so that a larger budget never ends in a smaller bound.
    """

    def __init__(self, sizes: Sizes, wish: Wish, units: Sequence[UnitChoices], picks: Picks, least: Recipe) -> None:
        assert wish.max_bytes is not None
        self._sizes, self._max_bytes, self._what = sizes, wish.max_bytes, wish.what
        costs = [[choice.nbytes + self._described(choice, least) for choice in unit.choices] for unit in units]
        rest = sizes.artifact_bytes(least) - total(costs, picks)
        margin = LEAST_MARGIN + int(MARGIN * (sizes.artifact_bytes(least) - sizes.weight_bytes(least)))
        self.limits = [CostLimit(costs, self._max_bytes - rest + margin)]

    def _described(self, choice: Choice, recipe: Recipe) -> int:
        return self._sizes.described_bytes(choice.tensors, recipe, calibrated=choice.calibrated)

    def excess(self, recipe: Recipe) -> int:
        return self._sizes.artifact_bytes(recipe) - self._max_bytes

    def impossible(self, recipe: Recipe) -> BudgetError:
        size = self._sizes.artifact_bytes(recipe)
        return BudgetError(
            f"the smallest {self._what.partition(' ')[2]} that the runtime can load is {size:,} bytes ({human_bytes(size)}); "
            f"the budget is {self._max_bytes:,} ({human_bytes(self._max_bytes)})",
            hint=f"--max-bytes {size} can be met",
        )

    def describe(self) -> str:
        return f"{self._what} of at most {self._max_bytes:,} bytes ({human_bytes(self._max_bytes)})"


def _in_stage(unit: UnitChoices, costs: Sequence[int], layers: Collection[int]) -> list[int]:
    """The part of a unit's bytes that lies in some layers; a role's layers are of equal size."""
    inside = sum(layer in layers for layer in unit.layers)
    return [cost * inside // len(unit.layers) for cost in costs]


class _Bits:
    def __init__(self, units: Sequence[UnitChoices], bits: float) -> None:
        self._bits, self._numel = bits, sum(unit.numel for unit in units)
        self._costs = file_costs(units)
        self.limits = [CostLimit(self._costs, int(bits * self._numel / 8))]

    def excess(self, recipe: Recipe) -> int:
        del recipe  # bytes of tensors are what was solved for
        return 0

    def impossible(self, recipe: Recipe) -> BudgetError:
        del recipe
        least = 8 * sum(map(min, self._costs)) / self._numel
        rounded = -(-least * 1000 // 1) / 1000
        return BudgetError(
            f"the smallest artifact that the runtime can load takes {rounded:.3f} bits a weight; "
            f"the budget is {self._bits:g}",
            hint=f"--bits {rounded:.3f} can be met",
        )

    def describe(self) -> str:
        return f"{self._bits:g} bits a weight over all matrices of attention and MLPs, kept ones and scales counted"


class DeviceBudget:
    """Weights on every GPU must leave room for everything else on it, at the dear end of the ranges."""

    def __init__(self, sizes: Sizes, wish: Wish, units: Sequence[UnitChoices], picks: Picks, least: Recipe) -> None:
        host = wish.host()
        assert host is not None
        self._sizes, self._wish, self._host = sizes, wish, host
        found = self.budget(least)
        costs, layers = _on_devices(units, found)
        self.limits = []
        for stage, there in zip(found.stages, layers, strict=True):
            mine = [_in_stage(unit, row, there) for unit, row in zip(units, costs, strict=True)]
            self.limits.append(CostLimit(mine, stage.headroom(high=True) + total(mine, picks)))

    def budget(self, recipe: Recipe) -> Budget:
        """The memory model's word on what a recipe makes."""
        return budget(self._sizes.subject(recipe), self._host, self._wish.load, self._wish.memory_runtime)

    def excess(self, recipe: Recipe) -> int:
        return -self.budget(recipe).headroom_bytes

    def impossible(self, recipe: Recipe) -> BudgetError:
        found = self.budget(recipe)
        weights = sum(line.high for line in found.lines if line.group is LineGroup.WEIGHTS)
        room = weights + found.headroom_bytes
        tried = changes(found, self._wish.load, self._wish.memory_runtime, load_devices(), {})
        ways = " or ".join(change.option for change in tried)
        return BudgetError(
            f"the smallest artifact that the runtime can load takes {human_gib(weights)} of each "
            f"{self._host.device.name}; {found.setting.sequences} x {found.setting.context:,} tokens leave "
            f"{human_gib(room) if room > 0 else 'nothing'} for weights",
            hint=f"what fits: {ways}" if ways else "nothing nearby fits: use more or larger GPUs",
        )

    def describe(self) -> str:
        return f"{self._wish.words()}, KV in {self._wish.load.kv_dtype}"


def _on_devices(
    units: Sequence[UnitChoices], found: Budget
) -> tuple[Sequence[Sequence[int]], Sequence[Collection[int]]]:
    """Bytes of every choice of every unit, and the layers that each device has: pipeline stages, or llama.cpp's share."""
    if isinstance(found.subject, FileSubject):
        return file_costs(units), device_layers(found.subject, found.host, found.setting)
    return device_bytes(units, found), stage_layers(found.subject.config.text.num_hidden_layers, found.setting.pp)
