"""A Llama 4 `config.json`, read without transformers: old and new spellings, and the defaults transformers fills in.

Field names and defaults are those of transformers' `Llama4TextConfig` and `Llama4VisionConfig`; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from l4pack.datafile import first_fault, parse_json, refuse_lfs_pointer
from l4pack.errors import SourceError
from l4pack.resources import data_text

MULTIMODAL, TEXT_ONLY = "llama4", "llama4_text"
CONFIG_NAME = "config.json"
STANZA_KEYS = ("quantization_config", "compression_config")  # where a section states its quantization; an older name
SECTIONS = ("text_config", "vision_config")
MAX_CONFIG_BYTES = 4 * 1024**2
_THETA = {"text_config": 500000.0, "vision_config": 10000.0}  # transformers' defaults
MAX_EXPERTS = 100_000  # in all layers; Maverick has 6,144
SectionT = TypeVar("SectionT", bound=BaseModel)

# A null here says something; elsewhere it stands for the default.
_NULLABLE = ("attention_chunk_size",)

# Bounds that any real model keeps, so that a hostile config can't ask for a billion names.
SmallCount = Annotated[int, Field(gt=0, le=65536)]
Width = Annotated[int, Field(gt=0, le=16_777_216)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class TextConfig(_Section):
    """The language model's numbers."""

    vocab_size: Width = 202048
    hidden_size: Width = 5120
    intermediate_size: Width = 8192
    intermediate_size_mlp: Width = 16384
    num_hidden_layers: Annotated[int, Field(gt=0, le=1024)] = 48
    num_attention_heads: SmallCount = 40
    num_key_value_heads: SmallCount = 8
    head_dim: SmallCount = 128
    num_local_experts: Annotated[int, Field(gt=0, le=4096)] = 16
    num_experts_per_tok: SmallCount = 1
    moe_layers_listed: list[int] | None = Field(default=None, validation_alias=AliasChoices("moe_layers"))
    interleave_moe_layer_step: SmallCount = 1
    no_rope_layers_listed: list[int] | None = Field(default=None, validation_alias=AliasChoices("no_rope_layers"))
    no_rope_layer_interval: SmallCount = 4
    attention_chunk_size: Width | None = 8192
    max_position_embeddings: int = Field(default=131072, gt=0)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_qk_norm: bool = True
    attn_temperature_tuning: bool | int = True
    rms_norm_eps: float = 1e-5

    @cached_property
    def moe_layers(self) -> frozenset[int]:
        """Indices of the layers with routed experts."""
        if self.moe_layers_listed is not None:
            return frozenset(self.moe_layers_listed)
        step = self.interleave_moe_layer_step
        return frozenset(range(step - 1, self.num_hidden_layers, step))

    @cached_property
    def rope_layers(self) -> frozenset[int]:
        """Indices of the layers with rotary positions and chunked attention.

        `no_rope_layers` is named the wrong way round: 1 means the layer HAS rotary positions. An empty list counts
        as absent, as in transformers.
        """
        count = self.num_hidden_layers
        flags = self.no_rope_layers_listed or [int((i + 1) % self.no_rope_layer_interval != 0) for i in range(count)]
        return frozenset(i for i, flag in enumerate(flags[:count]) if flag)


