"""The walk back gives what torch's autograd gives with the whole model loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradients
import pytest
import torch
import whole_model
from streaming import JOB, stream_model, token_rows
from torch import Tensor
from whole_model import one_thread  # noqa: F401

from l4pack.gradient.moments import GradientMoments, MomentsKeeper
from l4pack.gradient.walk import BackwardWalk
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.layer import Blocks

KINDS = {
    "scout": ("scout", {}),
    "maverick": ("maverick", {}),
    "text": ("text", {}),
    "scout-without-norm": ("scout", {"use_qk_norm": False}),
    "maverick-with-norm": ("maverick", {"use_qk_norm": True}),
    "no-temperature": ("scout", {"attn_temperature_tuning": False}),
    "biased": ("scout", {"attention_bias": True}),
    "two-experts": ("scout", {"num_experts_per_tok": 2}),
    "tied": ("text", {"tie_word_embeddings": True}),
    "many-experts": ("scout", {"num_local_experts": 24}),
}
SEED = 3


def walked(source: Path, sequences: Sequence[Sequence[int]], work: Path, **options: Any) -> list[Tensor]:
    model = stream_model(source)
    packed = Packed([TokenSequence(tuple(ids)) for ids in sequences])
    with model.weights:
        found = GradientMoments(work, model.skeleton.text.hidden_size)
        BackwardWalk(model, packed, work, JOB, SEED, MomentsKeeper(found, SEED), **options).walk()
        return [found.of(layer) for layer in range(model.skeleton.text.num_hidden_layers)]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Relative to the largest entry: sums of float32 products."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, one.T)
        assert float((one.double() - other).abs().max() / other.abs().max()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_autograds(checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Blocks are smaller than sequences, chunks and experts' rows."""
    name, changes = KINDS[kind]
    source, sequences = checkpoint(name, **changes), token_rows()
    wanted = gradients.moments(whole_model.load(source), sequences, SEED)
    small = Blocks(attention=24, rows=50)
    assert_same(walked(source, sequences, tmp_path, kept=torch.float32, blocks=small), wanted, 2e-6)


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_inputs_are_kept_in_bfloat16(checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """The gradient is that of layers at the rounded inputs, and of answers to the rounded last states."""
    source, sequences = checkpoint(kind), token_rows()
    wanted = gradients.moments_layer_by_layer(whole_model.load(source), sequences, SEED, torch.bfloat16)
    assert_same(walked(source, sequences, tmp_path), wanted, 2e-6)


def test_few_tokens_reach_some_experts(checkpoint: Callable[..., Path]) -> None:
    """Of the many: none, and a single one."""
    name, changes = KINDS["many-experts"]
    counts = gradients.routed(whole_model.load(checkpoint(name, **changes)), token_rows())
    assert {0, 1} <= counts
