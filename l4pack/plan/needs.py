"""What calibrating takes, from shapes alone: the memory of its largest unit, and the disk of its hidden states."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4pack.checkpoint.source import Checkpoint
from l4pack.model.tensors import Role
from l4pack.plan.gradient import GradientNeeds, gradient_needs
from l4pack.plan.memory import BUFFERS, FLOAT, SPREAD_BUFFERS, Computing, Memory, SolvedKind, calibrating, fits
from l4pack.recipe import KEEP
from l4pack.work.device import CPU

if TYPE_CHECKING:
    from l4pack.plan.assign import Target
    from l4pack.recipe import Recipe
    from l4pack.work.machine import Room

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Needs:
    """Memory at the peak, disk beside the artifact, and what decides the time.

    As many experts are solved `together`, see `calibration.batch`; 0: each by itself, with the CPU's kernels. Hidden states
    that are `resident` stay on the device.
    """

    memory: Memory
    disk_bytes: int
    tokens: int
    streams: int
    ahead: bool = True
    together: int = 0
    resident: bool = False
    buffers: int = BUFFERS  # of hidden states that a stream has
    gradient: GradientNeeds | None = None  # of the walk back before

    @property
    def ram_bytes(self) -> int:
        """Resident memory at the peak."""
        return self.memory.ram

    @property
    def most_memory(self) -> Memory:
        """Memory at the peak, of calibrating and of the walk back before."""
        return self.memory if self.gradient is None else self.memory.most(self.gradient.memory)

    @property
    def most_disk_bytes(self) -> int:
        """Disk at the peak beside the artifact: of the walk back, or of calibrating with what that has left."""
        back = self.gradient
        return self.disk_bytes if back is None else max(back.disk_bytes, back.kept_bytes + self.disk_bytes)

    def for_lengths(self, lengths: Sequence[int], seeing: Memory | None = None) -> Needs:
        """The same with the tokens that a text's sequences really have, and what embedding its images takes."""
        memory, tokens = self.memory if seeing is None else self.memory.most(seeing), sum(lengths)
        return replace(
            self, memory=memory, tokens=tokens, disk_bytes=self.disk_bytes * tokens // self.tokens,
            gradient=self.gradient and self.gradient.for_lengths(lengths),
        )  # fmt: skip

    def on_cluster(self) -> Needs:
        """The same where workers of a cluster calibrate: the shared expert's outputs lie apart, and nothing stays on a
        device."""
        disk = self.disk_bytes // self.buffers * SPREAD_BUFFERS
        return replace(self, disk_bytes=disk, buffers=SPREAD_BUFFERS, resident=False)


def calibration_needs(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    ram: Room,
    vram: Room | None = None,
    device: str = "cpu",
) -> Needs:
    """The needs of calibrating `targets` on a kind of device; tokens are the most the recipe asks for.

    Units are loaded ahead, and on a device experts are solved together, where memory takes them.
    """
    assert recipe.calibration is not None
    text = checkpoint.config.text
    length = recipe.calibration.sequence_length or min(DEFAULT_LENGTH, text.max_position_embeddings)
    tokens = recipe.calibration.samples * length
    streams = 2 if asymmetric(recipe, targets) else 1
    disk = streams * BUFFERS * tokens * text.hidden_size * FLOAT
    computing = Computing(text, device, FLOAT, length, tokens, streams=streams, merging=checkpoint.merging_bytes)
    quantized = any(rule.roles == "all" or Role.ATTENTION in rule.roles for rule in recipe.rules if rule.scheme != KEEP)
    solved = _solved(recipe, targets)
    back = two_sided(recipe, targets)
    for chosen in _choices(computing, vram, staying_first=not back):
        memory = calibrating(chosen, solved, attention=quantized)
        if fits(memory, ram, vram):
            break
    together = 0 if device == CPU else chosen.together
    gradient = None
    if back:
        samples = min(recipe.calibration.gradient_samples, recipe.calibration.samples)
        gradient = gradient_needs(replace(computing, tokens=samples * length), samples, ram, vram)
    return Needs(memory, disk, tokens, streams, chosen.ahead, together, chosen.resident, gradient=gradient)


def _choices(computing: Computing, vram: Room | None, *, staying_first: bool) -> Iterator[Computing]:
    """How to compute, the best way first: units loaded ahead, and on a device whose memory is known hidden states that
    stay there, and as many experts together as fit, or if those do not come first the other way round: by both sides a device
    waits for itself at each tile, and that for all experts at once.

    How many is always a power of two, so that a little memory more or less does not make another job of it.
    """
    there = computing.device != CPU and vram is not None
    experts = computing.text.num_local_experts if computing.text.moe_layers and there else 1
    for ahead in (True, False):
        staying = (True, False) if there else (False,)
        ways = itertools.product(staying, reversed(range(experts.bit_length())))
        for resident, power in ways if staying_first else sorted(ways, key=lambda way: -way[1]):
            yield replace(computing, ahead=ahead, together=2**power, resident=resident)


def asymmetric(recipe: Recipe, targets: Sequence[Target]) -> bool:
    """Whether any matrix aims at the original layer's outputs, so that the original must run too."""
    options = [recipe.schemes[name].gptq for name in {target.scheme for target in targets}]
    return any(option is not None and option.asymmetric > 0 for option in options)


def two_sided(recipe: Recipe, targets: Sequence[Target]) -> bool:
    """Whether any matrix is rounded by what its outputs do to the model's end, so that the model must be walked back."""
    options = [recipe.schemes[name].gptq for name in {target.scheme for target in targets}]
    return any(option is not None and option.two_sided for option in options)


def _solved(recipe: Recipe, targets: Sequence[Target]) -> set[SolvedKind]:
    """Kinds of units to solve; an MLP's inner width, or the hidden one, if that is more."""
    kinds = set()
    for target in targets:
        options = recipe.schemes[target.scheme].gptq
        if options is not None:
            width = max(target.linear.in_features, target.linear.out_features)
            kinds.add(SolvedKind(options.asymmetric > 0, width, target.linear.role, options.two_sided))
    return kinds
