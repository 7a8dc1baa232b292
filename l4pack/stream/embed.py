"""The first hidden states: token embeddings, with image features at the image tokens."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from l4pack.errors import UsageError
from l4pack.model.parts import VISION_LAYERS
from l4pack.model.tensors import canonical_naming
from l4pack.stream.hidden import Packed, Rows, TokenSequence
from l4pack.stream.modules import Skeleton, upstream_config
from l4pack.stream.rows import IMAGE_TILES
from l4pack.stream.weights import Weights

ROWS_AT_ONCE = 4096  # 84 MB at a width of 5,120: less than any unit that is loaded later


@torch.inference_mode()
def embed(weights: Weights, skeleton: Skeleton, packed: Packed, target: Rows) -> None:
    """Write every row's embedding. Raises UsageError for a token the model has not, or images that don't fit."""
    name = canonical_naming(weights.checkpoint.config).embedding
    tokens = torch.tensor([token for item in packed.sequences for token in item.tokens], dtype=torch.long)
    distinct, place = torch.unique(tokens, return_inverse=True)
    size = weights.checkpoint.config.text.vocab_size
    if int(distinct[0]) < 0 or int(distinct[-1]) >= size:
        raise UsageError(
            f"the text has token {int(distinct[-1])}, the model's vocabulary has {size}",
            hint="the tokenizer belongs to another model",
        )
    for first in range(0, len(distinct), ROWS_AT_ONCE):
        some = distinct[first : first + ROWS_AT_ONCE]
        table = torch.cat([weights.rows(name, slice(start, stop)).cpu() for start, stop in _runs(some)])
        rows = ((place >= first) & (place < first + len(some))).nonzero().reshape(-1)
        for at in rows.split(ROWS_AT_ONCE):
            target.data[at] = table[place[at] - first].to(target.data)
            target.release()
    for start, item in zip(packed.starts, packed.sequences, strict=False):
        if item.images is not None:
            pixels = item.images.pixel_values()
            _embed_images(weights, skeleton, item, pixels, target.data[start : start + len(item.tokens)])


def _runs(numbers: Tensor) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, past the last)."""
    breaks = (numbers.diff() != 1).nonzero().reshape(-1) + 1
    edges = [0, *breaks.tolist(), len(numbers)]
    return [(int(numbers[a]), int(numbers[b - 1]) + 1) for a, b in itertools.pairwise(edges)]


def _embed_images(weights: Weights, skeleton: Skeleton, item: TokenSequence, pixels: Tensor, rows: Tensor) -> None:
    config = upstream_config(weights.checkpoint.config)
    at = torch.tensor(item.tokens) == getattr(config, "image_token_id", -1)
    features = image_features(weights, skeleton, pixels, config)
    if int(at.sum()) != len(features):
        raise UsageError(
            f"{int(at.sum())} image tokens stand for {len(features)} image features",
            hint="render the images with the model's own processor",
        )
    rows[at] = features.to(rows)


def image_features(weights: Weights, skeleton: Skeleton, pixel_values: Tensor, config: Any) -> Tensor:
    """Projected features [tiles * features, hidden] of pixels [tiles, channels, height, width], on the CPU.

    transformers' vision model runs, a few tiles at a time; the weights of each of its layers are there only while that
    layer runs.
    """
    from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector, Llama4VisionModel

    if weights.checkpoint.config.vision is None:
        raise UsageError(f"{weights.checkpoint.name} reads no images", hint="evaluate it with text alone")
    naming = canonical_naming(weights.checkpoint.config)
    with torch.device("meta"):
        model, projector = Llama4VisionModel(config.vision_config).eval(), Llama4MultiModalProjector(config)
    rotary = type(model.rotary_embedding)
    model.rotary_embedding = rotary(config.vision_config)
    _fill(weights, projector, naming.projector)
    _fill(weights, model, naming.vision, leave=f"{VISION_LAYERS}.")
    for number, layer in enumerate(model.model.layers):
        _fill_while_running(weights, layer, f"{naming.vision}{VISION_LAYERS}.{number}.")
    found = []
    for tiles in torch.split(pixel_values, IMAGE_TILES):
        pixels = tiles.to(skeleton.device, skeleton.dtype)
        seen = model(pixel_values=pixels, return_dict=True).last_hidden_state
        found.append(projector(seen.reshape(-1, seen.shape[-1])).cpu())
    return torch.cat(found)


def _fill(weights: Weights, module: nn.Module, prefix: str, leave: str | None = None) -> None:
    for name, _ in list(module.named_parameters()):
        if leave is None or not name.startswith(leave):
            _put(module, name, weights.tensor(prefix + name))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))


def _fill_while_running(weights: Weights, layer: nn.Module, prefix: str) -> None:
    def drop(module: nn.Module, *_: object) -> None:
        for name, parameter in list(module.named_parameters()):
            _put(module, name, torch.empty_like(parameter, device="meta"))

    layer.register_forward_pre_hook(lambda module, _: _fill(weights, module, prefix))
    layer.register_forward_hook(drop)
