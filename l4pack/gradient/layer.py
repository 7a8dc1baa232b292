"""One decoder layer backwards: what `stream.layer` computes is computed again from the layer's kept inputs, and the
gradient at its outputs is taken through it, MLP by MLP by gathered rows, then attention by sequences.

    outputs = middle + shared(norm(middle)) + sum over experts of expert(score(norm(middle)) * norm(middle))
    middle  = inputs + attention(norm(inputs))

Each product's derivative is torch's own. Of an MLP the outputs are not needed, so the down projection runs backwards only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from l4pack.gradient.routers import margins
from l4pack.model.parts import DOWN, GATE, UP
from l4pack.stream.hidden import AttendedRows, Packed, Rows
from l4pack.stream.kv import causal_mask, unchanged
from l4pack.stream.layer import Blocks, LayerPass
from l4pack.stream.modules import Skeleton
from l4pack.stream.sides import Stream
from l4pack.stream.units import Part, Unit, UnitWeights


class BackwardPass(LayerPass):
    """Runs one layer backwards, unit by unit: attention's forward part, MLPs, and attention backwards."""

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        packed: Packed,
        stream: Stream,
        gradients: Stream,
        entering: Rows,
        blocks: Blocks,
    ) -> None:
        """`stream` has the layer's inputs, and takes its middle; `gradients` those at its outputs, and takes those at its
        inputs, float32 [rows, hidden]; `entering` takes keys and values, float32 [rows, 2 * kv_heads * head_dim]."""
        super().__init__(skeleton, index, packed, stream, blocks, release=True)
        self._gradients, self._entering = gradients, entering

    @property
    def arriving(self) -> Rows:
        """Gradients at the outputs."""
        return self._gradients.current

    @property
    def found(self) -> Rows:
        """Gradients at the middle, once MLPs have run backwards."""
        return self._gradients.following

    @torch.inference_mode()
    def moments(self) -> Tensor:
        """Sum over rows of g g^T of the gradients at the outputs, float32 [hidden, hidden]."""
        width = self._gradients.current.data.shape[1]
        total = torch.zeros(width, width, device=self.device)
        for rows in self._row_blocks(None):
            gradient = self._arriving(rows).float()
            total.addmm_(gradient.T, gradient)
        upper = total.triu()  # a product may round otherwise on the other side of the diagonal
        return upper + upper.triu(1).T

    def middle(self, weights: UnitWeights) -> None:
        """Run attention, keeping what enters its cache."""
        self.attention(weights, _Entering(self._entering))

    def follow(self, other: BackwardPass) -> None:
        """Take the middle and the routing that another pass over the same hidden states has found."""
        self._layer, self.routing = other._layer, other.routing

    def mlp_backward(self, unit: Unit, weights: UnitWeights) -> None:
        """Take the gradient through a unit to the middle; that of the MLP of all rows comes first."""
        module: Any = self.mlp(unit, weights)
        every, _ = self.rows_of(unit)
        outputs, target = self._gradients.current.data, self._gradients.following.data
        for block in self._row_blocks(every):
            rows = block if every is None else every[block]
            found = self._through_mlp(unit, module, rows).to(target.device)
            target[rows] = found + (outputs if every is None else target)[rows]

    def router_backward(self, weights: Tensor) -> None:
        """Add the gradients of all rows' margins, times `weights` float32 [rows], to those at the middle."""
        target = self._gradients.following.data
        router, chosen = self._layer.feed_forward.router, self._skeleton.config.text.num_experts_per_tok
        for rows in self._row_blocks(None):
            middle = self._to_device(self._middle(rows)).requires_grad_()
            logits = self._layer.post_attention_layernorm(middle) @ router.weight.T
            counted = self._to_device(weights[rows])
            (found,) = torch.autograd.grad(margins(logits, chosen), middle, counted)
            target[rows] += found.to(target)

    def _through_mlp(self, unit: Unit, module: Any, rows: Tensor | slice) -> Tensor:
        middle = self._to_device(self._middle(rows)).requires_grad_()
        inputs = self._layer.post_attention_layernorm(middle)
        if unit.part is Part.EXPERT:
            row = self._layer.feed_forward.router.weight[unit.expert]
            inputs = inputs * (inputs @ row).float().sigmoid().to(inputs.dtype)[:, None]
        gate, up, down = (module.get_submodule(name) for name in (GATE, UP, DOWN))
        inner = module.activation_fn(gate(inputs)) * up(inputs)
        return torch.autograd.grad(inner, middle, self._arriving(rows) @ down.weight)[0]

    def attention_backward(self) -> None:
        """Take the gradient at the middle through attention to the layer's inputs, in its place."""
        self._entry = unchanged
        for batch in self.batches():
            if batch[0].length > self.blocks.attention:
                self._long_backward(batch[0])
            else:
                self._batch_backward(batch)
                self.let_go()

    def _batch_backward(self, batch: list[AttendedRows]) -> None:
        """Pieces that are attended at once; what fills up the shorter ones has no gradient."""
        inputs, target = self._padded(self._stream.current.data, batch).requires_grad_(), self._gradients.following.data
        positions = torch.tensor([[piece.position] for piece in batch]) + torch.arange(inputs.shape[1])
        arriving = self._padded(target, batch)
        added = self._attend(self._layer, inputs, positions, [piece.length for piece in batch])
        (found,) = torch.autograd.grad(added, inputs, arriving)
        for piece, gradient in zip(batch, found + arriving, strict=True):
            target[piece.start : piece.start + piece.length] = gradient[: piece.length].to(target)

    def _padded(self, data: Tensor, batch: list[AttendedRows]) -> Tensor:
        parts = [data[piece.start : piece.start + piece.length] for piece in batch]
        return self._to_device(pad_sequence(parts, batch_first=True))

    def _long_backward(self, piece: AttendedRows) -> None:
        """The last queries first: a block's own keys and values have their whole gradient once all later blocks are done."""
        rows = slice(piece.start, piece.start + piece.length)
        entered = self._as_heads(self._entering.data[rows])
        later = torch.zeros_like(entered)
        for start in reversed(range(0, piece.length, self.blocks.attention)):
            stop = min(start + self.blocks.attention, piece.length)
            earlier = entered[..., :start, :].requires_grad_()
            later[..., :start, :] += self._through_attention(piece, start, stop, earlier, later[..., start:stop, :])
            self.let_go()

    def _as_heads(self, entered: Tensor) -> Tensor:
        """Keys and values [2, 1, kv_heads, rows, head_dim] of rows in the file."""
        heads = entered.view(len(entered), 2, 1, -1, self._skeleton.text.head_dim)
        return self._to_device(heads.permute(1, 2, 3, 0, 4)).contiguous()

    def _through_attention(self, piece: AttendedRows, start: int, stop: int, earlier: Tensor, own: Tensor) -> Tensor:
        """Take the gradient through the queries of a block; what it adds to that of `earlier` keys and values.

        `own` is the gradient of the block's own keys and values that later queries gave.
        """
        rows = slice(piece.start + start, piece.start + stop)
        inputs = self._to_device(self._stream.current.data[rows])[None].requires_grad_()
        cache = _Continued(earlier)
        added, _ = self._layer.self_attn(
            hidden_states=self._layer.input_layernorm(inputs),
            position_embeddings=self._skeleton.rotary(
                torch.arange(piece.position + start, piece.position + stop)[None]
            ),
            attention_mask=causal_mask(start, stop, inputs.device) if start else None,
            past_key_values=cache,
        )
        target = self._gradients.following.data
        arriving = self._to_device(target[rows])
        ours, theirs = torch.autograd.grad((added, *cache.own), (inputs, earlier), (arriving[None], *own))
        target[rows] = (arriving + ours[0]).to(target)
        return theirs

    def _arriving(self, rows: Tensor | slice) -> Tensor:
        """Gradients at the outputs."""
        return self._to_device(self._gradients.current.data[rows])

    def let_go(self) -> None:
        """Let all pages go."""
        super().let_go()
        self._gradients.release()
        self._entering.release()


class _Entering:
    """A cache entry that keeps what enters, which comes row after row."""

    def __init__(self, rows: Rows) -> None:
        self._data, self._next = rows.data, 0

    def __call__(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        for number, length in enumerate(lengths):
            rows = slice(self._next, self._next + length)
            heads = torch.cat((keys[number, :, :length], values[number, :, :length]))
            self._data[rows] = heads.transpose(0, 1).reshape(length, -1).to(self._data)
            self._next += length
        return keys, values


class _Continued:
    """What transformers' attention asks of a cache, for a block of queries that goes on from `earlier` keys and values
    [2, 1, kv_heads, rows, head_dim]."""

    def __init__(self, earlier: Tensor) -> None:
        self._earlier = earlier
        self.own: tuple[Tensor, ...] = ()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the block."""
        del layer_idx
        return self._earlier.shape[3]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """What is attended to."""
        del layer_idx
        self.own = keys, values
        return torch.cat((self._earlier[0], keys), 2), torch.cat((self._earlier[1], values), 2)
