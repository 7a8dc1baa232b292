"""What the walk back is held against: torch's autograd through transformers' whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def moments(model: Any, sequences: Sequence[Sequence[int]], seed: int) -> list[Tensor]:
    """Of each layer, the sum over all tokens of g g^T, float64 [hidden, hidden]; g is the gradient at the layer's output.

    Labels are where each position's draw falls among the sums of its probabilities.
    """
    causal = _causal(model)
    return _summed(_gradients(causal, ids, own) for ids, own in _with_draws(sequences, seed))


def moments_layer_by_layer(
    model: Any, sequences: Sequence[Sequence[int]], seed: int, kept: torch.dtype
) -> list[Tensor]:
    """The same where each layer, and what comes after the last, is differentiated at inputs rounded to `kept`."""
    causal = _causal(model)
    return _summed(_gradients_at_kept(causal, ids, own, kept) for ids, own in _with_draws(sequences, seed))


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


def _loss(logits: Tensor, draws: Tensor) -> Tensor:
    sums = logits.detach().double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(sums, draws[:, None], right=True)[:, 0]
    return functional.cross_entropy(logits, labels, reduction="sum")


def _gradients(causal: Any, ids: Sequence[int], draws: Tensor) -> list[Tensor]:
    """Of one sequence at the outputs of each layer [tokens, hidden]."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for layer in causal.model.layers
    ]
    embedded = causal.get_input_embeddings()(torch.tensor([list(ids)])).detach().requires_grad_()
    logits = causal(inputs_embeds=embedded, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return [one[0] for one in torch.autograd.grad(_loss(logits, draws), outputs)]


def _gradients_at_kept(causal: Any, ids: Sequence[int], draws: Tensor, kept: torch.dtype) -> list[Tensor]:
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def keep(_module: Any, inputs: Any, given: dict[str, Any]) -> None:
        calls.append(((*inputs, given.pop("hidden_states", None))[0], given))

    layers = [*causal.model.layers, causal.model.norm]
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        causal(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    states = [inputs.to(kept).float().requires_grad_() for inputs, _ in calls]
    loss = _loss(causal.lm_head(causal.model.norm(states[-1]))[0], draws)
    found = [torch.autograd.grad(loss, states[-1])[0]]
    for layer, state, (_, given) in reversed(list(zip(layers[1:-1], states[1:-1], calls[1:-1], strict=True))):
        found.append(torch.autograd.grad(layer(state, **given), state, found[-1])[0])
    return [one[0] for one in reversed(found)]
