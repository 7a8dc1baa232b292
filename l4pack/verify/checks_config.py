"""Checks of config.json: the quantization stanza by compressed-tensors' own schema, and what the runtimes add to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from l4pack.artifact.kv_cache import cache_arguments
from l4pack.artifact.stanza import METHOD, format_of_groups, read_stanza
from l4pack.checkpoint.source import Checkpoint
from l4pack.formats.configuration import Activations, arguments, input_arguments
from l4pack.model.config import MULTIMODAL, SECTIONS, STANZA_KEYS, Llama4Config, rope_numbers
from l4pack.recipe import KVStrategy
from l4pack.verify.declared import Declared
from l4pack.verify.findings import Findings
from l4pack.verify.opened import OpenedArtifact
from l4pack.verify.own_stanza import is_own_stanza

_STANZA = STANZA_KEYS[0]
# transformers fills these in by the class that reads the section, whatever stands there.
_SECTION_TYPES = {("text_config", "model_type"), ("vision_config", "model_type")}
# Spelled differently by different versions of transformers, or of the file and not of the model; dtype and the rotary
# numbers are compared by what they mean.
_RESPELLED = {
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "rope_scaling", "rope_theta", "rope_parameters",
    "use_cache",
}  # fmt: skip
_ABSENT = object()


def check_stanza(artifact: OpenedArtifact, declared: Declared, found: Findings) -> None:
    """The quantization_config as compressed-tensors, transformers and vLLM read it."""
    stanza = artifact.stanza
    if not stanza:
        found.error("stanza", "config.json", f"has no {_STANZA}: runtimes take the weights as unquantized")
        return
    if stanza.get("quant_method") != METHOD:
        found.error("stanza", f"{_STANZA}.quant_method", f"is {stanza.get('quant_method')!r}, not '{METHOD}'")
        return
    if not is_own_stanza(stanza, declared):
        _check_schema(stanza, found)
    if stanza.get("quantization_status") != "compressed":
        message = f"is {stanza.get('quantization_status')!r}: transformers then runs on random weights without an error"
        found.error("stanza", f"{_STANZA}.quantization_status", message)
    if stanza.get("sparsity_config"):
        found.error("stanza", f"{_STANZA}.sparsity_config", "is not empty: vLLM refuses it")
    if stanza.get("transform_config"):
        found.warning("stanza", f"{_STANZA}.transform_config", "is not empty: weights are compared without it")
    _check_formats(stanza, declared, found)
    _check_arguments(stanza, found)
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
    expected = format_of_groups(formats)
    if formats and stanza.get("format") != expected:
        found.error("stanza", f"{_STANZA}.format", f"is {stanza.get('format')!r}, the groups make it '{expected}'")
    for group in declared.groups:
        if not group.targets:
            found.error("stanza", f"config_groups.{group.name}", "has no targets")


def _check_arguments(stanza: Mapping[str, Any], found: Findings) -> None:
    """What no runtime takes in a group, or takes for something else than its tensors hold."""
    for group in read_stanza(stanza).groups:
        where, weights = f"config_groups.{group.name}", group.weights
        if weights is not None:
            if weights.get("actorder") in ("group", "dynamic", True):
                found.error("stanza", f"{where}.weights.actorder", "is not static: vLLM refuses it")
            if weights.get("dynamic") not in (None, False):
                found.error("stanza", f"{where}.weights.dynamic", "weights in a file are quantized once: must be false")
        if group.outputs is not None:
            found.error("stanza", f"{where}.output_activations", "no runtime quantizes outputs: must be null")
        if group.inputs is not None:
            _check_inputs(f"{where}.input_activations", group.inputs, found)


def _check_inputs(where: str, inputs: Mapping[str, Any], found: Findings) -> None:
    """Every number of activation quantization is that of one of the ways runtimes have kernels for."""
    ways = [way for way in map(input_arguments, Activations) if way is not None]
    alike = [way for way in ways if way["strategy"] == inputs.get("strategy")]
    if not alike:
        taken = ", ".join(repr(way["strategy"]) for way in ways)
        found.error("stanza", f"{where}.strategy", f"is {inputs.get('strategy')!r}, runtimes take {taken}")
        return
    for key in ("type", "num_bits", "symmetric", "dynamic", "group_size", "block_structure", "actorder"):
        given = inputs.get(key, arguments()[key])
        if given != alike[0][key] or isinstance(given, bool) != isinstance(alike[0][key], bool):
            found.error("stanza", f"{where}.{key}", f"is {given!r}, runtimes take {alike[0][key]!r}")


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


def check_config(artifact: OpenedArtifact, found: Findings) -> None:
    """What config.json must have whatever it was made from."""
    raw = artifact.config.raw
    architectures = raw.get("architectures") or []
    multimodal = raw.get("model_type") == MULTIMODAL
    if multimodal and raw.get("vision_config") is None:
        found.error("config", "vision_config", "is missing: transformers would build a vision tower of another size")
    wanted = "Llama4ForConditionalGeneration" if multimodal else "Llama4ForCausalLM"
    if architectures != [wanted]:
        found.error("config", "architectures", f"is {architectures}, model_type {raw.get('model_type')} needs {wanted}")


def check_config_kept(artifact: OpenedArtifact, source: Checkpoint, found: Findings) -> None:
    """All of config.json but the stanza is the source's, as written or as transformers reads it."""
    mine, theirs = artifact.config, source.completed(artifact.config).config
    if mine.raw.get("model_type") != theirs.raw.get("model_type"):
        message = f"is {mine.raw.get('model_type')!r}, the source's is {theirs.raw.get('model_type')!r}"
        lost = "; the vision tower is lost" if theirs.vision is not None and mine.vision is None else ""
        found.error("config", "model_type", message + lost)
        return
    changes = list(_changes(_without_stanza(mine), _without_stanza(theirs)))
    read = _as_transformers_reads(mine.raw, theirs.raw) if changes else None
    for path, new, old in changes:
        respelled = path[-1] in _RESPELLED or (read is not None and _same_at(path, *read))
        if respelled and (path not in _SECTION_TYPES or _ABSENT in (new, old)):
            continue
        if new is _ABSENT:
            message = "is in the source's config.json and not here"
        elif old is _ABSENT:
            message = f"is {new!r:.60} and not in the source's config.json"
        else:
            message = f"is {new!r:.60}, the source's is {old!r:.60}"
        found.error("config", ".".join(path), message)
    if "compression_config" in mine.raw and "compression_config" not in theirs.raw:
        found.error(
            "config", "compression_config", "is not in the source's config.json: a runtime may take it for the stanza"
        )
    _check_meaning(mine, theirs, found)


