"""Whether a model can be what its publisher says it was made from: Scout and Maverick are known by their shapes.

The name of another repository can't be checked; a card then says who declared it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from l4pack.artifact.manifest_schema import SourceRecord
from l4pack.checkpoint.source import HUB_ID
from l4pack.errors import LicenceError, UsageError
from l4pack.model.config import Llama4Config, known_config, parse_config
from l4pack.model.tensors import catalogue

_PUBLISHER = "meta-llama"
# The publisher's own repositories, and copies of them that others put up under the same name.
_FAMILIES = {
    "llama-4-scout": re.compile(r"Llama-4-Scout-17B-16E(-Instruct)?(-Original)?", re.IGNORECASE),
    "llama-4-maverick": re.compile(r"Llama-4-Maverick-17B-128E(-Instruct)?(-FP8)?(-Original)?", re.IGNORECASE),
}
_TITLES = {"llama-4-scout": "Llama 4 Scout", "llama-4-maverick": "Llama 4 Maverick"}
_SHAPE = (
    "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts", "tie_word_embeddings", "attention_bias",
)  # fmt: skip


def family_of(repository: str) -> str | None:
    """The known model whose name a repository bears, if it does."""
    owner, _, name = repository.rpartition("/")
    for family, pattern in _FAMILIES.items():
        stem = family.removeprefix("llama-4-")
        if pattern.fullmatch(name) or (owner == _PUBLISHER and stem in name.lower()):
            return family
    return None


def checked_base(base: str | None) -> str | None:
    """The name of a base model's repository. Raises UsageError where it is none."""
    if base is not None and (HUB_ID.fullmatch(base) is None or "@" in base):
        raise UsageError(f"'{base}' is not a repository's name", hint="write --base-model ORGANISATION/NAME")
    return base or None


def base_claim(base: str, source: SourceRecord, config: Mapping[str, Any]) -> str:
    """How sure it is that a model was made from repository `base`, in words for its card; empty when it was read there.

    Raises LicenceError when the name is that of a known model and the shapes are not.
    """
    family = family_of(base)
    if family is not None:
        _check_family(base, family, source, parse_config(config))
    if base == source.repository:
        return ""
    alike = f"; names and shapes of its tensors are those of {_TITLES[family]}" if family else ""
    if family and parse_config(config).text.vocab_size != known_config(family).text.vocab_size:
        alike += " but for the vocabulary"
    return f"declared by the publisher{alike}"


def _with_vocabulary(known: Llama4Config, size: int) -> Llama4Config:
    """A known model as it is after tokens were added to it or taken away."""
    return known.model_copy(update={"text": known.text.model_copy(update={"vocab_size": size})})


def _check_family(base: str, family: str, source: SourceRecord, config: Llama4Config) -> None:
    known = _with_vocabulary(known_config(family), config.text.vocab_size)
    whole, text = (catalogue(one, fused=True).parameters for one in (known, known.model_copy(update={"vision": None})))
    hint = "name the model it was made from with --base-model"
    if source.parameters not in (whole, text):
        raise LicenceError(
            f"this can't be made from {base}: that has {whole:,} parameters, the source of this artifact "
            f"had {source.parameters:,}",
            hint=hint,
        )
    ours, theirs = config.text.model_dump(), known.text.model_dump()
    odd = next((key for key in _SHAPE if ours[key] != theirs[key]), None)
    if odd is None and config.text.moe_layers != known.text.moe_layers:
        odd = "moe_layers"
    if odd is not None:
        raise LicenceError(f"this can't be made from {base}: its config.json has another {odd}", hint=hint)
