"""One decoder layer over all rows of one stream: attention by sequences, then one MLP at a time by gathered rows.

    middle    = input + attention(norm(input))
    following = shared(norm(middle)) + sum over experts of expert(score * norm(middle)[rows of the expert])
    following = middle + following

which is transformers' `Llama4TextDecoderLayer` in its own order of operations. The input stays as it is until the
layer is complete, so a run that is killed goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from l4pack.errors import L4packError
from l4pack.quant.precision import whole_factors
from l4pack.stream.hidden import AttendedRows, Packed, Rows, batches
from l4pack.stream.kv import BlockCache, CacheEntry, PassingCache, causal_mask, unchanged
from l4pack.stream.modules import Skeleton
from l4pack.stream.rows import rows_at_once
from l4pack.stream.sides import Stream
from l4pack.stream.units import Part, Unit, UnitWeights, place

Forward = Callable[[Tensor], Tensor]
ALL = slice(None)
Watch = Callable[[Tensor, Tensor], None]  # inputs and outputs of a block of rows, both [rows, hidden]


@dataclass(frozen=True)
class Blocks:
    """How many tokens are computed at once."""

    attention: int
    rows: int

    @classmethod
    def on(cls, device: torch.device, hidden_size: int) -> Blocks:
        """Those of a device and a model, whatever memory there is."""
        rows = rows_at_once(device.type, hidden_size)
        return cls(attention=rows, rows=rows)


@dataclass(frozen=True)
class Routing:
    """Where the router sends every row: float32 logits [rows, experts], chosen experts and scores [rows, per token]."""

    logits: Tensor
    experts: Tensor
    scores: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Rows given to an expert, in order, and the score [rows, 1] their inputs are multiplied with."""
        rows, choice = (self.experts == expert).nonzero(as_tuple=True)
        return rows, self.scores[rows, choice, None]

    def counts(self) -> list[int]:
        """Rows given to each expert."""
        return torch.bincount(self.experts.reshape(-1), minlength=self.logits.shape[1]).tolist()


