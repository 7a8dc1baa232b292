"""Meta's `params.json` as transformers' configuration.

What a key stands for and its default are those of llama-models (`models/llama4/args.py`, and `model.py` and `moe.py` for
the widths that are computed of it); what transformers calls it is in its `convert_llama4_weights_to_hf.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from l4pack.datafile import first_fault, parse_json, refuse_lfs_pointer
from l4pack.errors import SourceError
from l4pack.model.config import (
    MULTIMODAL,
    TEXT_ONLY,
    Llama4Config,
    SmallCount,
    Width,
    known_config,
    parse_config,
    rope_numbers,
)
from l4pack.model.original import Widths

PARAMS_NAME = "params.json"
MAX_PARAMS_BYTES = 1_000_000
BASE_CONTEXT = 262_144  # what base models state; params.json says nothing of it
_FACTOR, _HIGH_FREQUENCY = 16.0, 1.0  # where scaled rotary positions are used and their numbers are not given
_HINT = "compare with the params.json that Meta published"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Size(_Part):
    height: SmallCount
    width: SmallCount


class _Vision(_Part):
    image_size: _Size
    patch_size: _Size
    dim: Width
    n_layers: Annotated[int, Field(gt=0, le=1024)]
    n_heads: SmallCount
    mlp_ratio: float = Field(gt=0, le=1024)
    output_dim: Width
    pixel_shuffle_ratio: float = Field(gt=0, le=1)


class _Experts(_Part):
    num_experts: Annotated[int, Field(gt=0, le=4096)]
    top_k: SmallCount = 1
    interleave_moe_layer_step: SmallCount = 1


class Params(_Part):
    """What the file says, by Meta's names."""

    dim: Width
    n_layers: Annotated[int, Field(gt=0, le=1024)]
    n_heads: SmallCount
    n_kv_heads: SmallCount | None = None
    head_dim: SmallCount | None = None
    vocab_size: int = -1
    multiple_of: Width = 256
    ffn_dim_multiplier: float | None = Field(default=None, gt=0, le=1024)
    norm_eps: float = 1e-5
    attention_chunk_size: Width | None = None
    rope_theta: float = 500000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_high_freq_factor: float | None = None
    nope_layer_interval: SmallCount | None = None
    use_qk_norm: bool = False
    attn_temperature_tuning: bool | None = None
    floor_scale: float | None = None
    attn_scale: float | None = None
    vision_args: _Vision | None = None
    moe_args: _Experts | None = None
    quantization_args: dict[str, Any] | None = None
    lora_args: dict[str, Any] | None = None


def parse_params(raw: bytes, where: str) -> Params:
    """Read a `params.json`. Raises SourceError naming the key."""
    refuse_lfs_pointer(raw, where)
    try:
        value = parse_json(raw)
        params = Params.model_validate(value.get("model", value))
    except ValidationError as error:
        key, message = first_fault(error)
        raise SourceError(f"{where}: {key}: {message}", hint=_HINT) from None
    except (ValueError, AttributeError) as error:
        raise SourceError(f"{where}: not a JSON object ({error})", hint="download it again") from error
    for key in ("quantization_args", "lora_args"):
        if any((getattr(params, key) or {}).values()):
            raise SourceError(
                f"{where}: {key} is set, and l4pack starts from Meta's BF16 release", hint="take the unquantized one"
            )
    vision = params.vision_args
    if vision is not None and any(size.height != size.width for size in (vision.image_size, vision.patch_size)):
        raise SourceError(f"{where}: vision_args has images or patches that are not square", hint=_HINT)
    return params


