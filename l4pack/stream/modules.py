"""transformers' own Llama 4 modules, built without weights: attention, rotary positions, norms and MLPs are upstream's.

Only the mixture-of-experts block is not used as it is: upstream runs every expert on every token with zeroed inputs,
here `layer.LayerPass` gathers the rows that the router gave to an expert.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l4pack.errors import SourceError
from l4pack.model.config import MULTIMODAL, STANZA_KEYS, Llama4Config

if TYPE_CHECKING:
    from transformers import Llama4Config as UpstreamConfig
    from transformers import Llama4TextConfig


class Skeleton:
    """Makes the modules of one model, ready to be filled by `units.place`."""

    def __init__(self, config: Llama4Config, device: torch.device, dtype: torch.dtype) -> None:
        """Raises SourceError when transformers does not accept the configuration."""
        from transformers.models.llama4 import modeling_llama4

        self.config, self.device, self.dtype = config, device, dtype
        self.text = text_config(config)
        self._upstream = modeling_llama4
        self._rotary = modeling_llama4.Llama4TextRotaryEmbedding(self.text).to(device)

    def layer(self, index: int) -> Any:
        """A decoder layer on the meta device."""
        with torch.device("meta"):
            return self._upstream.Llama4TextDecoderLayer(self.text, index).eval()

    def mlp(self, dense: bool) -> Any:
        """A dense layer's MLP, or an expert's, on the meta device."""
        size = self.text.intermediate_size_mlp if dense else self.text.intermediate_size
        with torch.device("meta"):
            return self._upstream.Llama4TextMLP(self.text, intermediate_size=size).eval()

    def norm(self, weight: Tensor) -> Any:
        """The RMS norm before the head."""
        with torch.device("meta"):
            module = self._upstream.Llama4TextRMSNorm(self.text.hidden_size, eps=self.text.rms_norm_eps)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    def rotary(self, positions: Tensor) -> Tensor:
        """Complex rotary factors [batch, length, head_dim / 2] of integer positions [batch, length]."""
        example = torch.empty(0, dtype=self.dtype, device=self.device)
        factors: Tensor = self._rotary(example, positions.to(self.device))
        return factors


def upstream_config(config: Llama4Config) -> UpstreamConfig:
    """The configuration as transformers reads it. Raises SourceError."""
    from transformers import Llama4Config as Multimodal
    from transformers import Llama4TextConfig as TextOnly
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of values that Scout's own configuration has
    try:
        kind = Multimodal if config.raw.get("model_type") == MULTIMODAL else TextOnly
        raw: dict[str, Any] = {key: value for key, value in config.raw.items() if key not in STANZA_KEYS}
        return kind.from_dict(deepcopy(raw))  # it writes into what is nested, rope_scaling for one
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"transformers can't read the configuration: {reason}", hint="compare with the original config.json"
        ) from error
    finally:
        logging.set_verbosity(level)


def text_config(config: Llama4Config) -> Llama4TextConfig:
    """The language model's part, with attention that needs no mask where it is plainly causal."""
    text = upstream_config(config).get_text_config()
    text._attn_implementation = "sdpa"
    return text