class VisionConfig(_Section):
    """The vision tower's numbers. transformers' defaults are not Scout's values: real configs list all of them."""

    hidden_size: Width = 768
    num_hidden_layers: Annotated[int, Field(gt=0, le=1024)] = 34
    num_attention_heads: SmallCount = 16
    num_channels: SmallCount = 3
    intermediate_size: Width = 5632
    vision_output_dim: Width = 7680
    image_size: SmallCount = 448
    patch_size: SmallCount = 14
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: Width = 4096
    projector_output_dim: Width = 4096

    @property
    def patches(self) -> int:
        """Patches of one tile, without the class token."""
        return (self.image_size // self.patch_size) ** 2


class Llama4Config(BaseModel):
    """A whole configuration: the text model, the vision tower if there is one, and the JSON it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: TextConfig
    vision: VisionConfig | None
    dtype: str | None
    raw: dict[str, Any]

    @property
    def quantized(self) -> bool:
        """Whether the checkpoint says that it is quantized already, as a whole or in a section."""
        sections = (self.raw, *(self.raw.get(section) for section in SECTIONS))
        return any(_stated(section) for section in sections if isinstance(section, Mapping))

    @property
    def text_raw(self) -> Mapping[str, Any]:
        """The text model's section of the JSON, which is all of it for a text model alone."""
        return self.raw if self.raw.get("model_type") == TEXT_ONLY else self.raw.get("text_config") or {}

    @property
    def stanza(self) -> Mapping[str, Any]:
        """What it states of its quantization as a whole; empty when it states nothing."""
        stated = _stated(self.raw)
        return stated if isinstance(stated, Mapping) else {}


def _stated(section: Mapping[str, Any]) -> Any:
    return next((section[key] for key in STANZA_KEYS if section.get(key)), None)


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> Llama4Config:
    """Read a `config.json` object. Raises SourceError naming the key when it is not Llama 4 or has a wrong value."""
    kind = raw.get("model_type")
    if kind not in (MULTIMODAL, TEXT_ONLY):
        raise SourceError(
            f"{where}: model_type is {kind!r}, not a Llama 4 model",
            hint=f"l4pack reads model_type '{MULTIMODAL}' or '{TEXT_ONLY}'",
        )
    text = _section(raw, where, "text_config") if kind == MULTIMODAL else raw
    vision = _section(raw, where, "vision_config") if kind == MULTIMODAL else None
    config = Llama4Config(
        text=_validated(TextConfig, text, f"{where}: text_config" if kind == MULTIMODAL else where),
        vision=None if vision is None else _validated(VisionConfig, vision, f"{where}: vision_config"),
        dtype=_dtype(raw, text),
        raw=dict(raw),
    )
    _check(config, where)
    return config


def load_config(path: Path) -> Llama4Config:
    """Read a `config.json` file. Raises SourceError."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SourceError(f"{path}: larger than any config.json", hint="point at a Llama 4 checkpoint folder")
        content = path.read_bytes()
        refuse_lfs_pointer(content, str(path))
        raw = parse_json(content)
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair can't be written again
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", hint="point at a folder with a config.json") from error
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error})", hint="download config.json again") from error
    return parse_config(_mapping(raw, str(path), "the file"), str(path))


def rope_numbers(raw: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Rotary numbers in one spelling, whichever transformers version wrote them."""
    text = raw.get(section) or (raw if section == "text_config" else {})
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    theta = rope.pop("rope_theta", None) or text.get("rope_theta") or _THETA[section]
    rope.pop("type", None)
    return {"rope_type": kind, "rope_theta": theta, **{key: rope[key] for key in sorted(rope)}}


def with_dtype(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A `config.json` object that says `dtype` where it said float32, in its sections too."""
    changed: dict[str, Any] = {}
    for key, value in raw.items():
        if key in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") == "float32":
            changed[key] = dtype
        else:
            changed[key] = with_dtype(value, dtype) if key.endswith("_config") and isinstance(value, Mapping) else value
    return changed


KNOWN_MODELS = ("llama-4-scout", "llama-4-maverick")


def known_config(name: str) -> Llama4Config:
    """The configuration of a model of KNOWN_MODELS, from data shipped with the package."""
    return parse_config(json.loads(data_text("model", "configs", f"{name}.json")), name)


def _section(raw: Mapping[str, Any], where: str, key: str) -> Mapping[str, Any]:
    """A section of the configuration; transformers fills one that is absent with its defaults."""
    return _mapping({} if raw.get(key) is None else raw[key], where, key)


def _mapping(value: Any, where: str, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SourceError(f"{where}: {key} is not an object", hint="download config.json again")
    return value


def _dtype(raw: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    for section in (raw, text):
        value = section.get("dtype") or section.get("torch_dtype")
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return None


def _validated(kind: type[SectionT], values: Mapping[str, Any], where: str) -> SectionT:
    try:
        return kind.model_validate(
            {key: value for key, value in values.items() if value is not None or key in _NULLABLE}
        )
    except ValidationError as error:
        key, message = first_fault(error)
        raise SourceError(f"{where}.{key}: {message}", hint="compare with the model's original config.json") from None


def _check(config: Llama4Config, where: str) -> None:
    text = config.text
    if text.num_hidden_layers * text.num_local_experts > MAX_EXPERTS:
        raise SourceError(
            f"{where}: {text.num_hidden_layers} layers of {text.num_local_experts} experts are no real model",
            hint="compare with the model's original config.json",
        )
    layers = text.moe_layers_listed or []
    if any(not 0 <= layer < text.num_hidden_layers for layer in layers):
        raise SourceError(
            f"{where}: moe_layers names a layer outside 0..{text.num_hidden_layers - 1}",
            hint="compare with the model's original config.json",
        )
    if text.num_attention_heads % text.num_key_value_heads:
        raise SourceError(
            f"{where}: num_attention_heads {text.num_attention_heads} is no multiple of num_key_value_heads",
            hint="compare with the model's original config.json",
        )
