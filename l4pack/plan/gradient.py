"""What the walk back through a model takes, which two-sided rounding needs before anything is solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l4pack.model.config import TextConfig
from l4pack.plan.memory import BUFFERS, DOUBLE, FLOAT, FOLIO, STORED, Computing, Memory, fits
from l4pack.work.device import CPU

if TYPE_CHECKING:
    from l4pack.work.machine import Room

# States of a block's rows beside those of a forward pass: of a norm and an MLP, of attention outside and inside its heads.
_MLP_ROWS, _ATTENTION_ROWS, _HEAD_ROWS = 8, 16, 8
# Copies of all keys and values that a block of queries sees: entered, their gradients so far and those of the block, before
# and after they are repeated for every head, and half as much again that the kernel packs.
_SEEN, _REPEATED = 4, 6
_SQUARES = 3  # [hidden, hidden]: a layer's sum, a half of it and the other


@dataclass(frozen=True)
class GradientNeeds:
    """Samples of the calibration text and their tokens, memory at the peak, and whether units are loaded ahead."""

    text: TextConfig
    samples: int
    tokens: int
    memory: Memory
    ahead: bool

    def for_lengths(self, lengths: Sequence[int]) -> GradientNeeds:
        """The same with the tokens that a text's sequences really have."""
        return replace(self, samples=min(self.samples, len(lengths)), tokens=sum(lengths[: self.samples]))

    @property
    def disk_bytes(self) -> int:
        """The most there is at once: each layer's inputs in BF16 until it is passed, what a step works on, and the moments of
        the layers that are passed. Exact but for the state, of some kilobytes."""
        text, layers = self.text, self.text.num_hidden_layers
        row = self.tokens * text.hidden_size
        inputs, working = row * STORED, BUFFERS * row * FLOAT
        entering = 2 * self.tokens * text.num_key_value_heads * text.head_dim * FLOAT
        top = (layers + 1) * inputs + working
        first, last = (left * inputs + (layers - left + 1) * self._square for left in (layers, 1))
        return max(top, max(first, last) + working + entering)

    @property
    def kept_bytes(self) -> int:
        """What is left of it until the artifact is complete: a matrix [hidden, hidden] a layer, float32."""
        return self.text.num_hidden_layers * self._square

    @property
    def _square(self) -> int:
        return self.text.hidden_size**2 * FLOAT

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"samples": self.samples, "tokens": self.tokens, "ram_bytes": self.memory.ram,
                "disk_bytes": self.disk_bytes, "kept_bytes": self.kept_bytes}  # fmt: skip


def gradient_needs(computing: Computing, samples: int, ram: Room, vram: Room | None) -> GradientNeeds:
    """The needs of walking up and back over `samples` sequences, those of `computing`; units are loaded ahead where memory
    takes it."""
    for ahead in (True, False):
        memory = walking_back(replace(computing, streams=1, resident=False, together=1, ahead=ahead))
        if fits(memory, ram, vram):
            break
    return GradientNeeds(computing.text, samples, computing.tokens, memory, ahead)


def walking_back(computing: Computing) -> Memory:
    """Of a layer backwards: an MLP's rows with what their derivative needs, a block of queries with all the keys and values it
    sees, or the sum of its moments."""
    text, item = computing.text, computing.itemsize
    mlp = computing.mlp + 2 * computing.running() + _MLP_ROWS * computing.rows * text.hidden_size * item
    block = min(computing.rows, computing.length)
    heads = text.num_attention_heads * text.head_dim
    seen = _SEEN * 2 * text.num_key_value_heads * text.head_dim + _REPEATED * heads
    rows = _ATTENTION_ROWS * text.hidden_size + _HEAD_ROWS * heads + 2 * computing.length
    scores = 0 if computing.device == CPU else 3 * text.num_attention_heads * block * computing.length
    attention = (block * rows + computing.length * seen + scores) * item
    moments = _SQUARES * text.hidden_size**2 * FLOAT
    return computing.memory((mlp, attention, moments), scored=True)


def held_slopes(computing: Computing, tokens: int, changes: int) -> int:
    """Bytes of multiplying the `changes` of a layer with both gradients of `tokens`: the products, pages of two files of which
    an expert's rows are looked at, and a block of their rows."""
    row = computing.text.hidden_size * STORED
    pages = 2 * min(tokens * row, computing.rows * (row + FOLIO))
    return 2 * changes * tokens * DOUBLE + pages + 4 * computing.rows * computing.text.hidden_size * FLOAT
