"""What the walk back is held against: torch's autograd through transformers' whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def moments(model: Any, sequences: Sequence[Sequence[int]], seed: int) -> list[Tensor]:
    """Of each layer, the sum over all tokens of g g^T, float64 [hidden, hidden]; g is the gradient at the layer's output.

    Labels are where each position's draw falls among the sums of its probabilities. The routers' margins are in the loss, see
    `margin_weights`.
    """
    causal = _causal(model)
    weights = _of_sequences(margin_weights(_logits(causal, sequences, None), seed, _chosen(causal)), sequences)
    return _summed(
        _gradients(causal, ids, own, weights[number]) for number, (ids, own) in enumerate(_with_draws(sequences, seed))
    )


def moments_layer_by_layer(
    model: Any, sequences: Sequence[Sequence[int]], seed: int, kept: torch.dtype
) -> list[Tensor]:
    """The same where each layer, and what comes after the last, is differentiated at inputs rounded to `kept`."""
    causal = _causal(model)
    weights = _of_sequences(margin_weights(_logits(causal, sequences, kept), seed, _chosen(causal)), sequences)
    return _summed(
        _gradients_at_kept(causal, ids, own, kept, weights[number])
        for number, (ids, own) in enumerate(_with_draws(sequences, seed))
    )


def margin_weights(logits: Mapping[int, Tensor], seed: int, chosen: int) -> dict[int, list[float]]:
    """By layer, what each token's margin counts in the loss, one number after the other: 0.3 times a sign, times the
    deviation of the logistic distribution at the margin over its width, a fifth of the mean margin."""
    found = {}
    for layer, rows in logits.items():
        margins = [
            ordered[chosen - 1] - ordered[chosen] for ordered in (sorted(row, reverse=True) for row in rows.tolist())
        ]
        width = sum(margins) / len(margins) / 5
        signs = torch.randint(0, 2, (len(rows),), generator=torch.Generator().manual_seed(seed + 1 + layer)).tolist()
        ahead = [1 / (1 + math.exp(-margin / width)) for margin in margins]
        found[layer] = [
            0.3 * (1 if sign else -1) * math.sqrt(share * (1 - share)) / width
            for sign, share in zip(signs, ahead, strict=True)
        ]
    return found


def _chosen(causal: Any) -> int:
    return int(causal.config.num_experts_per_tok)


def _of_sequences(weights: Mapping[int, list[float]], sequences: Sequence[Sequence[int]]) -> list[dict[int, Tensor]]:
    lengths = [len(ids) for ids in sequences]
    split = {layer: torch.split(torch.tensor(one), lengths) for layer, one in weights.items()}
    return [{layer: parts[number] for layer, parts in split.items()} for number in range(len(sequences))]


def _margins_counted(logits: Tensor, weights: Tensor, chosen: int) -> Tensor:
    ordered = logits.sort(dim=1, descending=True).values
    return ((ordered[:, chosen - 1] - ordered[:, chosen]) * weights).sum()


@contextmanager
def _routers(causal: Any) -> Iterator[dict[int, Tensor]]:
    """Logits [tokens, experts] of the last call, by layer."""
    found: dict[int, Tensor] = {}
    hooks = [
        layer.feed_forward.router.register_forward_hook(
            lambda _m, _i, output, number=number: found.update({number: output[1]})
        )
        for number, layer in enumerate(causal.model.layers)
        if hasattr(layer.feed_forward, "router")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _logits(causal: Any, sequences: Sequence[Sequence[int]], kept: torch.dtype | None) -> dict[int, Tensor]:
    """Of all sequences, float64; where each layer's inputs are rounded to `kept`, at those."""
    found: dict[int, list[Tensor]] = {}
    for ids in sequences:
        with _routers(causal) as now, torch.no_grad():
            if kept is None:
                causal(input_ids=torch.tensor([list(ids)]), use_cache=False)
            else:
                for layer, (inputs, given) in zip(causal.model.layers, _calls(causal, ids)[:-1], strict=True):
                    layer(inputs.to(kept).float(), **given)
            for layer, logits in now.items():
                found.setdefault(layer, []).append(logits.double())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def routed(model: Any, sequences: Sequence[Sequence[int]]) -> set[int]:
    """How many tokens of all sequences single experts get."""
    counts: dict[int, Tensor] = {}
    causal = _causal(model)

    def count(layer: int, output: Any) -> None:
        found = torch.bincount(output[1].argmax(1), minlength=output[1].shape[1])
        counts[layer] = counts.get(layer, torch.zeros_like(found)) + found

    hooks = [
        layer.feed_forward.router.register_forward_hook(lambda _m, _i, output, number=number: count(number, output))
        for number, layer in enumerate(causal.model.layers)
    ]
    with torch.no_grad():
        for ids in sequences:
            causal(input_ids=torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return {int(one) for found in counts.values() for one in found}


def _causal(model: Any) -> Any:
    return getattr(model, "language_model", model)


def _with_draws(sequences: Sequence[Sequence[int]], seed: int) -> list[tuple[Sequence[int], Tensor]]:
    draws = torch.rand(sum(map(len, sequences)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return list(zip(sequences, torch.split(draws, [len(ids) for ids in sequences]), strict=True))


def _summed(gradients: Iterable[list[Tensor]]) -> list[Tensor]:
    each = [[one.double().T @ one.double() for one in found] for found in gradients]
    return [torch.stack(outer).sum(0) for outer in zip(*each, strict=True)]


def _loss(logits: Tensor, draws: Tensor, weights: Tensor | None = None) -> Tensor:
    sums = logits.detach().double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(sums, draws[:, None], right=True)[:, 0]
    each = functional.cross_entropy(logits, labels, reduction="none")
    return each.sum() if weights is None else (each * weights).sum()


def _gradients(causal: Any, ids: Sequence[int], draws: Tensor, weights: Mapping[int, Tensor]) -> list[Tensor]:
    """Of one sequence at the outputs of each layer [tokens, hidden]."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for layer in causal.model.layers
    ]
    embedded = causal.get_input_embeddings()(torch.tensor([list(ids)])).detach().requires_grad_()
    with _routers(causal) as routers:
        loss = _loss(causal(inputs_embeds=embedded, use_cache=False).logits[0], draws)
    for hook in hooks:
        hook.remove()
    for layer, logits in routers.items():
        loss = loss + _margins_counted(logits, weights[layer], _chosen(causal))
    return [one[0] for one in torch.autograd.grad(loss, outputs)]


def _calls(causal: Any, ids: Sequence[int]) -> list[tuple[Tensor, dict[str, Any]]]:
    """What each layer is given, and what comes after the last."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def keep(_module: Any, inputs: Any, given: dict[str, Any]) -> None:
        calls.append(((*inputs, given.pop("hidden_states", None))[0], given))

    layers = [*causal.model.layers, causal.model.norm]
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        causal(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def _gradients_at_kept(
    causal: Any, ids: Sequence[int], draws: Tensor, kept: torch.dtype, weights: Mapping[int, Tensor]
) -> list[Tensor]:
    calls, numbers = _calls(causal, ids), range(1, len(causal.model.layers))
    states = [inputs.to(kept).float().requires_grad_() for inputs, _ in calls]
    loss = _loss(causal.lm_head(causal.model.norm(states[-1]))[0], draws)
    found = [torch.autograd.grad(loss, states[-1])[0]]
    for number in reversed(numbers):
        with _routers(causal) as routers:
            output = causal.model.layers[number](states[number], **calls[number][1])
        loss = (output * found[-1]).sum()
        if number in routers:
            loss = loss + _margins_counted(routers[number], weights[number], _chosen(causal))
        found.append(torch.autograd.grad(loss, states[number])[0])
    return [one[0] for one in reversed(found)]


Places = dict[tuple[str, int], list[Tensor]]


def slopes(
    model: Any, sequences: Sequence[Sequence[int]], scored: Tensor, seed: int, signs: Mapping[int, Tensor]
) -> Places:
    """At the outputs and the middle of each layer, by ("outputs" or "middle", layer): gradients [tokens, hidden] of all
    tokens, of the `scored` rows' cross-entropy on drawn labels, and of the sum of sign * margin / mean margin."""
    causal, found = _causal(model), dict[tuple[str, int], list[Tensor]]()
    means = {layer: margins.mean() for layer, margins in _margins(causal, sequences).items()}
    start = 0
    for ids, draws in _with_draws(sequences, seed):
        rows = slice(start, start + len(ids))
        start = rows.stop
        for place, pair in _both_gradients(causal, ids, draws, scored[rows], signs, means, rows).items():
            before = found.get(place, [gradient[:0] for gradient in pair])
            found[place] = [torch.cat(two) for two in zip(before, pair, strict=True)]
    return found


def _margins(causal: Any, sequences: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    parts: dict[int, list[Tensor]] = {}
    with torch.no_grad():
        for ids in sequences:
            for layer, margin in _watched(causal, causal.get_input_embeddings()(torch.tensor([list(ids)])))[2].items():
                parts.setdefault(layer, []).append(margin)
    return {layer: torch.cat(some) for layer, some in parts.items()}


def _watched(causal: Any, embedded: Tensor) -> tuple[Tensor, dict[tuple[str, int], Tensor], dict[int, Tensor]]:
    """Logits, what is added at each place, and margins [tokens] of the layers that have a router."""
    places: dict[tuple[str, int], Tensor] = {}
    margins: dict[int, Tensor] = {}

    def route(number: int, logits: Tensor, chosen: int) -> None:
        top = logits.sort(dim=1, descending=True).values
        if chosen < top.shape[1]:
            margins[number] = top[:, chosen - 1] - top[:, chosen]

    hooks = []
    for number, layer in enumerate(causal.model.layers):
        hooks.append(layer.register_forward_hook(lambda _m, _i, out, n=number: places.__setitem__(("outputs", n), out)))
        hooks.append(
            layer.self_attn.register_forward_hook(
                lambda _m, _i, out, n=number: places.__setitem__(("middle", n), out[0])
            )
        )
        if router := getattr(layer.feed_forward, "router", None):
            chosen = causal.config.get_text_config().num_experts_per_tok
            hooks.append(router.register_forward_hook(lambda _m, _i, out, n=number, k=chosen: route(n, out[1], k)))
    logits = causal(inputs_embeds=embedded, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, places, margins


def _both_gradients(
    causal: Any,
    ids: Sequence[int],
    draws: Tensor,
    scored: Tensor,
    signs: Mapping[int, Tensor],
    means: Mapping[int, Tensor],
    rows: slice,
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    embedded = causal.get_input_embeddings()(torch.tensor([list(ids)])).detach().requires_grad_()
    logits, places, margins = _watched(causal, embedded)
    order = list(places)
    parts = [(signs[layer][rows] * margin / means[layer]).sum() for layer, margin in margins.items()]
    losses = (_loss(logits, draws, scored.float()), sum(parts, 0.0 * logits.sum()))
    both = [torch.autograd.grad(loss, [places[key] for key in order], retain_graph=True) for loss in losses]
    return {
        key: (ours.reshape(len(ids), -1), theirs.reshape(len(ids), -1))
        for key, ours, theirs in zip(order, *both, strict=True)
    }
