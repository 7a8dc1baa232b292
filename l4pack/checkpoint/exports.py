"""Checkpoints as tools leave them: adapters, unmerged LoRA, stale statements, tied heads, towers that were dropped.

Each is either put right where runtimes make the same of it, with a note for the plan, or refused with what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from l4pack.checkpoint.header import TensorEntry
from l4pack.errors import SourceError
from l4pack.model import parts
from l4pack.model.config import SECTIONS, STANZA_KEYS, Llama4Config, parse_config
from l4pack.model.names import of_vision
from l4pack.model.tensors import Catalogue, Role
from l4pack.quant.dtypes import FLOATS

WEIGHT_DTYPES: tuple[str, ...] = tuple(FLOATS)
SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_MAX_ADAPTER_CONFIG = 1_000_000
_QUANTIZED = re.compile(
    r"(^|[._])(packed|scales?|scale_inv|zero_point|zeros|qzeros|qweight|g_idx|absmax|quant_map|SCB|quant_state\..+)$"
)
_UNMERGED = re.compile(r"(^|\.)(lora_[A-Za-z_]+|base_layer|modules_to_save)\.|^base_model\.model\.")
_MERGE = "merge it first: peft's PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload(), then save_pretrained"
# safetensors files that tools leave beside a model's weights.
_NO_WEIGHTS = re.compile(r"(adapter|consolidated|optim|scheduler|ema|lora|pytorch_lora|rng_state|training)[\w.\-]*")
_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".gguf", ".ckpt")


def single_weight_file(names: Collection[str], where: str) -> str:
    """The one safetensors file of a checkpoint without an index. Raises SourceError when there is none, or no telling."""
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    weights = [name for name in found if not _NO_WEIGHTS.fullmatch(name)]
    if SINGLE_NAME in weights:
        return SINGLE_NAME
    if len(weights) > 1:
        index = f"{SINGLE_NAME}.index.json"
        refuse_other_indexes(names, where, index)
        raise SourceError(f"{where} has {len(weights)} shards but no {index}", hint=f"download {index}")
    if weights:
        return weights[0]
    refuse_adapter(names, where)
    raise SourceError(f"{where} holds no safetensors files", hint=_instead(names))


def refuse_other_indexes(names: Collection[str], where: str, index: str) -> None:
    """Raise SourceError when the indexes that are there are of variants: no runtime takes one unasked."""
    others = sorted(name for name in names if name.endswith(".safetensors.index.json") and "/" not in name)
    if others:
        raise SourceError(
            f"{where} has {' and '.join(others[:3])}, and no {index}: runtimes read the one of that name",
            hint=f"rename the index of the model you mean: {others[0]} to {index}",
        )


def why_missing(missing: Sequence[str], weight_map: Mapping[str, str], names: Collection[str]) -> SourceError:
    """The error for shards that the index names and that are not there."""
    shards = set(weight_map.values())
    others = sorted(name for name in names if name.endswith(".safetensors") and not _NO_WEIGHTS.fullmatch(name))
    told = f"{len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}"
    if len(missing) == len(shards) and others:
        return SourceError(
            f"the index is not of the shards that are here ({others[0]}): {told}",
            hint=f"replace {SINGLE_NAME}.index.json by that of these shards, or download the shards it names",
        )
    return SourceError(told, hint="download the missing shards")


def _instead(names: Collection[str]) -> str:
    """What to do with the weights that are there instead."""
    capitals = next((name for name in sorted(names) if name.lower().endswith(".safetensors") and "/" not in name), None)
    if capitals is not None and not capitals.endswith(".safetensors"):
        return f"rename {capitals} so that it ends in .safetensors"
    if any(name.endswith(_OTHER_WEIGHTS) for name in names):
        return "l4pack reads safetensors only: load the model with transformers and save it with save_pretrained"
    return "l4pack reads safetensors checkpoints only"


def refuse_two_models(names: Collection[str], weight_map: Mapping[str, str], where: str) -> None:
    """Raise SourceError when a whole model lies beside an index of another: runtimes don't agree which one it is."""
    if SINGLE_NAME in names and SINGLE_NAME not in weight_map.values():
        raise SourceError(
            f"{where} holds {SINGLE_NAME} beside an index of other shards: transformers reads the one, vLLM the others",
            hint=f"move {SINGLE_NAME}, or the index and its shards, out of the folder",
        )


def refuse_adapter(names: Collection[str], where: str, config: bytes = b"") -> None:
    """Raise SourceError for files that are a LoRA adapter and no model; `config` is its adapter_config.json."""
    if ADAPTER_CONFIG in names:
        base = _base_model(config)
        raise SourceError(
            f"{where} is a LoRA adapter{f' of {base}' if base else ''}, not a model: the base model's weights are missing",
            hint=f"name the base model as the source, and add --lora {where}",
        )


def _base_model(config: bytes) -> str:
    try:
        base = json.loads(config)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return base if isinstance(base, str) and base.isprintable() and len(base) <= 200 else ""


def adapter_config(folder: Path) -> bytes:
    """A folder's adapter_config.json, empty when it has none of a sane size."""
    path = folder / ADAPTER_CONFIG
    return path.read_bytes() if path.is_file() and path.stat().st_size <= _MAX_ADAPTER_CONFIG else b""


def refuse_unmerged(entries: Mapping[str, TensorEntry]) -> None:
    """Raise SourceError for the names that peft gives to weights with a LoRA beside them."""
    found = sorted(name for name in entries if _UNMERGED.search(name))
    if found:
        first = next((name for name in found if "lora_" in name), found[0])
        raise SourceError(
            f"{len(found)} tensors are of a LoRA that was not merged, the first is {first} in {entries[first].file}",
            hint=_MERGE,
        )


