"""Both gradients that a walk back keeps of every layer are those of torch's autograd with the whole model loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gradients
import pytest
import torch
import whole_model
from streaming import JOB, stream_model, token_rows
from whole_model import one_thread  # noqa: F401

from l4pack.gradient.keep import GradientKeeper, LayerGradients, Place
from l4pack.gradient.walk import BackwardWalk
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.layer import Blocks

KINDS = {
    "scout": ("scout", {}),
    "maverick": ("maverick", {}),
    "two-experts": ("scout", {"num_experts_per_tok": 2}),
    "every-expert": ("text", {"num_experts_per_tok": 4}),
    "dense": ("maverick", {"moe_layers": [], "interleave_moe_layer_step": 9}),
}
SEED = 3
EXACT = 2**-8  # of BF16


def packed_rows() -> Packed:
    """Not all of them scored, and none at the end of two sequences."""
    rows = token_rows()
    return Packed(
        [
            TokenSequence(tuple(ids), score_from=1 + number, unscored=frozenset(ids[-3:] if number % 2 else ids[:3]))
            for number, ids in enumerate(rows)
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_autograds(checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Blocks are smaller than sequences, chunks and experts' rows."""
    name, changes = KINDS[kind]
    source, packed = checkpoint(name, **changes), packed_rows()
    model = stream_model(source)
    found = LayerGradients(tmp_path, model.skeleton.config, packed.rows)
    keeper = GradientKeeper(found, packed, SEED)
    with model.weights:
        blocks = Blocks(attention=24, rows=50)
        BackwardWalk(model, packed, tmp_path, JOB, SEED, keeper, kept=torch.float32, blocks=blocks).walk()
    layers = model.skeleton.text.num_hidden_layers
    scored = torch.zeros(packed.rows)
    scored[packed.scored_rows()] = 1
    signs = {layer: keeper.signs(layer) for layer in range(layers)}
    ids = [sequence.tokens for sequence in packed.sequences]
    wanted = gradients.slopes(whole_model.load(source), ids, scored, SEED, signs)
    assert found.streams == (("answers",) if kind == "dense" else ("answers", "routers"))
    for layer in range(layers):
        for place in Place:
            with found.of(layer, place) as ours:
                for one, other in zip(ours, wanted[place.value, layer], strict=False):
                    off = (one.data.float() - other).norm() / other.norm().clamp(min=1e-9)
                    assert float(off) < EXACT, (layer, place)
    assert {path.name for path in tmp_path.glob("*.hidden")} == {
        span.file for layer in range(layers) for span in found.spans(layer)
    }


def test_signs_are_drawn_where_they_matter(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """By layer; rows after the last one scored in their sequence have none."""
    config, packed = stream_model(checkpoint("scout")).skeleton.config, packed_rows()
    keeper = GradientKeeper(LayerGradients(tmp_path, config, packed.rows), packed, SEED)
    first, second = keeper.signs(0), keeper.signs(1)
    assert set(first.tolist()) == {-1.0, 0.0, 1.0}
    assert not torch.equal(first, second)
    matter = torch.zeros(packed.rows, dtype=torch.bool)
    for start, stop in zip(packed.starts, packed.starts[1:], strict=False):
        rows = packed.scored_rows()
        within = rows[(rows >= start) & (rows < stop)]
        if len(within):
            matter[start : int(within.max()) + 1] = True
    assert torch.equal(first != 0, matter)
