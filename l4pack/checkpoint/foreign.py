"""Files that other runtimes' tools made, which are models but no checkpoints: llama.cpp's GGUF, and folders of mlx-lm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from l4pack.errors import SourceError

GGUF = ".gguf"
_ORIGINAL = "everything else is done with the original checkpoint"
_MLX_HINT = f"l4pack budget says what it needs, and l4pack verify checks an export by the record beside it; {_ORIGINAL}"
_GGUF_HINT = f"l4pack budget says what it needs, and l4pack verify checks it; {_ORIGINAL}"


def states_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a configuration states MLX's quantization, which no other tool writes beside such a model."""
    stated = config.get("quantization")
    return isinstance(stated, dict) and "group_size" in stated and "bits" in stated


def refuse_mlx(name: str, config: Mapping[str, Any]) -> None:
    """Raise SourceError for what mlx-lm or an export to it quantized."""
    if states_mlx(config):
        raise SourceError(f"{name} is mlx-lm's, whose quantized tensors are no checkpoint's", hint=_MLX_HINT)


def refuse_gguf(name: str, files: Iterable[str]) -> None:
    """Raise SourceError for GGUF files, of what holds these."""
    if any(file.lower().endswith(GGUF) for file in files):
        raise SourceError(f"{name} is llama.cpp's: a GGUF file is no checkpoint", hint=_GGUF_HINT)


def refuse_gguf_in(place: Path) -> None:
    """The same of a file, or of a folder's files."""
    refuse_gguf(str(place), [file.name for file in place.iterdir()] if place.is_dir() else [place.name])
