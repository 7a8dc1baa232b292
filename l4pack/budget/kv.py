"""Bytes of the KV cache on one GPU, by how a runtime keeps it.

A token of one layer takes `2 x kv_heads x head_dim x bytes`, with the heads split over tensor-parallel GPUs and repeated
once there are more GPUs than heads. NoPE layers see the whole context. Chunked layers see one chunk (8192 tokens), and a
runtime may forget the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from l4pack.budget.load import Setting
from l4pack.budget.runtimes import Runtime
from l4pack.errors import UsageError
from l4pack.model.config import TextConfig


@dataclass(frozen=True)
class StageCache:
    """What one pipeline stage keeps: `bytes_per_request` at the context, and bytes that are held back once."""

    bytes_per_request: int
    held_bytes: int

    def total(self, sequences: int) -> int:
        """Bytes for a number of sequences at the context."""
        return sequences * self.bytes_per_request + self.held_bytes


def token_bytes(text: TextConfig, setting: Setting) -> int:
    """Bytes of one token in one layer on one GPU."""
    heads = max(1, text.num_key_value_heads // setting.tp)
    return int(2 * heads * text.head_dim * setting.kv_bytes)


def kv_cache(text: TextConfig, setting: Setting, runtime: Runtime, layers: range) -> StageCache:
    """The KV cache of a stage's `layers`."""
    match runtime.kv:
        case "blocks":
            return _blocks(text, setting, runtime, layers)
        case "pools":
            return _pools(text, setting, runtime, layers)
        case "dynamic":
            return _dynamic(text, setting, layers)
        case "full":
            return StageCache(setting.context * len(layers) * token_bytes(text, setting), 0)
        case "llama.cpp" | "mlx":
            raise UsageError(f"{runtime.title} is budgeted for from its own files", hint="l4pack export makes them")


def layer_kinds(text: TextConfig, hybrid: bool) -> tuple[list[int], list[int]]:
    """Layers that keep the whole context, and layers that keep a chunk; where both kinds are there, only hybrid
    management tells them apart, and without it all keep everything."""
    every = list(range(text.num_hidden_layers))
    full = [layer for layer in every if layer not in text.rope_layers]
    if text.attention_chunk_size is None or (full and not hybrid):
        return every, []
    return full, [layer for layer in every if layer in text.rope_layers]


def groups(text: TextConfig, hybrid: bool) -> tuple[list[list[int]], list[list[int]]]:
    """vLLM's KV groups, full and chunked: equal in size, so that one block table entry costs the same in each.

    `_get_kv_cache_groups_uniform_page_size` in vLLM's `v1/core/kv_cache_planning.py`.
    """
    full, chunked = layer_kinds(text, hybrid)
    counts = [len(layers) for layers in (full, chunked) if layers]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return _split(full, size), _split(chunked, size)


def _split(layers: list[int], size: int) -> list[list[int]]:
    number = -(-len(layers) // size)
    return [layers[i::number] for i in range(number)]


def _blocks(text: TextConfig, setting: Setting, runtime: Runtime, layers: range) -> StageCache:
    """vLLM: every group takes blocks from one pool; a block holds 16 tokens of as many layers as the widest group has.

    Chunked layers are reserved one chunk and the tokens in flight, `(pp + 1) x max_num_batched_tokens` with asynchronous
    scheduling. One block stays unused (the null block).
    """
    full, chunked = groups(text, setting.hybrid)
    widest = max(sum(layer in layers for layer in group) for group in (*full, *chunked))
    block_bytes = widest * runtime.block_size * token_bytes(text, setting)
    in_flight = (setting.pp + 1) * setting.batched_tokens
    window = min((text.attention_chunk_size or 0) + in_flight, setting.context)
    per_request = len(full) * _ceil(setting.context, runtime.block_size) + len(chunked) * _ceil(
        window, runtime.block_size
    )
    return StageCache(per_request * block_bytes, block_bytes)


def _pools(text: TextConfig, setting: Setting, runtime: Runtime, layers: range) -> StageCache:
    """SGLang: chunked layers have a pool of their own, a fixed share of the full layers' tokens."""
    full, chunked = layer_kinds(text, setting.hybrid)
    share = sum(layer in layers for layer in full) + runtime.local_ratio * sum(layer in layers for layer in chunked)
    return StageCache(int(setting.context * share * token_bytes(text, setting)), 0)


def _dynamic(text: TextConfig, setting: Setting, layers: range) -> StageCache:
    """transformers: tensors that grow with the text, cut to one chunk in chunked layers; growing copies a layer's."""
    full, chunked = layer_kinds(text, setting.hybrid)
    chunk = min(text.attention_chunk_size or setting.context, setting.context)
    tokens = setting.context * sum(layer in layers for layer in full) + chunk * sum(
        layer in layers for layer in chunked
    )
    copy = setting.context if any(layer in layers for layer in full) else chunk
    return StageCache((tokens + copy) * token_bytes(text, setting), 0)


def _ceil(tokens: int, block: int) -> int:
    return -(-tokens // block)