def looks_quantized(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether any tensor has a quantized checkpoint's dtype or name."""
    return any(entry.dtype not in WEIGHT_DTYPES or _QUANTIZED.search(name) for name, entry in entries.items())


def without_stale_stanza(config: Llama4Config, entries: Mapping[str, TensorEntry]) -> tuple[Llama4Config, list[str]]:
    """A configuration without a statement about quantization that its tensors don't bear out, and a note if it had one."""
    if not config.quantized or looks_quantized(entries):
        return config, []
    note = "config.json says that it is quantized; none of its tensors is, so the statement is not carried over"
    return without_stanza(config), [note]


def without_stanza(config: Llama4Config) -> Llama4Config:
    """A configuration that says nothing of quantization, in no section."""
    raw = _without_stanzas(config.raw)
    for section in SECTIONS:
        if isinstance(raw.get(section), dict):
            raw[section] = _without_stanzas(raw[section])
    return parse_config(raw)


def _without_stanzas(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in STANZA_KEYS}


def with_stored_vocabulary(config: Llama4Config, entries: Mapping[str, TensorEntry]) -> tuple[Llama4Config, list[str]]:
    """A configuration whose vocabulary is as large as embedding and head are, and a note if it said otherwise.

    Added tokens resize the two; not every tool says so in config.json, from which runtimes make the model. Raises
    SourceError where embedding and head have different numbers of rows.
    """
    rows = {
        entry.name: entry.shape[0]
        for name, entry in entries.items()
        for part in (parts.EMBEDDING, parts.HEAD)
        if f".{name}".endswith(f".{part}.{parts.WEIGHT}") and entry.shape[1:] == (config.text.hidden_size,)
    }
    if len(set(rows.values())) > 1:
        told = " and ".join(f"{name} has {count:,} rows" for name, count in rows.items())
        raise SourceError(
            f"{told}: embedding and head must know the same tokens",
            hint="load it with transformers, call resize_token_embeddings with the larger number, and save it again",
        )
    stored = next(iter(rows.values()), config.text.vocab_size)
    if stored == config.text.vocab_size:
        return config, []
    note = f"config.json says vocab_size {config.text.vocab_size:,}, the embedding has {stored:,} rows: those are taken"
    return _with_vocabulary(config, stored), [f"{note}, and the artifact's config.json says so"]


def _with_vocabulary(config: Llama4Config, size: int) -> Llama4Config:
    raw = dict(config.raw)
    if config.text_raw is config.raw or "vocab_size" in raw:
        raw["vocab_size"] = size
    if config.text_raw is not config.raw:
        raw["text_config"] = {**config.text_raw, "vocab_size": size}
    return parse_config(raw)


def without_tied_head(
    config: Llama4Config, entries: Mapping[str, TensorEntry]
) -> tuple[Mapping[str, TensorEntry], TensorEntry | None]:
    """Tensors without a stored head that is tied to the embedding, and that head.

    Runtimes take the embedding for it. That the two are equal is checked by `check_tied_head`, which reads them.
    """
    heads = [entry for name, entry in entries.items() if f".{name}".endswith(f".{parts.HEAD}.{parts.WEIGHT}")]
    text = config.text
    tied = text.tie_word_embeddings and len(heads) == 1 and heads[0].dtype in WEIGHT_DTYPES
    if not tied or heads[0].shape != (text.vocab_size, text.hidden_size):
        return entries, None
    return {name: entry for name, entry in entries.items() if entry is not heads[0]}, heads[0]


def why_incomplete(layout: Catalogue, missing: Collection[str], entries: Mapping[str, TensorEntry]) -> SourceError:
    """The error for tensors that config.json implies and that are not there; never empty."""
    roles = {layout.by_name[name].role for name in missing}
    vision = {spec.name for spec in layout.tensors if spec.role in (Role.VISION, Role.PROJECTOR)}
    if roles <= {Role.VISION, Role.PROJECTOR} and vision.isdisjoint(entries):
        return SourceError(
            f"config.json describes a vision tower, and the weights have none ({len(missing)} tensors): "
            "transformers would make up a random one, vLLM does not load it",
            hint="add the tower's shards; or, for a text model, make text_config the whole config.json, with model_type "
            "llama4_text and architectures [Llama4ForCausalLM]",
        )
    if roles == {Role.LM_HEAD}:
        return SourceError(
            f"{min(missing)} is missing, and config.json does not tie it to the embedding",
            hint="set tie_word_embeddings to true in the text_config if the model ties them, or download it again",
        )
    return SourceError(
        f"{len(missing)} tensors that config.json implies are missing, the first is {next(iter(missing))}",
        hint="download the checkpoint again, or check that config.json belongs to it",
    )


def why_unknown(config: Llama4Config, unknown: Collection[str], entries: Mapping[str, TensorEntry]) -> SourceError:
    """The error for tensors that config.json has no place for; never empty."""
    first = min(unknown)
    told = f"{len(unknown)} tensors are not part of Llama 4, the first is {first} in {entries[first].file}"
    if config.vision is None and all(map(of_vision, unknown)):
        return SourceError(
            f"{len(unknown)} tensors are of a vision tower, and config.json is that of a text model ({first})",
            hint="take the config.json of the whole model (model_type llama4), or remove the tower's tensors",
        )
    if looks_quantized({name: entries[name] for name in unknown}):
        return SourceError(told, hint="start from the original, unquantized checkpoint")
    hint = "l4pack leaves nothing behind silently: remove them, or check that config.json belongs to the weights"
    return SourceError(told, hint=hint)
