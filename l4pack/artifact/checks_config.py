"""Checks of config.json: the quantization stanza by compressed-tensors' own schema, and what the runtimes add to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from l4pack.artifact.declared import Declared
from l4pack.artifact.findings import Findings
from l4pack.artifact.kv_cache import cache_arguments
from l4pack.artifact.opened import Artifact
from l4pack.checkpoint.source import Checkpoint
from l4pack.model.config import MULTIMODAL, Llama4Config
from l4pack.recipe import KVStrategy

_STANZA = "quantization_config"
_SECTIONS = ("text_config", "vision_config")
# Spelled differently by different versions of transformers, or of the file and not of the model.
_RESPELLED = {
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "rope_scaling", "rope_theta", "rope_parameters",
    "quantization_config", "use_cache", "model_type",
}  # fmt: skip
_MUST_STAY = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")


def check_stanza(artifact: Artifact, declared: Declared, found: Findings) -> None:
    """The quantization_config as compressed-tensors, transformers and vLLM read it."""
    stanza = artifact.stanza
    if not stanza:
        found.error("stanza", "config.json", f"has no {_STANZA}: runtimes take the weights as unquantized")
        return
    if stanza.get("quant_method") != "compressed-tensors":
        found.error("stanza", f"{_STANZA}.quant_method", f"is {stanza.get('quant_method')!r}, not 'compressed-tensors'")
        return
    _check_schema(stanza, found)
    if stanza.get("quantization_status") != "compressed":
        message = f"is {stanza.get('quantization_status')!r}: transformers then runs on random weights without an error"
        found.error("stanza", f"{_STANZA}.quantization_status", message)
    if stanza.get("sparsity_config"):
        found.error("stanza", f"{_STANZA}.sparsity_config", "is not empty: vLLM refuses it")
    if stanza.get("transform_config"):
        found.warning("stanza", f"{_STANZA}.transform_config", "is not empty: weights are compared without it")
    _check_formats(stanza, declared, found)
    _check_actorder(stanza, found)
    _check_kv_cache(stanza, found)


def _check_schema(stanza: Mapping[str, Any], found: Findings) -> None:
    from compressed_tensors.quantization import QuantizationConfig  # brings torch along: only when needed

    try:
        QuantizationConfig.model_validate(dict(stanza))
    except (ValidationError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        for where, message in _messages(error):
            found.error("stanza", f"{_STANZA}.{where}".rstrip("."), message)


def _messages(error: Exception) -> Iterator[tuple[str, str]]:
    if not isinstance(error, ValidationError):
        yield "", str(error)
        return
    for item in error.errors()[:5]:
        yield ".".join(str(part) for part in item["loc"]), item["msg"]


def _check_formats(stanza: Mapping[str, Any], declared: Declared, found: Findings) -> None:
    formats = {group.format.name for group in declared.groups if group.format}
    expected = min(formats) if len(formats) == 1 else "mixed-precision"
    if formats and stanza.get("format") != expected:
        found.error("stanza", f"{_STANZA}.format", f"is {stanza.get('format')!r}, the groups make it '{expected}'")
    for group in declared.groups:
        if not group.targets:
            found.error("stanza", f"config_groups.{group.name}", "has no targets")


def _check_actorder(stanza: Mapping[str, Any], found: Findings) -> None:
    groups = stanza.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("actorder") in ("group", "dynamic", True):
            found.error("stanza", f"config_groups.{name}.weights.actorder", "is not static: vLLM refuses it")


def _check_kv_cache(stanza: Mapping[str, Any], found: Findings) -> None:
    scheme = stanza.get("kv_cache_scheme")
    if not isinstance(scheme, Mapping):
        return
    allowed = [cache_arguments(strategy) for strategy in KVStrategy]
    for key in allowed[0]:
        taken = list(dict.fromkeys(repr(arguments[key]) for arguments in allowed))
        if repr(scheme.get(key)) not in taken:
            where = f"{_STANZA}.kv_cache_scheme.{key}"
            found.error("stanza", where, f"is {scheme.get(key)!r}, vLLM takes {' or '.join(taken)} only")


def check_config(artifact: Artifact, found: Findings) -> None:
    """What config.json must have whatever it was made from."""
    raw = artifact.config.raw
    architectures = raw.get("architectures") or []
    multimodal = raw.get("model_type") == MULTIMODAL
    if multimodal and raw.get("vision_config") is None:
        found.error("config", "vision_config", "is missing: transformers would build a vision tower of another size")
    wanted = "Llama4ForConditionalGeneration" if multimodal else "Llama4ForCausalLM"
    if architectures != [wanted]:
        found.error("config", "architectures", f"is {architectures}, model_type {raw.get('model_type')} needs {wanted}")


def check_config_kept(artifact: Artifact, source: Checkpoint, found: Findings) -> None:
    """Nothing that config.json of the source says may be lost or changed."""
    mine, theirs = artifact.config, source.config
    if mine.raw.get("model_type") != theirs.raw.get("model_type"):
        message = f"is {mine.raw.get('model_type')!r}, the source's is {theirs.raw.get('model_type')!r}"
        lost = "; the vision tower is lost" if theirs.vision is not None and mine.vision is None else ""
        found.error("config", "model_type", message + lost)
        return
    _check_keys("", mine.raw, theirs.raw, found)
    for section in _SECTIONS:
        if isinstance(theirs.raw.get(section), Mapping) and isinstance(mine.raw.get(section), Mapping):
            _check_keys(f"{section}.", mine.raw[section], theirs.raw[section], found)
    _check_numbers(mine, theirs, found)
    if mine.dtype != theirs.dtype:
        found.error("config", "dtype", f"is {mine.dtype}, the source's is {theirs.dtype}")


def _check_keys(prefix: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], found: Findings) -> None:
    for key, value in theirs.items():
        if key not in _RESPELLED and value is not None and key not in mine:
            level = found.error if isinstance(value, Mapping) or key in _MUST_STAY else found.warning
            level("config", f"{prefix}{key}", "is in the source's config.json and not here")
        elif key in _MUST_STAY and mine[key] != value:
            found.error("config", f"{prefix}{key}", f"is {mine[key]}, the source's is {value}")


def _check_numbers(mine: Llama4Config, theirs: Llama4Config, found: Findings) -> None:
    pairs = [("text_config", mine.text, theirs.text), ("vision_config", mine.vision, theirs.vision)]
    for section, new, old in pairs:
        if new is None or old is None:
            continue
        for key, value in old.model_dump().items():
            if new.model_dump()[key] != value and not (key.endswith("_listed")):
                found.error("config", f"{section}.{key}", f"is {new.model_dump()[key]}, the source's is {value}")
    for key in ("moe_layers", "rope_layers"):
        if getattr(mine.text, key) != getattr(theirs.text, key):
            found.error("config", f"text_config.{key}", "are other layers than the source's")
    if _rope(mine) != _rope(theirs):
        found.error("config", "text_config.rope_parameters", f"are {_rope(mine)}, the source's are {_rope(theirs)}")


def _rope(config: Llama4Config) -> dict[str, Any]:
    """Rotary numbers in one spelling, whichever transformers version wrote them."""
    text = config.raw.get("text_config") or config.raw
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    theta = rope.pop("rope_theta", None) or text.get("rope_theta") or 500000.0
    rope.pop("type", None)
    return {"rope_type": kind, "rope_theta": float(theta), **{key: rope[key] for key in sorted(rope)}}
