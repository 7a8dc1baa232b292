"""`adapter_config.json` as peft writes it: what of it decides the merged weights, and what can't be merged, by name.

Source: peft `tuners/lora/config.py`; which pattern a module follows: `utils/other.py`, `get_pattern_key`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from l4pack.datafile import first_fault, parse_json, refuse_lfs_pointer
from l4pack.errors import SourceError

MAX_RANK = 4096
MAX_PATTERNS = 50_000
_LONGEST_PATTERN = 300
Number = TypeVar("Number", int, float)
Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]
Alpha = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
_MERGE = "merge it with peft's own merge_and_unload, and give the merged model"
# What says how an adapter was trained or is looked at, and nothing of the merged weights.
_NO_MATTER = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules", "exclude_modules",
    "lora_dropout", "modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying", "bias",
    "fan_in_fan_out", "unsloth_fixed", "tokenizer_class",
}  # fmt: skip
# Ways to begin that leave the base model's weights as they are; all others take a part out of them.
_INIT_THAT_KEEPS = ("gaussian", "eva", "orthogonal")
_SAYS = {
    "use_dora": "DoRA",
    "lora_bias": "biases beside its matrices (lora_bias)",
    "trainable_token_indices": "single trained tokens (trainable_token_indices)",
    "layer_replication": "layers repeated (layer_replication)",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "megatron_config": "Megatron's layers (megatron_config)",
}


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


class AdapterConfig(BaseModel):
    """The part of the configuration that decides the merged weights."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    base_model_name_or_path: str | None = None
    peft_version: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool = False
    rank_pattern: Annotated[dict[str, Rank], BeforeValidator(_none_is_empty)] = {}
    alpha_pattern: Annotated[dict[str, Alpha], BeforeValidator(_none_is_empty)] = {}
    target_parameters: list[str] | None = None

    def rank(self, module: str) -> int:
        """The rank of a module's matrices, by its full path."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the product of a module's matrices is multiplied by, as peft computes it in double precision."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_adapter_config(content: bytes, where: str) -> AdapterConfig:
    """Read an adapter_config.json. Raises SourceError naming what is wrong with it, or what can't be merged."""
    refuse_lfs_pointer(content, where)
    hint = "give a LoRA adapter as peft's save_pretrained writes it"
    try:
        raw = parse_json(content)
    except ValueError as error:
        raise SourceError(f"{where}: not JSON ({error})", hint=hint) from error
    if not isinstance(raw, dict):
        raise SourceError(f"{where}: not an object", hint=hint)
    if raw.get("peft_type") != "LORA":
        raise SourceError(f"{where}: peft_type is {_shown(raw.get('peft_type'))}, not LORA", hint=_MERGE)
    _refuse_what_differs(raw, where)
    try:
        config = AdapterConfig.model_validate(raw)
    except ValidationError as error:
        key, message = first_fault(error)
        raise SourceError(f"{where}: {key}: {message}", hint=hint) from None
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        _check_pattern(pattern, where)
    if len(config.rank_pattern) + len(config.alpha_pattern) > MAX_PATTERNS:
        raise SourceError(f"{where}: more than {MAX_PATTERNS:,} patterns are implausible", hint=hint)
    return config


def _refuse_what_differs(raw: Mapping[str, Any], where: str) -> None:
    """Raise SourceError for a key that asks for more than W + scale * B A."""
    for key, what in _SAYS.items():
        if raw.get(key):
            raise SourceError(f"{where}: the adapter has {what}, which l4pack does not merge", hint=_MERGE)
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _INIT_THAT_KEEPS:
        raise SourceError(
            f"{where}: init_lora_weights is {_shown(start)}, which takes a part out of the base model's weights",
            hint="save it as an ordinary LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    known = {*AdapterConfig.model_fields, *_NO_MATTER, *_SAYS, "init_lora_weights"}
    for key in sorted(set(raw) - known):
        if raw[key]:  # what a newer peft adds is off by default
            raise SourceError(
                f"{where}: {key[:80]!a} is {_shown(raw[key])}, which l4pack does not know, and may not leave out",
                hint=_MERGE,
            )


def _shown(value: Any) -> str:
    return ascii(value)[:80]


def _by_pattern(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    for pattern, value in patterns.items():
        if pattern == module or re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


_PATTERN = re.compile(r"[\w.\\\[\]|()?^$:*+-]*", re.ASCII)
_REPEATED = re.compile(r"[*+]")


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse a pattern that is no regular expression, or one that could take for ever to match."""
    try:
        re.compile(rf"(.*\.)?({pattern})$")
        plain = len(pattern) <= _LONGEST_PATTERN and _PATTERN.fullmatch(pattern) is not None
    except (re.error, RecursionError, OverflowError):
        plain = False
    if not plain or len(_REPEATED.findall(pattern)) > 3 or re.search(r"\)[*+?]", pattern):
        raise SourceError(
            f"{where}: the pattern {_shown(pattern)} is not one that l4pack follows",
            hint="write each module's path out in rank_pattern and alpha_pattern",
        )
