"""The record of an evaluation of a model as large as Maverick, with 128 experts in every one of 48 layers: made up."""

from __future__ import annotations

import random
from typing import Any

LAYERS, EXPERTS, TOKENS = 48, 128, 65_536


def large(record: dict[str, Any]) -> dict[str, Any]:
    """A real record with the layers of a large model in place of its own; the same every time."""
    chance = random.Random(4)
    layers = [_layer(number, chance) for number in range(LAYERS)]
    units = [(layer["layer"], expert) for layer in layers for expert in layer["experts"] if "error" in expert]
    worst = sorted(units, key=lambda unit: -unit[1]["error"])[:5]
    named = [
        {"layer": layer, "block": "routed_expert", "expert": one["expert"], "error": one["error"]}
        for layer, one in worst
    ]
    text = {**record["text"], "tokens": TOKENS, "sequences": 32, "sequence_length": 2048}
    return {**record, "layers": layers, "worst": named, "text": text, "tokens": TOKENS - 32}


def _layer(number: int, chance: random.Random) -> dict[str, Any]:
    popularity = [chance.lognormvariate(0, 1.6) for _ in range(EXPERTS)]
    tokens = [int(TOKENS * one / sum(popularity)) for one in popularity]
    level = 0.07 + 0.0008 * number
    moved = chance.randrange(100, 1500 + 40 * number)
    return {
        "layer": number,
        "residual_error": 0.004 * (number + 1) ** 0.8, "attention_error": 0.0,
        "shared_expert_error": level * chance.uniform(0.2, 0.3),
        "routed_expert_error": level,
        "routing_moved": moved, "routing_agreement": 1 - moved / TOKENS,
        "experts": [_expert(place, count, level, chance) for place, count in enumerate(tokens)],
    }  # fmt: skip


def _expert(place: int, tokens: int, level: float, chance: random.Random) -> dict[str, Any]:
    if not tokens:
        return {"expert": place, "tokens": 0}
    error = level * (1 + 3 / tokens**0.6) * chance.lognormvariate(0, 0.15 + 0.8 / tokens**0.5)
    return {"expert": place, "tokens": tokens, "error": error}
