"""A folder as transformers, vLLM and SGLang load it: safetensors files, their index, and config.json.

The names are those the reading side looks for (`checkpoint.source`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4pack.checkpoint.exports import SINGLE_NAME
from l4pack.checkpoint.header import DTYPE_BITS, LENGTH_BYTES
from l4pack.checkpoint.shards import FilePlace, Shard, Sized
from l4pack.checkpoint.source import INDEX_NAME
from l4pack.model.config import CONFIG_NAME, STANZA_KEYS

DEFAULT_SHARD_BYTES = 5_000_000_000
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class SafetensorsFolder:
    """The container: which files there are, what is in each, and what each weighs.

    `framework` stands in every file; transformers refuses files without it.
    """

    framework: str = "pt"

    single_name = SINGLE_NAME
    index_name = INDEX_NAME
    config_name = CONFIG_NAME

    def is_weights(self, file: str) -> bool:
        """Whether a file's name says that it holds tensors."""
        return file.endswith(_SUFFIX)

    def weight_bytes(self, folder: Path) -> int:
        """Bytes of the files with tensors; 0 where there is no such folder."""
        return sum(path.stat().st_size for path in folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else 0

    def lay_out(self, groups: Iterable[Sequence[Sized]], limit: int) -> tuple[list[Shard], dict[str, FilePlace]]:
        """Fill shards of at most `limit` bytes of tensors; a group (one module's tensors) is never split.

        Within a shard tensors are ordered by element size, largest first, as the safetensors library writes them, so
        that every tensor stays aligned to its elements.
        """
        filled: list[list[Sized]] = [[]]
        size = 0
        for group in groups:
            nbytes = sum(tensor.nbytes for tensor in group)
            if filled[-1] and size + nbytes > limit:
                filled.append([])
                size = 0
            filled[-1] += group
            size += nbytes
        shards, places = [], {}
        for number, tensors in enumerate(filled, start=1):
            file = SINGLE_NAME if len(filled) == 1 else f"model-{number:05d}-of-{len(filled):05d}{_SUFFIX}"
            shard, placed = _shard(file, tensors, self.framework)
            shards.append(shard)
            places.update(placed)
        return shards, places

    def index(self, shards: Sequence[Shard], total_bytes: int) -> bytes | None:
        """The bytes of the index, or None for a single file, which needs none."""
        if len(shards) == 1:
            return None
        weight_map = {name: shard.file for shard in shards for name in shard.tensors}
        value = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(value, indent=2) + "\n").encode()

    def configuration(self, config: Mapping[str, Any], stanza: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of config.json: a model's configuration, every section kept, with its quantization if there is one."""
        stated = {} if stanza is None else {STANZA_KEYS[0]: stanza}
        return (json.dumps({**config, **stated}, indent=2, ensure_ascii=False) + "\n").encode()


CONTAINER = SafetensorsFolder()
"""The one that artifacts are written in."""


def _shard(file: str, tensors: list[Sized], framework: str) -> tuple[Shard, dict[str, FilePlace]]:
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": framework}}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        offsets[tensor.name] = (start, tensor.nbytes)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % LENGTH_BYTES)
    prefix = len(raw).to_bytes(LENGTH_BYTES, "little") + raw
    places = {name: FilePlace(file, len(prefix) + start, nbytes) for name, (start, nbytes) in offsets.items()}
    return Shard(file, prefix, len(prefix) + end, tuple(offsets)), places
