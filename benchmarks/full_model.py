"""A whole Scout or Maverick with made-up weights: full names, shapes and file sizes on a few GB of disk.

    python benchmarks/full_model.py FOLDER scout              # 217 GB by `ls`, under 2 GB of disk
    python benchmarks/full_model.py FOLDER maverick --layers 4
    python benchmarks/full_model.py FOLDER maverick --values none     # headers alone, on any filesystem

Layers of one kind share one copy of their bytes through reflinks. With `repeated` values every output channel is the one
before it turned by a quantization group, so that a filesystem that compresses keeps one channel of a matrix, and of what
quantizing makes of it; with `varied` ones all of a layer differ, because what solving takes depends on them; `none` are
holes in the files. The tokenizer is the demo's.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from real_size import values

from l4pack.demo import model_path
from l4pack.model.config import known_config, parse_config
from l4pack.model.tensors import QUANTIZABLE, Role, TensorSpec, catalogue

FICLONERANGE = 0x4020940D  # linux/fs.h
FS_BLOCK = 4096  # reflinked ranges begin at blocks of the filesystem
GROUP = 128
ROWS = 1024  # made at once
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
NO_REFLINKS = """{folder} is on a filesystem without reflinks. One in a file that grows as it is written to, as root:
  apt-get install btrfs-progs
  truncate --size 1200G full.img && mkfs.btrfs --metadata single full.img
  mkdir full && mount -o loop,compress-force=zstd full.img full
and when done: umount full && rm full.img"""


class Values(StrEnum):
    """What the matrices of layers are made of."""

    REPEATED = "repeated"
    VARIED = "varied"
    NONE = "none"


def check_reflinks(folder: Path) -> None:
    """Leave with what to do where files of a folder can't share their bytes."""
    paths = [folder / f".reflink-{name}" for name in ("source", "target")]
    try:
        paths[0].write_bytes(bytes(FS_BLOCK))
        paths[1].touch()
        _share(paths[0], 0, FS_BLOCK, paths[1], 0)
    except OSError as problem:
        if problem.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS):
            raise
        sys.exit(NO_REFLINKS.format(folder=folder))
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _share(source: Path, start: int, nbytes: int, target: Path, at: int) -> None:
    """Let `nbytes` of a file be those of another from `start` on. Raises OSError."""
    with source.open("rb") as whole, target.open("r+b") as part:
        fcntl.ioctl(part.fileno(), FICLONERANGE, struct.pack("qQQQ", whole.fileno(), start, nbytes, at))


def full_config(model: str, layers: int | None = None) -> dict[str, Any]:
    """The published configuration, or that of a model of its first layers alone."""
    raw = dict(known_config(f"llama-4-{model}").raw)
    if layers is None:
        return raw
    text = dict(raw["text_config"])
    text["num_hidden_layers"] = layers
    text["no_rope_layers"] = (text.get("no_rope_layers") or [])[:layers]
    if text.get("moe_layers"):
        text["moe_layers"] = [layer for layer in text["moe_layers"] if layer < layers]
    return raw | {"text_config": text}


def make_model(folder: Path, model: str, layers: int | None = None, made_of: Values = Values.REPEATED) -> int:
    """Write the checkpoint, unless it is there; returns the bytes of its tensors."""
    raw = full_config(model, layers)
    specs = catalogue(parse_config(raw)).tensors
    total = 2 * sum(spec.numel for spec in specs)
    if (folder / "config.json").exists():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[int | None, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.layer, []).append(spec)
    weight_map = _write_shards(folder, list(groups.values()), made_of)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in BESIDE:
        shutil.copy(model_path() / file, folder / file)
    (folder / "config.json").write_text(json.dumps(raw))
    return total


