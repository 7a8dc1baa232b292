"""How far a model's activations stick out: what large trained models have much of, and small stand-ins hardly any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Llama4ForConditionalGeneration

HIDDEN, ATTENTION, MLP = "hidden states", "attention's inputs", "MLPs' inputs"


def outliers(folder: Path, sequences: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """By place, the worst layer's figures on these tokens; see `figures`."""
    model: Any = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[tuple[str, int], list[Tensor]] = {}
    for number, layer in enumerate(model.language_model.model.layers):
        for place, module in ((HIDDEN, layer), (ATTENTION, layer.self_attn), (MLP, layer.feed_forward)):
            _watch(module, seen.setdefault((place, number), []))
    with torch.no_grad():
        for tokens in sequences:
            model(input_ids=torch.tensor([list(tokens)]))
    found = {key: figures(torch.cat(parts)) for key, parts in seen.items()}
    return {place: _worst([one for key, one in found.items() if key[0] == place]) for place in (HIDDEN, ATTENTION, MLP)}


def _watch(module: Any, kept: list[Tensor]) -> None:
    """Keep the module's inputs, [tokens, hidden]."""

    def keep(_: Any, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        states = given[0] if given else named["hidden_states"]
        kept.append(states.detach().reshape(-1, states.shape[-1]))

    module.register_forward_pre_hook(keep, with_kwargs=True)


def figures(states: Tensor) -> dict[str, float]:
    """Of states [tokens, channels]: the largest value over the median one, the largest over the rms of its channel
    (in the channel where that is most), and the loudest channel's rms over the median channel's."""
    size, rms = states.abs(), states.square().mean(0).sqrt().clamp_min(1e-30)
    return {
        "max_over_median": float(size.max() / size.median()),
        "max_over_channel_rms": float((size.max(0).values / rms).max()),
        "channel_rms_over_median": float(rms.max() / rms.median()),
    }


def _worst(layers: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(max(layer[key] for layer in layers), 1) for key in layers[0]}