class LayerPass:
    """Runs one layer of one stream, unit by unit."""

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        packed: Packed,
        stream: Stream,
        blocks: Blocks,
        *,
        release: bool = False,
        some: slice = ALL,
        apart: Rows | None = None,
    ) -> None:
        """With `release`, pages of hidden states are let go after every block of rows.

        Attention is of `some` batches of sequences alone, and what all rows go through of some blocks of rows. With
        `apart`, where the shared expert's outputs lie, outputs are complete once a row's last MLP has run and nothing is
        read that is written: a unit may be run again, or by two at once, each row of one MLP and one expert at most.
        """
        self.index, self._some, self._apart = index, some, apart
        self._release = release
        self._skeleton, self._packed, self._stream, self.blocks = skeleton, packed, stream, blocks
        self._layer: Any = skeleton.layer(index)
        self.moe = index in skeleton.config.text.moe_layers
        self.routing: Routing | None = None
        self._entry: CacheEntry = unchanged

    @property
    def tokens(self) -> int:
        """Rows of the stream."""
        return self._packed.rows

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._skeleton.device

    def run(self, unit: Unit, weights: UnitWeights, watch: Watch | None = None) -> Forward:
        """Run a unit, attention first; returns what it makes of other inputs, for attention from a sequence's start.

        An MLP's rows are shown to `watch` as they go through.
        """
        if unit.part is Part.ATTENTION:
            self.attention(weights)
            return self.attention_of
        module = self.mlp(unit, weights)
        self.feed_forward(unit, module, watch)
        return module

    @torch.inference_mode()
    def attention(self, weights: UnitWeights, entry: CacheEntry | None = None) -> None:
        """Write input + attention to the middle; keys and values enter the cache as the weights have it, or by `entry`.

        Raises L4packError when the output is not finite.
        """
        place(self._layer, weights)
        self._entry = entry or weights.kv_cache or unchanged
        target = self._stream.middle.data
        for batch in self.batches()[self._some]:
            for start, inputs, added in self._attended(self._layer, batch):
                self._store_attention(start, (inputs + added).to(target.device), target)
            self.let_go()

    @torch.inference_mode()
    def attention_inputs(self, weights: UnitWeights) -> Iterator[Tensor]:
        """What queries, keys and values are made of: all rows [rows, hidden], a block at a time."""
        place(self._layer, weights)
        for rows in self.row_blocks():
            yield self._layer.input_layernorm(self._to_device(self._stream.current.data[rows]))
            self.let_go()

    @torch.inference_mode()
    def attention_heads(self, weights: UnitWeights) -> Iterator[Tensor]:
        """What goes into the output projection with these weights of the others: all rows [rows, heads * head_dim], a
        sequence or a block of one at a time."""
        layer = self._skeleton.layer(self.index)
        place(layer, weights)
        layer.self_attn.o_proj = nn.Identity()
        self._entry = weights.kv_cache or unchanged
        for batch in self.batches():
            for _, _, heads in self._attended(layer, batch):
                yield heads
            self.let_go()

    def place(self, small: UnitWeights) -> None:
        """Put norms and router there, for a pass whose attention has run elsewhere."""
        place(self._layer, small)

    def batches(self) -> list[list[AttendedRows]]:
        """What attention computes at once, all of it."""
        return list(batches(self._packed.pieces(self.chunk), self.blocks.attention))

    @property
    def chunk(self) -> int | None:
        """Tokens that attend to one another only; None where all of a sequence do."""
        text = self._skeleton.config.text
        return text.attention_chunk_size if self.index in text.rope_layers else None

    def attention_of(self, inputs: Tensor) -> Tensor:
        """What attention adds to inputs [batch, length, hidden] that stand at the start of their sequences."""
        positions = torch.arange(inputs.shape[1])[None]
        return self._attend(self._layer, inputs, positions, [inputs.shape[1]] * len(inputs))

    def attention_sample(self, most: int) -> Tensor:
        """Inputs [1, length, hidden] from the start of the first sequence, short enough to lie in one chunk."""
        chunk = self._skeleton.config.text.attention_chunk_size or most
        length = min(len(self._packed.sequences[0].tokens), most, chunk, self.blocks.attention)
        return self._to_device(self._stream.current.data[None, :length])

    @torch.inference_mode()
    @whole_factors()
    def route(self) -> Routing | None:
        """Ask the router about every row; a dense layer has none."""
        if not self.moe:
            return None
        per_token = self._skeleton.config.text.num_experts_per_tok
        parts = []
        for rows in self._row_blocks(None):
            scores, logits = self._layer.feed_forward.router(self.normed(rows))
            experts = logits.topk(per_token, dim=1).indices
            parts.append((logits.float().cpu(), experts.cpu(), scores.gather(1, experts).cpu()))
        logits, experts, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        self.routing = Routing(logits, experts, scores)
        return self.routing

    @torch.inference_mode()
    def normed(self, rows: Tensor | slice) -> Tensor:
        """Inputs of the feed-forward block [rows, hidden], before any router's score."""
        normed: Tensor = self._layer.post_attention_layernorm(self._to_device(self._middle(rows)))
        return normed

    def _middle(self, rows: Tensor | slice) -> Tensor:
        """Rows between attention and what follows; many are gathered a few at a time, for each brings pages along."""
        data = self._stream.middle.data
        if isinstance(rows, slice) or len(rows) <= self.blocks.rows:
            return data[rows]
        found = data.new_empty(len(rows), data.shape[1])
        for start in range(0, len(rows), self.blocks.rows):
            part = slice(start, start + self.blocks.rows)
            found[part] = data[rows[part]]
            self.let_go()
        return found

    def mlp(self, unit: Unit, weights: UnitWeights) -> Forward:
        """A unit's MLP with its weights."""
        module: nn.Module = self._skeleton.mlp(unit.part is Part.DENSE)
        place(module, weights)
        return module

    def rows_of(self, unit: Unit) -> tuple[Tensor | None, Tensor | None]:
        """Rows that go through a unit (None: all) and their scores."""
        if unit.part is not Part.EXPERT or unit.expert is None:
            return None, None
        assert self.routing is not None
        return self.routing.of(unit.expert)

    def count(self, unit: Unit) -> int:
        """How many rows go through a unit."""
        rows, _ = self.rows_of(unit)
        return self.tokens if rows is None else len(rows)

    def inputs(self, unit: Unit) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """Blocks of rows that go through a unit and its inputs for them, scaled by the router."""
        rows, scores = self.rows_of(unit)
        for block in self._row_blocks(rows):
            if rows is None or scores is None:
                yield block, self.normed(block)
            else:
                chosen = rows[block]
                yield chosen, self.normed(chosen) * self._to_device(scores[block])

    @torch.inference_mode()
    def feed_forward(self, unit: Unit, module: Forward, watch: Watch | None = None) -> None:
        """Add a unit's outputs to what the block gives. Raises L4packError when they are not finite."""
        for rows, inputs in self.inputs(unit):
            computed = module(inputs)
            if watch is not None:
                watch(inputs, computed)
            outputs = computed.to(self._stream.following.data.device)
            _check_finite(outputs, f"{self._stream.name}: {unit}")
            if self._apart is not None:
                self._give_apart(unit, rows, outputs, self._apart)
            elif unit.part is Part.EXPERT:
                self._stream.following.data[rows] += outputs
            else:
                self._stream.following.data[rows] = outputs

    def _give_apart(self, unit: Unit, rows: Tensor | slice, outputs: Tensor, apart: Rows) -> None:
        """The same sums in the same order as where units run one after another."""
        if unit.part is Part.SHARED:
            apart.data[rows] = outputs
            return
        given = apart.data[rows] + outputs if unit.part is Part.EXPERT else outputs
        self._stream.following.data[rows] = given + self._stream.middle.data[rows]

    @torch.inference_mode()
    def finish(self) -> None:
        """Add the middle to what the block gave."""
        for rows in self._row_blocks(None):
            self._stream.following.data[rows] += self._stream.middle.data[rows]

    def _attend(self, layer: Any, inputs: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """What a layer's attention gives inputs [batch, length, hidden] at `positions` [batch, length], of which only the
        first `lengths` of a row are a text's."""
        given, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(inputs),
            position_embeddings=self._skeleton.rotary(positions),
            attention_mask=None,
            past_key_values=PassingCache(self._entry, lengths, int(positions[0, 0])),
        )
        result: Tensor = given
        return result

    def _attended(self, layer: Any, batch: list[AttendedRows]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where pieces of a batch begin, or blocks of a long one: their inputs, and what the layer's attention gives."""
        if batch[0].length > self.blocks.attention:
            yield from self._attended_in_blocks(layer, batch[0])
            return
        source = self._stream.current.data
        inputs = [source[piece.start : piece.start + piece.length] for piece in batch]
        padded = self._to_device(pad_sequence(inputs, batch_first=True))
        first = torch.tensor([[piece.position] for piece in batch])
        positions = first + torch.arange(padded.shape[1])
        given = self._attend(layer, padded, positions, [piece.length for piece in batch])
        for number, piece in enumerate(batch):
            yield piece.start, padded[number, : piece.length], given[number, : piece.length]

    def _attended_in_blocks(self, layer: Any, piece: AttendedRows) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A piece too long to attend at once: queries by blocks, keys and values of the whole piece kept."""
        source, cache = self._stream.current.data, BlockCache(piece.length, self._entry)
        for start in range(0, piece.length, self.blocks.attention):
            stop = min(start + self.blocks.attention, piece.length)
            inputs = self._to_device(source[piece.start + start : piece.start + stop])[None]
            positions = torch.arange(piece.position + start, piece.position + stop)[None]
            given, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(inputs),
                position_embeddings=self._skeleton.rotary(positions),
                attention_mask=causal_mask(start, stop, inputs.device),
                past_key_values=cache,
            )
            yield piece.start + start, inputs[0], given[0]

    def _store_attention(self, start: int, output: Tensor, target: Tensor) -> None:
        _check_finite(output, f"{self._stream.name}: {Unit(self.index, Part.ATTENTION)}")
        target[start : start + len(output)] = output

    def _row_blocks(self, rows: Tensor | None, most: int | None = None) -> Iterator[slice]:
        for block in self.row_blocks(rows, most)[self._some if rows is None else ALL]:
            yield block
            self.let_go()

    def row_blocks(self, rows: Tensor | None = None, most: int | None = None) -> list[slice]:
        """What is computed at once of `rows`, or of all; `most` rows at most."""
        count = self._packed.rows if rows is None else len(rows)
        count = count if most is None else min(count, most)
        step = self.blocks.rows
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def let_go(self) -> None:
        """Let pages of hidden states go, if the pass is to."""
        if self._release:
            self._stream.release()

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._skeleton.device, self._skeleton.dtype)


def _check_finite(values: Tensor, where: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise L4packError(
            f"{where}: the output is infinite or not a number",
            hint="a weight or scale there is damaged; `l4pack verify` looks for it",
        )
