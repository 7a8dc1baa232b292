"""The vision tower in a GGUF file of its own (`mmproj`), as llama.cpp's multimodal part loads it.

llama.cpp `tools/mtmd/clip.cpp` and `models/llama4.cpp`. The second norm of a layer is `ln2`: the official converter gives
it another name, which that loader takes for no norm at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import MODEL_TENSOR, TENSOR_NAMES, GGUFWriter

from l4pack.checkpoint.companions import PROCESSORS
from l4pack.datafile import read_json
from l4pack.errors import UsageError
from l4pack.model import parts
from l4pack.model.config import Llama4Config
from l4pack.model.names import split_suffix
from l4pack.model.tensors import Naming

ARCHITECTURE = "clip"
FAULT = (
    "images: llama.cpp puts the tokens of a Llama 4 image in another order (ggml-org/llama.cpp#13282), so what it says of "
    "them is worse than the model's; text is not concerned"
)
_KIND, _MIDDLE, _EPS, _MAX_BYTES = "llama4", [0.5, 0.5, 0.5], 1e-5, 1024**2
_AGAIN = "download the processor's file again"
_BLOCKS = f"{parts.VISION_LAYERS}."
_OUTER: Mapping[str, tuple[MODEL_TENSOR, int]] = {
    parts.CLASS_EMBEDDING: (MODEL_TENSOR.V_ENC_EMBD_CLS, 0),
    parts.POSITIONS: (MODEL_TENSOR.V_ENC_EMBD_POS, 0),
    f"{parts.PATCHES}.linear": (MODEL_TENSOR.V_ENC_EMBD_PATCH, 0),
    parts.NORM_BEFORE: (MODEL_TENSOR.V_PRE_NORM, 0),
    parts.NORM_AFTER: (MODEL_TENSOR.V_POST_NORM, 0),
    f"{parts.ADAPTER}.{parts.VISION_MLP}.{parts.VISION_UP}": (MODEL_TENSOR.V_MMPROJ_MLP, 1),
    f"{parts.ADAPTER}.{parts.VISION_MLP}.{parts.VISION_DOWN}": (MODEL_TENSOR.V_MMPROJ_MLP, 2),
    parts.PROJECTION: (MODEL_TENSOR.V_MMPROJ_FC, 0),
}
_IN_BLOCK: Mapping[str, MODEL_TENSOR] = {
    f"{parts.ATTENTION}.{parts.QUERY}": MODEL_TENSOR.V_ENC_ATTN_Q,
    f"{parts.ATTENTION}.{parts.KEY}": MODEL_TENSOR.V_ENC_ATTN_K,
    f"{parts.ATTENTION}.{parts.VALUE}": MODEL_TENSOR.V_ENC_ATTN_V,
    f"{parts.ATTENTION}.{parts.OUTPUT}": MODEL_TENSOR.V_ENC_ATTN_O,
    parts.INPUT_NORM: MODEL_TENSOR.V_ENC_INPUT_NORM,
    parts.MLP_NORM: MODEL_TENSOR.V_ENC_POST_ATTN_NORM,
    f"{parts.VISION_MLP}.{parts.VISION_UP}": MODEL_TENSOR.V_ENC_FFN_UP,
    f"{parts.VISION_MLP}.{parts.VISION_DOWN}": MODEL_TENSOR.V_ENC_FFN_DOWN,
}
_EMBEDDINGS = (parts.CLASS_EMBEDDING, parts.POSITIONS, f"{parts.PATCHES}.linear")


def vision_name(name: str, naming: Naming) -> str:
    """The name of a tensor of the tower or the projector, from the one it has in an artifact."""
    module, suffix = split_suffix(_below(name, naming))
    if module.startswith(_BLOCKS):
        number, _, rest = module.removeprefix(_BLOCKS).partition(".")
        kind, block = _IN_BLOCK[rest], int(number)
    else:
        kind, block = _OUTER[module]
    base: str = TENSOR_NAMES[kind].format(bid=block)
    return base if module == parts.CLASS_EMBEDDING else f"{base}.{suffix or parts.WEIGHT}"


def is_wide(name: str, naming: Naming, dimensions: int) -> bool:
    """Whether llama.cpp adds a tensor to others rather than multiply with it, and wants it in F32."""
    return dimensions < 2 or split_suffix(_below(name, naming))[0] in _EMBEDDINGS


def describe_vision(writer: GGUFWriter, config: Llama4Config, folder: Path) -> None:
    """Write the keys of the tower's numbers, and of how a processor in the folder normalizes images."""
    vision, raw = config.vision, config.raw.get("vision_config") or {}
    assert vision is not None
    pixels = _processor(folder)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(_KIND)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_projection_dim(config.text.hidden_size)
    writer.add_vision_attention_layernorm_eps(float(raw.get("norm_eps", _EPS)))
    writer.add_vision_image_mean(_channels(pixels, "image_mean"))
    writer.add_vision_image_std(_channels(pixels, "image_std"))
    writer.add_vision_projector_scale_factor(round(1 / vision.pixel_shuffle_ratio))


def _below(name: str, naming: Naming) -> str:
    return name.removeprefix(naming.vision).removeprefix(naming.projector)


def _processor(folder: Path) -> dict[str, Any]:
    path = folder / PROCESSORS[0]
    return read_json(path, _MAX_BYTES, _AGAIN) if path.is_file() else {}


def _channels(pixels: Mapping[str, Any], key: str) -> list[float]:
    """A number a colour; those of Llama 4 where none are given. Raises UsageError for anything else."""
    found = pixels.get(key) or _MIDDLE
    if not isinstance(found, list) or len(found) != len(_MIDDLE) or not all(isinstance(one, float) for one in found):
        raise UsageError(f"{PROCESSORS[0]}: {key} is not a number for each colour", hint=_AGAIN)
    return found
