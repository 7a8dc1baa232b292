"""Companions that lie elsewhere than the weights: tokenizer, processor, templates, and the configuration of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from l4pack.checkpoint.companions import check_companions, folder_files, is_companion
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError
from l4pack.model.config import CONFIG_NAME, Llama4Config, load_config


@dataclass(frozen=True)
class Given:
    """Files by name with their places on this machine, and the configuration that lies with them."""

    name: str
    files: Mapping[str, Path]
    config: Llama4Config | None


def given_folder(folder: Path, name: str) -> Given:
    """The companions of a folder, which need not hold weights. Raises SourceError where it has none."""
    names = [file for file in folder_files(folder) if is_companion(file)]
    check_companions(folder, names)
    return given_files(name, {file: folder / file for file in names}, folder / CONFIG_NAME)


def given_files(name: str, files: Mapping[str, Path], config: Path) -> Given:
    """The companions among files on this machine. Raises SourceError where there is none."""
    if not files:
        raise SourceError(
            f"{name} has no tokenizer, processor or licence files to take along",
            hint="give --companions the model's folder or repository in transformers' layout",
        )
    return Given(name, files, load_config(config) if config.is_file() else None)


def beside(checkpoint: Checkpoint, given: Given) -> Checkpoint:
    """A checkpoint with companions given from elsewhere; they stand before its own of the same name."""
    assert checkpoint.store is not None
    sizes = {name: path.stat().st_size for name, path in given.files.items()}
    companions = dict(sorted({**checkpoint.companions, **sizes}.items()))
    store = checkpoint.store.beside(given.files)
    reopen = None if checkpoint.reopen is None else partial(_beside_again, checkpoint, given)
    return replace(checkpoint, companions=companions, store=store, reopen=reopen)


def _beside_again(checkpoint: Checkpoint, given: Given) -> Checkpoint:
    assert checkpoint.reopen is not None
    return beside(checkpoint.reopen(), given)
