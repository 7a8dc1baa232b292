"""Opening whatever a user names as a source, and telling a path on this machine from a repository on the Hub."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from l4pack.checkpoint.adapter import Adapter, adapter_in, read_adapter
from l4pack.checkpoint.folders import open_any_folder
from l4pack.checkpoint.given import Given, given_folder
from l4pack.checkpoint.source import HUB_ID, Checkpoint, open_bare, snapshot_of
from l4pack.errors import SourceError, UsageError
from l4pack.model.config import KNOWN_MODELS

DEMO = "demo"
HUB_SCHEME = "hf://"  # as in huggingface_hub's own file system
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
# What people call the folders they write to: a first part of that name is a path, though it is not there (yet).
_FOLDERS = {
    "out", "output", "outputs", "model", "models", "checkpoint", "checkpoints", "ckpt", "ckpts", "artifact", "artifacts",
    "data", "dataset", "datasets", "build", "dist", "tmp", "temp", "runs", "result", "results", "snapshots", "weights",
    "work", "export", "exports", "cache", "home", "root", "mnt", "opt", "srv", "var", "workspace", "scratch",
}  # fmt: skip
_FILE = re.compile(r"\.(json|safetensors|ya?ml|bin|pth?|gguf|txt)$", re.IGNORECASE)


class Repository(NamedTuple):
    """A repository on the Hub, and a revision if one was named."""

    repo_id: str
    revision: str | None


def open_source(
    text: str,
    *,
    fetch_folder: Path | None = None,
    include: Sequence[str] = (),
    companions: str | None = None,
    lora: Sequence[str] = (),
) -> Checkpoint:
    """Open what `_open` does, with LoRA adapters (folders, or repositories on the Hub) merged into it in their order.

    Raises SourceError, HubError, or UsageError for an `include` that is wrong.
    """
    return with_lora(_open(text, fetch_folder, include, companions), lora)


def with_lora(opened: Checkpoint, lora: Sequence[str]) -> Checkpoint:
    """A checkpoint with LoRA adapters merged into it, folders or repositories on the Hub. Raises SourceError, HubError."""
    if not lora:
        return opened
    from l4pack.checkpoint.with_adapters import merged

    return merged(opened, [open_adapter(text, number) for number, text in enumerate(lora, 1)])


def open_adapter(text: str, number: int) -> Adapter:
    """Open the adapter that `text` names, a folder or `ORG/NAME[@REVISION]`, the `number`th of those given.

    Raises SourceError, HubError.
    """
    reopen = partial(open_adapter, text, number)
    path = Path(text)
    if exists(path):
        return read_adapter(text, path.absolute().name, number, adapter_in(snapshot_of(path)), reopen)
    repository = hub_repository(text)
    from l4pack.checkpoint.hub import fetch_adapter

    return read_adapter(text, repository.repo_id.rpartition("/")[2], number, fetch_adapter(*repository), reopen)


def _open(text: str, fetch_folder: Path | None, include: Sequence[str], companions: str | None) -> Checkpoint:
    """Open a folder, `ORG/NAME[@REVISION]` on the Hub, a `config.json`, a known model's name, or `demo`.

    With `fetch_folder`, a Hub source's shards are fetched there one by one and dropped after use. `include` carries
    files beside the weights into an artifact that are not carried unasked. `companions`, a folder or a repository, has
    tokenizer, processor and configuration where they don't lie with the weights. Raises SourceError, HubError, or
    UsageError for an `include` that is wrong.
    """
    path = Path(text)
    if not exists(path) or not path.is_dir():
        bare = open_bare(text)
        if bare is not None:
            if include or companions:
                option = "--include" if include else "--companions"
                raise UsageError(f"{text} is a configuration without weights", hint=f"leave {option} out")
            return bare
    given = None if companions is None else open_given(companions)
    if text == DEMO and not path.exists():
        from l4pack.demo import model_path

        return replace(open_any_folder(model_path(), include, given), name=DEMO)
    if path.exists():
        return open_any_folder(path, include, given)
    repository = hub_repository(text)
    from l4pack.checkpoint.hub import open_hub

    return open_hub(
        *repository, fetch_as_you_go=fetch_folder is not None, folder=fetch_folder, include=include, given=given
    )


def open_given(text: str) -> Given:
    """The companions of a folder or of a Hub repository. Raises SourceError, HubError."""
    path = Path(text)
    if text == DEMO and not exists(path):
        from l4pack.demo import model_path

        return given_folder(model_path(), DEMO)
    if exists(path):
        if not path.is_dir():
            raise SourceError(f"--companions {text} is no folder", hint="give the folder that holds tokenizer.json")
        return given_folder(snapshot_of(path), text)
    repository = hub_repository(text)
    from l4pack.checkpoint.hub import given_repository

    return given_repository(*repository)


def exists(path: Path) -> bool:
    """Whether there is something. Raises SourceError when that can't be told."""
    try:
        path.stat()
    except OSError as error:
        if error.errno not in _ABSENT:
            raise SourceError(f"{path}: {error.strerror}", hint="give a folder that can be read") from error
        return False
    except ValueError as error:  # a character that no path has
        raise SourceError(f"{path} is no path", hint="give a checkpoint folder, or ORG/NAME") from error
    return True


def hub_repository(text: str, folder: Path = Path()) -> Repository:
    """The repository that `text` names: `ORG/NAME[@REVISION]`, or that after `hf://`.

    What looks like a path is one, and never a repository: relative to `folder`, its first part is there, or it could be
    no repository's name. Raises SourceError.
    """
    explicit = text.startswith(HUB_SCHEME)
    match = HUB_ID.fullmatch(text.removeprefix(HUB_SCHEME))
    if match is not None and (explicit or not looks_local(text, folder)):
        return Repository(match[1], match[2])
    if explicit:
        raise SourceError(f"{text} is not {HUB_SCHEME}ORG/NAME[@REVISION]", hint="check the spelling")
    if match is not None:
        hint = f"check the path; for the Hub's repository of that name write {HUB_SCHEME}{text}"
        raise SourceError(f"there is no {text} on this machine", hint=hint)
    if "://" not in text and _PATH.match(text):
        hint = f"check the path; a repository on the Hub is written {HUB_SCHEME}ORG/NAME"
        raise SourceError(f"there is no {text} on this machine", hint=hint)
    raise SourceError(
        f"{text} is neither a folder nor ORG/NAME of a Hub repository",
        hint=f"known by name: {', '.join(KNOWN_MODELS)}, {DEMO}",
    )


_PATH = re.compile(r"[./~\\]|[^@]*[/\\]")


def looks_local(text: str, folder: Path = Path()) -> bool:
    """Whether `ORG/NAME` could as well be a path.

    Its first part is a folder in `folder`, or is what such folders are called, or it ends like a file.
    """
    first = text.partition("/")[0]
    return first.lower() in _FOLDERS or _FILE.search(text) is not None or (folder / first).is_dir()