def _write_shards(folder: Path, groups: Sequence[Sequence[TensorSpec]], made_of: Values) -> dict[str, str]:
    """A shard a layer and one for the rest; returns the shard of every tensor."""
    first: dict[tuple[Any, ...], tuple[Path, int]] = {}
    weight_map = {}
    for number, group in enumerate(groups, 1):
        path = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        prefix = _prefix(group)
        kind = tuple((spec.role, spec.shape) for spec in group)
        nbytes = 2 * sum(spec.numel for spec in group)
        if made_of is Values.NONE:
            path.write_bytes(prefix)
            os.truncate(path, len(prefix) + nbytes)
        elif kind in first:
            path.write_bytes(prefix)
            _share(*first[kind], nbytes, path, len(prefix))
        else:
            _write_values(path, prefix, group, made_of)
            first[kind] = path, len(prefix)
        weight_map.update({spec.name: path.name for spec in group})
    return weight_map


def _prefix(group: Sequence[TensorSpec]) -> bytes:
    """A safetensors header that fills blocks of the filesystem."""
    header, end = {}, 0
    for spec in group:
        start, end = end, end + 2 * spec.numel
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % FS_BLOCK)
    return struct.pack("<Q", len(text)) + text


def _write_values(path: Path, prefix: bytes, group: Sequence[TensorSpec], made_of: Values) -> None:
    with path.open("wb") as stream:
        stream.write(prefix)
        for spec in group:
            for block in _blocks(spec, made_of):
                stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())


def _blocks(spec: TensorSpec, made_of: Values) -> Iterator[bytes | memoryview]:
    """A tensor's BF16 bytes, some MB at a time."""
    if len(spec.shape) == 1:
        yield _bf16(np.ones(spec.shape, np.float32)).data
    elif made_of is Values.VARIED and spec.role in QUANTIZABLE:
        yield from values(spec)
    elif len(spec.shape) == 3:
        for expert in range(spec.shape[0]):
            yield from _turned_columns(_channel(spec, expert), *spec.shape[1:])
    elif spec.role is Role.ROUTER:
        generator = np.random.default_rng(zlib.crc32(spec.name.encode()))
        yield _bf16(generator.standard_normal(spec.shape, np.float32) * np.float32(0.02)).data
    else:
        by = GROUP if spec.role in QUANTIZABLE else 1
        for start in range(0, spec.shape[0], ROWS):
            yield _turned(_channel(spec), start, min(start + ROWS, spec.shape[0]), by).data


def _channel(spec: TensorSpec, expert: int = 0) -> NDArray[np.uint16]:
    """The first output channel: BF16 words [in]."""
    generator = np.random.default_rng([zlib.crc32(spec.name.encode()), expert])
    inputs = spec.shape[-2] if len(spec.shape) == 3 else spec.shape[-1]
    return _bf16(generator.standard_normal(inputs, np.float32) * np.float32(0.02))


def _turned(channel: NDArray[np.uint16], start: int, stop: int, by: int) -> NDArray[np.uint16]:
    """Channels [stop - start, in], number n turned by n times `by`."""
    return np.stack([np.roll(channel, by * number) for number in range(start, stop)])


def _turned_columns(channel: NDArray[np.uint16], inputs: int, outputs: int) -> Iterator[memoryview]:
    """One expert, in x out."""
    period = np.ascontiguousarray(_turned(channel, 0, inputs // GROUP, GROUP).T)
    repeats = -(-outputs // period.shape[1])
    for start in range(0, inputs, ROWS):
        yield np.ascontiguousarray(np.tile(period[start : start + ROWS], (1, repeats))[:, :outputs]).data


def _bf16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def main() -> None:
    """Make a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", choices=("scout", "maverick"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--values", type=Values, choices=tuple(Values), default=Values.REPEATED)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.values is not Values.NONE:
        check_reflinks(arguments.folder)
    total = make_model(arguments.folder, arguments.model, arguments.layers, arguments.values)
    print(f"{arguments.folder}: {total:,} bytes of weights")


if __name__ == "__main__":
    main()
