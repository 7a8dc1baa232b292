"""An artifact in a Hub repository, looked at as the folder it would be.

For what reads headers alone, every weight file is a hole of its size with its header in it, and nothing else of it is
fetched; other files are whole. For what reads weights, files are fetched into the client's cache, and the folder links
to those with weights. Either folder is there for one command, and goes with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from l4pack.checkpoint.header import LENGTH_BYTES
from l4pack.checkpoint.open import HUB_SCHEME, Repository, exists, hub_repository
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.errors import SourceError
from l4pack.units import human_bytes

if TYPE_CHECKING:
    from l4pack.checkpoint.hub import Remote

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".npz", ".h5", ".msgpack")
_MOST_BYTES = 256_000_000  # of a file that is not weights, held in memory on its way


@dataclass(frozen=True)
class Looked:
    """A folder to look into, and what people call it; `here` unless it stands for a repository."""

    folder: Path
    name: str
    here: bool = True
    fetched_bytes: int = 0  # all that looking at a repository's weights takes


def own_path(text: str) -> Path:
    """What a command's own files stand beside and are called after: those about a repository lie in the current folder."""
    repository = _on_the_hub(text)
    return Path(text) if repository is None else Path(repository.repo_id.rpartition("/")[2])


@contextmanager
def look(text: str, *, weights: bool, say: Callable[[str], None] = lambda _: None) -> Iterator[Looked]:
    """The folder that `text` names, or one that stands for `ORG/NAME[@REVISION]`: with its `weights`, or their headers.

    `say` is told what is fetched before it is. Raises SourceError, HubError, and BudgetError where the disk has no room.
    """
    repository = _on_the_hub(text)
    if repository is None:
        yield Looked(Path(text), text)
        return
    with tempfile.TemporaryDirectory(prefix="l4pack-") as place:
        yield _fetched(repository, Path(place), weights=weights, say=say)


def _fetched(repository: Repository, place: Path, *, weights: bool, say: Callable[[str], None]) -> Looked:
    """The folder that stands for a repository, in `place`."""
    from l4pack.checkpoint.hub import open_remote
    from l4pack.hub.client import hub_api, hub_errors

    api = hub_api(None, None)
    with hub_errors(api, *repository):
        remote = open_remote(api, *repository)
        folder, name = place / remote.repo_id.rpartition("/")[2], f"{remote.repo_id}@{remote.revision[:12]}"
        files = [file for file in remote.files if not file.endswith(_OTHER_WEIGHTS)]
        whole = sum(remote.files[file].size for file in files)
        if weights:
            say(f"{name}: {human_bytes(whole)} are fetched into the client's cache, but for what is there")
            _link(folder, remote, files)
        else:
            _headers_only(folder, remote, files, lambda fetched: say(f"{name}: {fetched}"))
    return Looked(folder, name, here=False, fetched_bytes=whole)


def _on_the_hub(text: str) -> Repository | None:
    """The repository that is named, if one is. Raises SourceError for `hf://` and something else."""
    if not text.startswith(HUB_SCHEME) and exists(Path(text)):
        return None
    try:
        return hub_repository(text)
    except SourceError:
        if text.startswith(HUB_SCHEME):
            raise
        return None  # the command has its own words for a folder that is not there


def _link(folder: Path, remote: Remote, files: list[str]) -> None:
    """Links to weight files and copies of all others, fetched one after another."""
    from l4pack.checkpoint.hub import HubStore

    store = HubStore(remote, {})
    store.check_room(files)
    for name in files:
        target, fetched = _made(folder, name), store.path(name).resolve()
        target.symlink_to(fetched) if CONTAINER.is_weights(name) else copyfile(fetched, target)


def _headers_only(folder: Path, remote: Remote, files: list[str], say: Callable[[str], None]) -> None:
    """All files whole but those with weights, of which only the header is there."""
    from l4pack.checkpoint.hub import header_lengths

    shards = [name for name in files if CONTAINER.is_weights(name)]
    others = [name for name in files if name not in shards]
    ahead = header_lengths(remote, shards)
    nbytes = sum(remote.files[name].size for name in others) + sum(ahead.values())
    left = sum(remote.files[name].size for name in shards)
    say(f"{human_bytes(nbytes)} are fetched, none of {human_bytes(left)} of weights")
    for name in others:
        _made(folder, name).write_bytes(remote.small(name, _MOST_BYTES))
    for name in shards:
        with _made(folder, name).open("wb") as stream:
            stream.write(remote.part(name, 0, LENGTH_BYTES + ahead[name]))
            stream.truncate(remote.files[name].size)


def _made(folder: Path, name: str) -> Path:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
