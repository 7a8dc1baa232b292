"""What runtimes take for granted of every Llama 4: a model that differs would be answered wrongly, and nobody told."""

from __future__ import annotations

from collections.abc import Sequence

from l4pack.errors import UsageError
from l4pack.model.config import Llama4Config

PERIOD, ACTIVATION = 4, "silu"
Rule = tuple[bool, str, str]
"""Whether a configuration breaks it, the key that says so, and the rule in words."""


def refuse_others(config: Llama4Config, runtime: str, rules: Sequence[Rule]) -> None:
    """Raise UsageError naming a key that breaks one of the `rules` of a runtime, or one that all of them have."""
    text = config.text
    pattern = frozenset(layer for layer in range(text.num_hidden_layers) if (layer + 1) % PERIOD)
    step = text.interleave_moe_layer_step
    experts = frozenset(range(step - 1, text.num_hidden_layers, step))
    common: list[Rule] = [
        (text.rope_layers != pattern, "no_rope_layers", f"every {PERIOD}th layer goes without rotary positions"),
        (text.moe_layers != experts, "moe_layers", "experts lie in every layer, or in every n-th"),
        (config.text_raw.get("hidden_act", ACTIVATION) != ACTIVATION, "hidden_act", f"MLPs use {ACTIVATION}"),
    ]
    for broken, key, rule in (*common, *rules):
        if broken:
            raise UsageError(
                f"config.json: {key} is not what {runtime} takes for granted of Llama 4: {rule}",
                hint="it would answer wrongly and say nothing; such a model can't be exported to it",
            )
