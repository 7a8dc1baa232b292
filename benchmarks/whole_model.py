"""A whole trained Llama 4 in transformers' float32 forward, with MLPs that can be replaced and whose output gradients can be
watched: what `end_aware.py` measures with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Llama4ForConditionalGeneration

from l4pack.gradient.routers import margin_weights, margins
from l4pack.model.parts import DOWN, GATE, UP
from l4pack.stream.layer import Routing

BATCH = 8
Mlp = dict[str, Tensor]
Key = tuple[int, str, str]  # layer, unit, matrix


class FeedForward(nn.Module):
    """A layer's MLPs by name, matrices [out, in], in place of upstream's module; experts run on their own rows."""

    def __init__(self, upstream: nn.Module) -> None:
        super().__init__()
        self.router = getattr(upstream, "router", None)
        self.units: dict[str, Mlp] = {}
        if self.router is None:
            self.units["dense"] = _linears(upstream)
        else:
            self.units["shared"] = _linears(upstream.shared_expert)
            gate_up, down = upstream.experts.gate_up_proj.mT, upstream.experts.down_proj.mT
            for expert, (both, last) in enumerate(zip(gate_up, down, strict=True)):
                gate, up = both.chunk(2)
                self.units[str(expert)] = {GATE: gate.contiguous(), UP: up.contiguous(), DOWN: last.contiguous()}
        self.watch: Callable[[str, str, Tensor, Tensor | None], None] | None = None

    def routing(self, rows: Tensor) -> Routing | None:
        """Where rows [rows, hidden] go; None in a dense layer."""
        if self.router is None:
            return None
        logits = functional.linear(rows, self.router.weight)
        best, experts = logits.max(1, keepdim=True)
        return Routing(logits, experts, best.sigmoid())

    def forward(self, hidden: Tensor) -> Any:
        """As upstream's: [batch, length, hidden], or [rows, hidden] with logits where there are experts."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        routing = self.routing(rows)
        if routing is None:
            return self._run("dense", rows, None).view(hidden.shape)
        total = self._run("shared", rows, None)
        for expert in range(routing.logits.shape[1]):
            own, scores = routing.of(expert)
            total = total.index_add(0, own, self._run(str(expert), rows[own] * scores, own))
        return total, routing.logits

    def _run(self, unit: str, rows: Tensor, where: Tensor | None) -> Tensor:
        mlp = self.units[unit]
        gate, up = rows @ mlp[GATE].T, rows @ mlp[UP].T
        down = (functional.silu(gate) * up) @ mlp[DOWN].T
        if self.watch is not None:
            for name, output in ((GATE, gate), (UP, up), (DOWN, down)):
                self.watch(unit, name, output, where)
        return down


def _linears(module: nn.Module) -> Mlp:
    return {name: getattr(module, name).weight for name in (GATE, UP, DOWN)}


