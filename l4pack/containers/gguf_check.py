"""What can be said of a GGUF file that somebody else wrote: whether llama.cpp loads it as Llama 4, and rightly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from l4pack.containers.gguf_header import GgufFile, is_gguf, read_model
from l4pack.containers.gguf_model import TEXT, TOWER, expected_shapes, text_config
from l4pack.errors import SourceError

WINDOW = f"{TEXT}.attention.sliding_window"
_PROJECTOR = "clip.projector_type"
_TOWER_NAMES = ("v.class_embd", "v.position_embd.weight", "v.patch_embd.weight", "mm.model.fc.weight")


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where; a `warning` does not keep the file from being loaded."""

    where: str
    message: str
    rule: str
    level: str = "error"


def gguf_files(place: Path) -> list[Path]:
    """The models a path is of: a file itself, of a folder each model's first file. Raises SourceError where none is."""
    if not place.is_dir():
        return [place]
    files = sorted(file for file in place.glob("*.gguf") if "-of-" not in file.name or "-00001-of-" in file.name)
    if not files:
        raise SourceError(f"{place} holds no GGUF file", hint="give a GGUF file, or a folder with one")
    return files


def holds_gguf(place: Path) -> bool:
    """Whether a path is a GGUF file, or a folder of some and of no config.json."""
    if place.is_dir():
        return not (place / "config.json").exists() and any(place.glob("*.gguf"))
    return is_gguf(place)


def check_gguf(path: Path) -> tuple[GgufFile, list[Fault]]:
    """A file, or all parts of one, and what is wrong with it. Raises SourceError for one that is damaged."""
    file = read_model(path)
    if file.architecture == TOWER:
        return file, list(_tower_faults(file))
    text_config(file)
    return file, list(_text_faults(file))


def _text_faults(file: GgufFile) -> Iterator[Fault]:
    config = text_config(file)
    wanted = expected_shapes(config)
    there = {tensor.name: tensor for tensor in file.tensors}
    for name, shape in wanted.items():
        if name not in there:
            yield Fault(name, "is missing", "tensors")
        elif there[name].shape != shape:
            yield Fault(name, f"has shape {there[name].shape}, the keys make it {shape}", "tensors")
    free = {"rope_freqs.weight": (config.text.head_dim // 2,)}
    for name, tensor in there.items():
        if name in free and tensor.shape != free[name]:
            yield Fault(name, f"has shape {tensor.shape}, not {free[name]}", "tensors")
        elif tensor.dtype == "NVFP4":
            yield Fault(name, "is NVFP4, whose scales llama.cpp's Llama 4 ignores: its answers are no numbers", "types")
        elif name not in wanted and name not in free:
            yield Fault(name, "is no tensor that llama.cpp's Llama 4 loads", "tensors")
    if WINDOW in file.values:
        yield Fault(WINDOW, "must be absent: 0 switches chunks off and rotary positions on everywhere", "keys")
    if not file.values.get("general.license"):
        yield Fault(
            "general.license", "is missing: the file does not say under which licence it goes", "keys", "warning"
        )


def _tower_faults(file: GgufFile) -> Iterator[Fault]:
    names = {tensor.name for tensor in file.tensors}
    if file.values.get(_PROJECTOR) != TEXT:
        yield Fault(_PROJECTOR, f"is {file.values.get(_PROJECTOR)!r}, not {TEXT!r}", "keys")
    for name in _TOWER_NAMES:
        if name not in names:
            yield Fault(name, "is missing", "tensors")
    layers = file.values.get("clip.vision.block_count")
    for layer in range(layers if type(layers) is int and 0 <= layers <= 1024 else 0):
        if f"v.blk.{layer}.ln2.weight" not in names:
            yield Fault(
                f"v.blk.{layer}.ln2.weight", "is missing: llama.cpp leaves this norm out and says nothing", "tensors"
            )
