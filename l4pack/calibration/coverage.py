"""How many tokens each expert saw, and the gate on experts that saw none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from l4pack.errors import QualityError
from l4pack.model.config import Llama4Config

HINT = "give more --calibration-samples or a broader --calibration, or raise calibration.max_cold_experts in the recipe"


@dataclass
class Coverage:
    """Tokens by layer and expert; `max_cold` is the share of all routed experts that may see none."""

    experts: int
    max_cold: float
    tokens: dict[int, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Llama4Config, max_cold: float) -> Coverage:
        """Nothing seen yet."""
        return cls(len(config.text.moe_layers) * config.text.num_local_experts, max_cold)

    def add(self, layer: int, tokens: Sequence[int]) -> None:
        """Note the tokens of each expert of a layer."""
        self.tokens[layer] = tuple(tokens)

    @property
    def cold(self) -> list[tuple[int, int]]:
        """Layer and number of each expert that saw no token."""
        return [(layer, expert) for layer, counts in self.tokens.items() for expert, n in enumerate(counts) if n == 0]

    def check(self, hint: str = HINT) -> None:
        """Raise QualityError when more experts are cold than the gate allows."""
        cold = self.cold
        if len(cold) > self.max_cold * self.experts:
            layer, expert = cold[0]
            raise QualityError(
                f"{len(cold)} of {self.experts} experts saw no token (the first: layer {layer}, expert {expert}); "
                f"the gate is {self.max_cold:.1%}",
                hint=hint,
            )

    def record(self) -> dict[str, Any]:
        """As JSON: counts, and the tokens of every expert by layer."""
        return {
            "experts": self.experts,
            "cold_experts": len(self.cold),
            "cold": [{"layer": layer, "expert": expert} for layer, expert in self.cold],
            "layers": [{"layer": layer, "tokens": list(counts)} for layer, counts in self.tokens.items()],
        }