class Model:
    """A whole Llama 4 text model in float32 whose MLPs can be replaced, and its layers one at a time."""

    def __init__(self, folder: str, length: int) -> None:
        upstream = (
            Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        )
        self.causal = upstream.language_model
        self.layers: Any = self.causal.model.layers
        sample = torch.arange(length)[None].expand(BATCH, -1)
        self._given: list[dict[str, Any]] = []
        hooks = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in self.layers]
        before = self.causal(input_ids=sample, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        for layer in self.layers:
            layer.feed_forward = FeedForward(layer.feed_forward)
        torch.testing.assert_close(self.causal(input_ids=sample, use_cache=False).logits, before, atol=1e-3, rtol=1e-3)

    def _keep(self, _module: nn.Module, _inputs: Any, given: dict[str, Any]) -> None:
        self._given.append({key: value for key, value in given.items() if key != "hidden_states"})

    def attend(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [sequences, length, hidden] after attention, and what the MLPs see of them [rows, hidden]."""
        layer = self.layers[index]
        mixed = [
            part + layer.self_attn(hidden_states=layer.input_layernorm(part), **self._given[index])[0]
            for part in hidden.split(BATCH)
        ]
        after = torch.cat(mixed)
        return after, layer.post_attention_layernorm(after).flatten(0, 1)

    def through(self, index: int, after: Tensor, rows: Tensor) -> Tensor:
        """Hidden states after the MLPs of a layer."""
        found = self.layers[index].feed_forward(rows)
        return after + (found[0] if isinstance(found, tuple) else found).view(after.shape)

    def embed(self, ids: Tensor) -> Tensor:
        """[sequences, length, hidden]"""
        return self.causal.model.embed_tokens(ids)

    def log_probs(self, ids: Tensor) -> Iterator[Tensor]:
        """Of some sequences [BATCH, length] at a time: float32 [BATCH, length, vocabulary]."""
        for part in ids.split(BATCH):
            yield self.causal(input_ids=part, use_cache=False).logits.log_softmax(-1)

    def weights(self) -> dict[tuple[int, str], Mlp]:
        """The matrices as they are now."""
        return {
            (index, unit): dict(mlp)
            for index, layer in enumerate(self.layers)
            for unit, mlp in layer.feed_forward.units.items()
        }

    def put(self, weights: Mapping[tuple[int, str], Mlp]) -> None:
        """Set matrices."""
        for (index, unit), mlp in weights.items():
            self.layers[index].feed_forward.units[unit] = dict(mlp)


@dataclass
class Fisher:
    """What a backward pass leaves of a matrix' output gradients: sums of g g^T [out, out] and how many, and for every
    token and each of some groups of outputs the mean of g^2 [tokens, groups]."""

    outer: dict[Key, Tensor] = field(default_factory=dict)
    count: dict[Key, int] = field(default_factory=dict)
    squares: dict[Key, Tensor] = field(default_factory=dict)

    def add(self, key: Key, gradient: Tensor, rows: Tensor, tokens: int, groups: int) -> None:
        """Take in gradients [n, out] of the tokens `rows`."""
        outer = gradient.T @ gradient
        self.outer[key] = self.outer.get(key, torch.zeros_like(outer)) + outer
        self.count[key] = self.count.get(key, 0) + len(rows)
        squares = self.squares.setdefault(key, torch.full((tokens, groups), torch.nan))
        squares[rows] = gradient.square().unflatten(1, (groups, -1)).mean(2)

    def mean(self, key: Key) -> Tensor:
        """[out, out]"""
        return self.outer[key] / self.count[key]


def fisher_of(model: Model, ids: Tensor, groups: int, loss: Callable[[Tensor, int], Tensor]) -> Fisher:
    """One backward pass over `ids` [sequences, length]; `loss` takes logits and the first sequence's number."""
    found, tokens, length = Fisher(), ids.numel(), ids.shape[1]
    for first in range(0, len(ids), BATCH):
        _watch(model, found, first * length, tokens, groups)
        inputs = model.embed(ids[first : first + BATCH]).requires_grad_()
        loss(model.causal(inputs_embeds=inputs, use_cache=False).logits, first).backward()
    for layer in model.layers:
        layer.feed_forward.watch = None
    return found


def _watch(model: Model, found: Fisher, first: int, tokens: int, groups: int) -> None:
    for index, layer in enumerate(model.layers):

        def watch(unit: str, name: str, output: Tensor, where: Tensor | None, index: int = index) -> None:
            rows = first + (torch.arange(len(output)) if where is None else where)
            if len(rows):
                output.register_hook(lambda gradient: found.add((index, unit, name), gradient, rows, tokens, groups))

        layer.feed_forward.watch = watch


def own_samples(seed: int) -> Callable[[Tensor, int], Tensor]:
    """Cross-entropy on tokens drawn from the model's own answers."""
    draw = torch.Generator().manual_seed(seed)

    def loss(logits: Tensor, _first: int) -> Tensor:
        flat = logits.flatten(0, 1)
        labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=draw)[:, 0]
        return functional.cross_entropy(flat, labels, reduction="sum")

    return loss


@contextmanager
def with_routers(
    model: Model, loss: Callable[[Tensor, int], Tensor], seed: int
) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """`loss` and what the routers decide, as `l4pack.gradient.routers` counts it, a batch at a time."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            seen.append(output[1])

    def counted(logits: Tensor, first: int) -> Tensor:
        total = loss(logits, first)
        for layer, own in enumerate(seen):
            best = own.topk(1).indices
            weights = margin_weights(Routing(own.detach(), best, best), seed + first * len(model.layers) + layer)
            if weights is not None:
                total = total + (margins(own, 1) * weights).sum()
        seen.clear()
        return total

    hooks = [layer.feed_forward.register_forward_hook(see) for layer in model.layers]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def divergence(reference: Tensor) -> Callable[[Tensor, int], Tensor]:
    """KL of the answers [sequences, length, vocabulary] (log) to those of the model as it is now."""

    def loss(logits: Tensor, first: int) -> Tensor:
        before = reference[first : first + len(logits)]
        return functional.kl_div(logits.log_softmax(-1), before, reduction="sum", log_target=True)

    return loss
