"""A LoRA adapter in peft's format, opened: a folder or a Hub repository with `adapter_config.json` and safetensors.

Opening one reads its configuration and its header; its numbers are read with the matrices they change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from l4pack.checkpoint.adapter_config import AdapterConfig, parse_adapter_config
from l4pack.checkpoint.exports import ADAPTER_CONFIG, WEIGHT_DTYPES
from l4pack.checkpoint.header import TensorEntry, read_header
from l4pack.errors import SourceError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_MAX_CONFIG = 4_000_000  # rank_pattern may name every module


@dataclass(frozen=True)
class AdapterFiles:
    """Where an adapter's two files are on this machine, and the repository and commit they are from."""

    config: Path
    weights: Path
    repository: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files say it is; `file` is its weight file's name among those of the model it is merged into."""

    name: str
    given: str  # as it was named on the command line
    config: AdapterConfig
    entries: Mapping[str, TensorEntry]
    file: str
    files: AdapterFiles
    config_sha256: str
    reopen: Callable[[], Adapter] = field(compare=False, repr=False)

    @property
    def title(self) -> str:
        """Its repository, or its folder's name."""
        return self.files.repository or self.name

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 over both files' digests: of all that decides what is merged. Reads the adapter."""
        with self.files.weights.open("rb") as stream:
            weights = hashlib.file_digest(stream, "sha256").hexdigest()
        return hashlib.sha256(f"{self.config_sha256} {weights}".encode()).hexdigest()


def read_adapter(text: str, name: str, number: int, files: AdapterFiles, reopen: Callable[[], Adapter]) -> Adapter:
    """The adapter that files on this machine hold, the `number`th of those given. Raises SourceError."""
    file = f"adapter-{number}/{ADAPTER_WEIGHTS}"
    content = _config_bytes(files.config)
    config = parse_adapter_config(content, f"{text}: {ADAPTER_CONFIG}")
    entries = read_header(files.weights, file)
    _check_dtypes(entries, text)
    return Adapter(name, text, config, entries, file, files, hashlib.sha256(content).hexdigest(), reopen)


def adapter_in(folder: Path) -> AdapterFiles:
    """An adapter's files in a folder. Raises SourceError where they are not there, or lead out of it."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder", hint=f"give the folder that holds {ADAPTER_CONFIG}")
    refuse_other_files(str(folder), {path.name for path in folder.iterdir()})
    home = folder.resolve()
    if home.parent.name == "snapshots":  # a Hub cache keeps the contents in a folder beside the snapshots
        home = home.parent.parent
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).resolve().is_relative_to(home):
            raise SourceError(f"{name} is a link that leaves {folder}", hint="put the file itself there")
    return AdapterFiles(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)


def _config_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise SourceError(f"{path} is implausibly large", hint="give a LoRA adapter as peft writes it")
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", hint="check the file, or download it again") from error


def refuse_other_files(where: str, names: set[str]) -> None:
    """Raise SourceError for what is no adapter in peft's safetensors format."""
    if ADAPTER_CONFIG not in names:
        model = "config.json" in names
        hint = (
            "to use a whole model, name it as the source" if model else "give the folder that peft saved the adapter to"
        )
        raise SourceError(f"{where} has no {ADAPTER_CONFIG}: it is no LoRA adapter", hint=hint)
    if ADAPTER_WEIGHTS not in names and _PICKLED in names:
        raise SourceError(
            f"{where} holds {_PICKLED}, a pickle, which may run code when it is read",
            hint="save it as safetensors: PeftModel.from_pretrained(BASE, ADAPTER).save_pretrained(NEW)",
        )
    if ADAPTER_WEIGHTS not in names:
        raise SourceError(f"{where} has no {ADAPTER_WEIGHTS}", hint="download or save the adapter again")


def _check_dtypes(entries: Mapping[str, TensorEntry], where: str) -> None:
    for entry in entries.values():
        if entry.dtype not in WEIGHT_DTYPES:
            raise SourceError(
                f"{where}: {entry.name[:200]} is {entry.dtype}; l4pack merges {', '.join(WEIGHT_DTYPES)}",
                hint="save the adapter in one of these",
            )
