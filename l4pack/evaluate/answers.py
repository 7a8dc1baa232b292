"""What a model answers: its last hidden states and its head, wherever they are kept."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from l4pack.model.tensors import canonical_naming
from l4pack.stream.hidden import Rows
from l4pack.stream.lanes import Model


class Answers(Protocol):
    """Logits of row r and token v are `normed(r) @ head(v)`."""

    @property
    def vocabulary(self) -> int:
        """Tokens the model knows."""
        ...

    def normed(self, rows: Tensor) -> Tensor:
        """float32 [rows, hidden] as the head sees them, of the given rows."""
        ...

    def head(self, tokens: slice) -> Tensor:
        """float32 [tokens, hidden] of the head."""
        ...


class StreamAnswers:
    """The answers of a model that has walked through all its layers."""

    def __init__(self, model: Model, outputs: Rows) -> None:
        config = model.weights.checkpoint.config
        naming = canonical_naming(config)
        self._model, self._outputs = model, outputs
        self._norm = model.skeleton.norm(model.weights.tensor(naming.final_norm))
        tied = config.text.tie_word_embeddings
        self.head_name = naming.embedding if tied else naming.head_weight
        self.vocabulary = config.text.vocab_size

    @torch.inference_mode()
    def normed(self, rows: Tensor) -> Tensor:
        """float32 [rows, hidden], as in `Answers`; the norm is computed in the model's dtype."""
        hidden = self._outputs.data[rows].to(self._model.skeleton.device, self._model.skeleton.dtype)
        normed: Tensor = self._norm(hidden).float()
        return normed

    def head(self, tokens: slice) -> Tensor:
        """float32 [tokens, hidden], as in `Answers`."""
        return self._model.weights.rows(self.head_name, tokens).float()