def _check_meaning(mine: Llama4Config, theirs: Llama4Config, found: Findings) -> None:
    """What versions of transformers spell in different ways."""
    for section in ("text_config", "vision_config"):
        new, old = rope_numbers(mine.raw, section), rope_numbers(theirs.raw, section)
        if new != old:
            found.error("config", f"{section}.rope_parameters", f"are {new}, the source's are {old}")
    given = set(_dtypes(theirs.raw).values())
    for where, dtype in _dtypes(mine.raw).items():
        rounded = "float32" in given and dtype in ("bfloat16", "float16")
        if given and dtype not in given and not rounded and where != "dtype":
            found.error("config", where, f"is {dtype}, the source's config.json says {' and '.join(sorted(given))}")
    if mine.dtype != theirs.dtype and not (theirs.dtype == "float32" and mine.dtype in ("bfloat16", "float16")):
        found.error("config", "dtype", f"is {mine.dtype}, the source's is {theirs.dtype}")


def _dtypes(raw: Mapping[str, Any]) -> dict[str, str]:
    """Every dtype that a configuration states, by its key."""
    sections = {"": raw, **{f"{name}.": raw.get(name) for name in SECTIONS}}
    return {
        f"{section}{key}": str(values[key]).removeprefix("torch.")
        for section, values in sections.items()
        if isinstance(values, Mapping)
        for key in ("dtype", "torch_dtype")
        if values.get(key) is not None
    }


def _without_stanza(config: Llama4Config) -> dict[str, Any]:
    return {key: value for key, value in config.raw.items() if key not in STANZA_KEYS}


def _changes(new: Any, old: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every key at which two configurations differ, with both values."""
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _changes(new.get(key, _ABSENT), old.get(key, _ABSENT), (*path, str(key)))
    elif _written(new) != _written(old):
        yield path or ("",), new, old


def _written(value: Any) -> Any:
    """A value that equals another only if JSON would write both alike, but for 1 and 1.0."""
    if isinstance(value, list):
        return [_written(item) for item in value]
    return (isinstance(value, bool), value)


def _as_transformers_reads(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Both configurations with transformers' defaults and spelling; None where it can't read one."""
    from transformers import Llama4Config as Multimodal
    from transformers import Llama4TextConfig as TextOnly

    reader = Multimodal if mine.get("model_type") == MULTIMODAL else TextOnly
    try:
        new, old = (
            reader.from_dict({key: value for key, value in raw.items() if key not in STANZA_KEYS}).to_dict()
            for raw in (mine, theirs)
        )
    except Exception:  # whatever a strange value makes of it: then the files are compared as they are
        return None
    return new, old


def _same_at(path: tuple[str, ...], new: Any, old: Any) -> bool:
    """Whether two configurations both have a key, with the same value."""
    for key in path:
        if not (isinstance(new, Mapping) and isinstance(old, Mapping) and key in new and key in old):
            return False
        new, old = new[key], old[key]
    return not list(_changes(new, old))
