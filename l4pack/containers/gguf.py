"""GGUF, the file that llama.cpp loads: names of tensors, and the bytes before the first of them.

Names and types are gguf-py's own (`gguf.TENSOR_NAMES`, `GGMLQuantizationType`), and so are the header's bytes. Tensors
follow it in the order of the header, each from a multiple of 32 bytes on, so every byte's place is known before the
first is written. Parts of a large file are called and filled as llama.cpp's own `gguf-split` does it.
Which tensor is which: llama.cpp `src/models/llama4.cpp` and, of the vision tower, `tools/mtmd/clip.cpp`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFWriter

from l4pack.checkpoint.shards import FilePlace, Shard, Sized
from l4pack.model import parts
from l4pack.model.tensors import Role

logging.getLogger("gguf").setLevel(logging.ERROR)  # it warns of templates that it reads rightly

SUFFIX = ".gguf"
ARCHITECTURE = "llama4"

_OF_TEXT: Mapping[tuple[Role, str], MODEL_TENSOR] = {
    (Role.EMBEDDING, parts.EMBEDDING): MODEL_TENSOR.TOKEN_EMBD,
    (Role.LM_HEAD, parts.HEAD): MODEL_TENSOR.OUTPUT,
    (Role.NORM, parts.FINAL_NORM): MODEL_TENSOR.OUTPUT_NORM,
    (Role.NORM, parts.INPUT_NORM): MODEL_TENSOR.ATTN_NORM,
    (Role.NORM, parts.MLP_NORM): MODEL_TENSOR.FFN_NORM,
    (Role.ROUTER, parts.ROUTER): MODEL_TENSOR.FFN_GATE_INP,
    (Role.ATTENTION, parts.QUERY): MODEL_TENSOR.ATTN_Q,
    (Role.ATTENTION, parts.KEY): MODEL_TENSOR.ATTN_K,
    (Role.ATTENTION, parts.VALUE): MODEL_TENSOR.ATTN_V,
    (Role.ATTENTION, parts.OUTPUT): MODEL_TENSOR.ATTN_OUT,
    (Role.DENSE_MLP, parts.GATE): MODEL_TENSOR.FFN_GATE,
    (Role.DENSE_MLP, parts.UP): MODEL_TENSOR.FFN_UP,
    (Role.DENSE_MLP, parts.DOWN): MODEL_TENSOR.FFN_DOWN,
    (Role.SHARED_EXPERT, parts.GATE): MODEL_TENSOR.FFN_GATE_SHEXP,
    (Role.SHARED_EXPERT, parts.UP): MODEL_TENSOR.FFN_UP_SHEXP,
    (Role.SHARED_EXPERT, parts.DOWN): MODEL_TENSOR.FFN_DOWN_SHEXP,
    (Role.ROUTED_EXPERT, parts.GATE): MODEL_TENSOR.FFN_GATE_EXP,
    (Role.ROUTED_EXPERT, parts.UP): MODEL_TENSOR.FFN_UP_EXP,
    (Role.ROUTED_EXPERT, parts.DOWN): MODEL_TENSOR.FFN_DOWN_EXP,
}
WIDE = (Role.NORM, Role.ROUTER)
"""Roles whose tensors llama.cpp wants in F32, which has every number of the others."""


def text_name(role: Role, part: str, layer: int | None) -> str:
    """The name of a tensor of the text model: the experts of a layer are one."""
    return f"{TENSOR_NAMES[_OF_TEXT[role, part]].format(bid=layer)}.{parts.WEIGHT}"


def rope_factors_name() -> str:
    """The name of the divisors of rotary frequencies, where the model scales them."""
    return f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.{parts.WEIGHT}"


def lay_out(
    tensors: Sequence[Sized], stem: str, architecture: str, limit: int, describe: Callable[[GGUFWriter], None]
) -> tuple[list[Shard], dict[str, FilePlace]]:
    """The files that hold the tensors, of at most `limit` bytes of tensors (0: one file), and each tensor's place.

    `describe` writes keys and values, which all go into the first file.
    """
    with tempfile.TemporaryDirectory(prefix="l4pack-") as folder:
        path = Path(folder) / f"{stem}{SUFFIX}"
        writer = GGUFWriter(path, architecture, split_max_size=limit)
        describe(writer)
        for tensor in tensors:
            kind = GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        shards, places = [], {}
        for file, held in zip(writer.format_shard_names(path), writer.tensors, strict=True):
            start = GGUFWriter.ggml_pad(file.stat().st_size, writer.data_alignment)
            prefix = file.read_bytes().ljust(start, b"\0")
            for name, info in held.items():
                places[name] = FilePlace(file.name, start, info.nbytes)
                start += GGUFWriter.ggml_pad(info.nbytes, writer.data_alignment)
            shards.append(Shard(file.name, prefix, start, tuple(held)))
    return shards, places