def load_params(path: Path) -> Params:
    """Read the file. Raises SourceError."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_PARAMS_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", hint=f"point at a folder with {PARAMS_NAME}") from error
    if len(raw) > MAX_PARAMS_BYTES:
        raise SourceError(f"{path}: larger than any {PARAMS_NAME}", hint="download it again")
    return parse_params(raw, str(path))


def configuration(params: Params, found: Widths, dtype: str) -> dict[str, Any]:
    """`config.json` as transformers writes it for the same model; `dtype` is torch's name of it.

    What Meta's file leaves open is as in Meta's release of the model on the Hub: ids of special tokens where the
    vocabulary is Llama 4's, temperature tuning, and the base models' context. Raises SourceError where the vocabulary
    of `params.json` is another than the weights'.
    """
    vocabulary = found.vocabulary or params.vocab_size
    if params.vocab_size not in (-1, vocabulary):
        raise SourceError(
            f"{PARAMS_NAME}: vocab_size is {params.vocab_size:,}, the shards' head has {vocabulary:,} rows",
            hint="are all shards there, and of this model?",
        )
    like = known_config("llama-4-scout").raw
    special = vocabulary == like["text_config"]["vocab_size"]
    text = _text(params, found, vocabulary, like["text_config"])
    if not special:
        text = {key: value for key, value in text.items() if not key.endswith("_token_id")}
    if params.vision_args is None:
        return {**text, "architectures": ["Llama4ForCausalLM"], "model_type": TEXT_ONLY, "torch_dtype": dtype}
    top = {key: value for key, value in like.items() if special or not key.endswith("_token_index")}
    return {
        **top,
        "model_type": MULTIMODAL,
        "text_config": {**text, "torch_dtype": dtype},
        "torch_dtype": dtype,
        "vision_config": _vision(params.vision_args, like["vision_config"]),
    }


def _text(params: Params, found: Widths, vocabulary: int, like: Mapping[str, Any]) -> dict[str, Any]:
    interval, experts = params.nope_layer_interval, params.moe_args
    rope = {
        "factor": params.rope_scaling_factor or _FACTOR,
        "high_freq_factor": params.rope_high_freq_factor or _HIGH_FREQUENCY,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    given = {key: getattr(params, key) for key in ("attn_temperature_tuning", "floor_scale", "attn_scale")}
    dense = found.dense or _dense_width(params)
    return {
        **like,
        **{key: value for key, value in given.items() if value is not None},
        "attention_chunk_size": params.attention_chunk_size,
        "head_dim": params.head_dim or params.dim // params.n_heads,
        "hidden_size": params.dim,
        "intermediate_size": found.experts or dense,
        "intermediate_size_mlp": dense,
        "max_position_embeddings": BASE_CONTEXT,
        "no_rope_layers": [int(interval is None or (i + 1) % interval != 0) for i in range(params.n_layers)],
        "num_attention_heads": params.n_heads,
        "num_hidden_layers": params.n_layers,
        "num_key_value_heads": params.n_kv_heads or params.n_heads,
        "num_local_experts": 1 if experts is None else experts.num_experts,
        "num_experts_per_tok": 1 if experts is None else experts.top_k,
        "interleave_moe_layer_step": 1 if experts is None else experts.interleave_moe_layer_step,
        **({"moe_layers": []} if experts is None else {}),
        "rms_norm_eps": params.norm_eps,
        "rope_scaling": rope if params.use_scaled_rope else None,
        "rope_theta": params.rope_theta,
        "use_qk_norm": params.use_qk_norm,
        "vocab_size": vocabulary,
    }


def _dense_width(params: Params) -> int:
    """The inner width of a dense layer, of which a model of expert layers alone has none: computed as Meta's code does."""
    inner = int((params.ffn_dim_multiplier or 1.0) * int(8 * params.dim / 3))
    return -(-inner // params.multiple_of) * params.multiple_of


def _vision(vision: _Vision, like: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **like,
        "hidden_size": vision.dim,
        "image_size": vision.image_size.height,
        "intermediate_size": int(vision.mlp_ratio * vision.dim),
        "num_attention_heads": vision.n_heads,
        "num_hidden_layers": vision.n_layers,
        "patch_size": vision.patch_size.height,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "projector_input_dim": vision.output_dim,
        "projector_output_dim": vision.output_dim,
        "vision_output_dim": vision.output_dim,
    }


_SAID = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rope_layers", "moe_layers", "attention_chunk_size", "use_qk_norm", "rms_norm_eps",
)  # fmt: skip
_SAID_OF_EXPERTS = ("num_local_experts", "num_experts_per_tok", "intermediate_size")


def refuse_other_model(config: Llama4Config, params: Params, derived: Mapping[str, Any], where: str) -> None:
    """Raise SourceError where a whole configuration says something else than `params.json` and the shards do."""
    ours = parse_config(derived)
    keys = (*_SAID, *(_SAID_OF_EXPERTS if params.moe_args else ()))
    pairs = {key: (getattr(config.text, key), getattr(ours.text, key)) for key in keys}
    mine, theirs = (rope_numbers(raw, "text_config") for raw in (derived, config.raw))
    known = {"rope_theta", "rope_type"} | ({"factor"} if params.rope_scaling_factor else set())
    known |= {"high_freq_factor"} if params.rope_high_freq_factor else set()
    pairs |= {key: (theirs.get(key), mine.get(key)) for key in sorted(known)}
    pairs["vision_config"] = config.vision, ours.vision
    for key, (stated, true) in pairs.items():
        if stated != true:
            shown = [value if isinstance(value, (int, float, str)) else "another" for value in (stated, true)]
            raise SourceError(
                f"{where}: {key} is {shown[0]}, {PARAMS_NAME} and the shards make it {shown[1]}",
                hint="give --companions the Hub's repository of the same model",
            )
