"""What a solution must stay within: all files of the artifact, bits a weight, or the memory of a GPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from l4pack.budget.devices import Host, find_host, load_devices
from l4pack.budget.lines import LineGroup
from l4pack.budget.load import Load
from l4pack.budget.model import Budget, budget
from l4pack.budget.solve import changes
from l4pack.budget.subject import Subject
from l4pack.budget.weights import stage_layers
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import BudgetError, UsageError
from l4pack.fit.solve import CostLimit, Picks, total
from l4pack.fit.units import RUNTIMES, Choice, UnitChoices, device_bytes
from l4pack.plan.assign import assign
from l4pack.plan.plan import Plan, RunLimits, make_plan
from l4pack.recipe import Recipe
from l4pack.units import KIB, human_bytes, human_gib

ANY_RAM = 2**60  # sizes are asked for, not whether this machine could make the artifact
ANY = "any"
LAYER, ROLE = KINDS = ("layer", "role")  # what may differ: every layer's parts, or roles in all layers alike
# What is said of one tensor besides its name: in a shard's header and the manifest; in the index; of a calibrated matrix
# in the calibration record.
PER_TENSOR, PER_INDEXED, PER_CALIBRATED = 208, 43, 400
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

    def check(self) -> None:
        """Raise UsageError for a wish that says nothing, or two things at once."""
        given = [name for name in ("max_bytes", "bits", "device") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none is given"
            raise UsageError(
                f"fit needs one budget: {said}", hint="give --device NAME, --max-bytes SIZE or --bits NUMBER"
            )
        if self.runtime not in (*RUNTIMES, ANY):
            raise UsageError(f"no runtime is named '{self.runtime}'", hint=f"use {', '.join(RUNTIMES)} or {ANY}")
        if self.by not in (None, *KINDS):
            raise UsageError(f"nothing can be fitted by {self.by}", hint=f"use {' or '.join(KINDS)}")
        if self.bits is not None and not 0 < self.bits <= 64:
            raise UsageError(f"{self.bits} bits a weight is no budget", hint="for example --bits 4.5")
        load = [name for name in ("context", "sequences", "kv_dtype") if getattr(self, name) is not None]
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
        return Load(context=self.context, sequences=self.sequences or 1, kv_dtype=self.kv_dtype or "auto")

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


class Plans:
    """Plans of a model's recipes, each made once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._made: dict[str, Plan] = {}

    def of(self, recipe: Recipe) -> Plan:
        """The plan of a recipe, for its sizes."""
        key = recipe.digest()
        if key not in self._made:
            self._made[key] = make_plan(self.checkpoint, recipe, RunLimits(max_ram=ANY_RAM))
        return self._made[key]


def make_goal(plans: Plans, wish: Wish, units: Sequence[UnitChoices], picks: Picks, least: Recipe) -> Goal:
    """The goal of a wish; `least` is the recipe of `picks`, the smallest artifact."""
    if wish.max_bytes is not None:
        return _Files(plans, units, wish.max_bytes, picks, least)
    if wish.bits is not None:
        return _Bits(units, wish.bits)
    return DeviceBudget(plans.checkpoint, wish, units, picks, least)


def file_costs(units: Sequence[UnitChoices]) -> list[list[int]]:
    """Bytes of tensors of every choice of every unit."""
    return [[choice.nbytes for choice in unit.choices] for unit in units]


class _Files:
    """All files of the artifact.

    What headers, index and manifest say of a tensor is counted with it, but only nearly: lengths of numbers depend on
    where it lies. So the bound starts a little high, and falls until the recipe's plan holds it. It falls by the least
    that changes the solution, so that a larger budget never ends in a smaller bound.
    """

    def __init__(self, plans: Plans, units: Sequence[UnitChoices], max_bytes: int, picks: Picks, least: Recipe) -> None:
        self._plans, self._max_bytes = plans, max_bytes
        plan = plans.of(least)
        sharded = len(plan.shards) > 1
        costs = [[choice.nbytes + described_bytes(choice, sharded) for choice in unit.choices] for unit in units]
        rest = plan.artifact_bytes - total(costs, picks)
        margin = LEAST_MARGIN + int(MARGIN * (plan.artifact_bytes - plan.weight_bytes))
        self.limits = [CostLimit(costs, max_bytes - rest + margin)]

    def excess(self, recipe: Recipe) -> int:
        return self._plans.of(recipe).artifact_bytes - self._max_bytes

    def impossible(self, recipe: Recipe) -> BudgetError:
        size = self._plans.of(recipe).artifact_bytes
        return BudgetError(
            f"the smallest artifact that the runtime can load is {size:,} bytes ({human_bytes(size)}); "
            f"the budget is {self._max_bytes:,} ({human_bytes(self._max_bytes)})",
            hint=f"--max-bytes {size} can be met",
        )

    def describe(self) -> str:
        return f"an artifact of at most {self._max_bytes:,} bytes ({human_bytes(self._max_bytes)})"


def _in_stage(unit: UnitChoices, costs: Sequence[int], layers: Collection[int]) -> list[int]:
    """The part of a unit's bytes that lies in some layers; a role's layers are of equal size."""
    inside = sum(layer in layers for layer in unit.layers)
    return [cost * inside // len(unit.layers) for cost in costs]


def described_bytes(choice: Choice, sharded: bool) -> int:
    """About what an artifact's headers, index, manifest and calibration record say of a choice's tensors, in bytes."""
    names = sum(len(tensor.name) for tensor in choice.tensors)
    copies = 3 if sharded else 2
    each = PER_TENSOR + (PER_INDEXED if sharded else 0)
    modules = len({tensor.name.rpartition(".")[0] for tensor in choice.tensors}) if choice.calibrated else 0
    return copies * names + each * len(choice.tensors) + modules * PER_CALIBRATED


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
    """Weights of every pipeline stage must leave room for everything else on its GPU, at the dear end of the ranges."""

    def __init__(
        self, checkpoint: Checkpoint, wish: Wish, units: Sequence[UnitChoices], picks: Picks, least: Recipe
    ) -> None:
        host = wish.host()
        assert host is not None
        self._checkpoint, self._wish, self._host = checkpoint, wish, host
        found = self.budget(least)
        costs = device_bytes(units, found)
        stages = stage_layers(checkpoint.config.text.num_hidden_layers, found.setting.pp)
        self.limits = []
        for stage, layers in zip(found.stages, stages, strict=True):
            mine = [_in_stage(unit, row, layers) for unit, row in zip(units, costs, strict=True)]
            self.limits.append(CostLimit(mine, stage.headroom(high=True) + total(mine, picks)))

    def budget(self, recipe: Recipe) -> Budget:
        """The memory model's word on a recipe's artifact."""
        tensors = tuple(tensor for group in assign(self._checkpoint, recipe).groups for tensor in group)
        subject = Subject(self._checkpoint.name, self._checkpoint.config, tensors, recipe.name)
        return budget(subject, self._host, self._wish.load, self._wish.memory_runtime)

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
