"""A checkpoint to read from: a folder, a Hub cache folder, a Hub repository, a bare config.json or a known model.

Opening one reads `config.json`, the index and the headers; never a weight.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from l4pack.checkpoint.companions import check_companions, choose, folder_files
from l4pack.checkpoint.exports import (
    WEIGHT_DTYPES,
    adapter_config,
    refuse_adapter,
    refuse_two_models,
    refuse_unmerged,
    single_weight_file,
    why_incomplete,
    why_missing,
    why_unknown,
    with_stored_vocabulary,
    without_stale_stanza,
    without_tied_head,
)
from l4pack.checkpoint.foreign import refuse_gguf, refuse_gguf_in, refuse_mlx
from l4pack.checkpoint.header import TensorEntry, read_header
from l4pack.checkpoint.merged import merging_bytes
from l4pack.checkpoint.twice import Duplicate, taken_once
from l4pack.datafile import parse_json, refuse_lfs_pointer
from l4pack.errors import SourceError
from l4pack.model.config import CONFIG_NAME, KNOWN_MODELS, Llama4Config, known_config, load_config
from l4pack.model.names import detect_layout
from l4pack.model.tensors import Catalogue, catalogue
from l4pack.quant.dtypes import NAMES, FloatName

if TYPE_CHECKING:
    from l4pack.checkpoint.adapter import Adapter

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000
MAX_NAME_BYTES = 255  # what file systems take
_SHARD_NAME = re.compile(r"\w[\w.\-]*\.safetensors")


class Store(Protocol):
    """Where the files of a checkpoint are."""

    @property
    def fetches(self) -> bool:
        """Whether shards are downloaded when asked for and dropped when released."""
        ...

    def path(self, file: str) -> Path:
        """A local path to the file, fetched first if need be."""
        ...

    def release(self, file: str) -> None:
        """Say that the file's weights are used up and it need not be kept."""
        ...

    def identity(self, file: str) -> str:
        """Something that changes when the file does."""
        ...

    def small(self, file: str, limit: int) -> bytes:
        """The whole content of a file that must not be larger than `limit` bytes. Raises SourceError, HubError."""
        ...

    def beside(self, files: Mapping[str, Path]) -> Store:
        """The same with files on this machine that lie elsewhere, which stand before its own."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder on this machine; Hub cache folders (symbolic links) too. `elsewhere` has files that lie in others."""

    folder: Path
    elsewhere: Mapping[str, Path] = field(default_factory=dict, hash=False)

    @property
    def fetches(self) -> bool:
        """No: everything is here."""
        return False

    def path(self, file: str) -> Path:
        """The file's path."""
        return self.elsewhere.get(file, self.folder / file)

    def release(self, file: str) -> None:
        """Nothing: a source is never touched."""

    def identity(self, file: str) -> str:
        """Size and times of last change, in nanoseconds; the second of them can't be set back."""
        status = self.path(file).stat()
        return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"

    def small(self, file: str, limit: int) -> bytes:
        """The file's content. Raises SourceError when it is larger than `limit` bytes or can't be read."""
        try:
            with self.path(file).open("rb") as stream:
                content = stream.read(limit + 1)
        except OSError as error:
            raise SourceError(f"{file}: {error.strerror}", hint="check the file, or download it again") from error
        if len(content) > limit:
            raise SourceError(f"{file} is implausibly large", hint="download it again")
        return content

    def beside(self, files: Mapping[str, Path]) -> LocalStore:
        """The folder, and files of others."""
        return LocalStore(self.folder, {**self.elsewhere, **files})


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: configuration, every tensor's place, and the other files that belong to it.

    `entries` is empty for a bare configuration, from which a plan can be made but nothing read. `tied_head` is a stored
    head that is not among them, because runtimes take the embedding for it; `duplicates` are entries that are not, because another is the same tensor.
    `complete` is there where the files leave
    open what a whole configuration says: it gives that configuration, None for one of another model.
    """

    name: str
    config: Llama4Config
    entries: Mapping[str, TensorEntry]
    companions: Mapping[str, int] = field(default_factory=dict)  # file name -> bytes
    store: Store | None = None
    revision: str | None = None
    left_behind: tuple[str, ...] = ()  # files and folders beside the weights that are not companions
    included: tuple[str, ...] = ()  # companions that were asked for by name
    notes: tuple[str, ...] = ()  # what is not as the files say, in words
    tied_head: TensorEntry | None = None
    duplicates: tuple[Duplicate, ...] = ()
    dequantized: str | None = None  # what its matrices are stored as, where they are read as products of code and scale
    kind: str = "safetensors"  # how the weights lie in files, in words
    reopen: Callable[[], Checkpoint] | None = field(default=None, compare=False, repr=False)  # the same, seen now
    complete: Callable[[Llama4Config], Llama4Config | None] | None = field(default=None, compare=False, repr=False)
    adapters: tuple[Adapter, ...] = ()  # merged into the weights as they are read

    @property
    def bare(self) -> bool:
        """Whether there is a configuration only."""
        return not self.entries

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(nbytes for entry in self.entries.values() for nbytes in entry.stored.values())

    @cached_property
    def merging_bytes(self) -> int:
        """Most bytes that are taken beside a matrix while adapters are merged into it; 0 without any."""
        return max(map(merging_bytes, self.entries.values())) if self.adapters and self.entries else 0

    @cached_property
    def float_names(self) -> dict[str, FloatName]:
        """The dtype of every tensor, one of WEIGHT_DTYPES. Raises SourceError where the layout is not Llama 4's."""
        assert self.layout
        return {name: cast("FloatName", entry.dtype) for name, entry in self.entries.items()}

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype of a tensor; of a bare configuration, the dtype it states (BF16 if none)."""
        if self.bare:
            return NAMES.get(self.config.dtype or "", "BF16")
        return self.entries[name].dtype

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """Names of the weight files, sorted."""
        return tuple(sorted({file for entry in self.entries.values() for file in entry.stored}))

    @cached_property
    def layout(self) -> Catalogue:
        """The catalogue these tensors follow, checked name by name. Raises SourceError where they disagree."""
        if self.bare:
            return catalogue(self.config)
        found = detect_layout(self.config, self.entries)
        check_layout(found, self.entries)
        return found

    def completed(self, config: Llama4Config) -> Checkpoint:
        """With a configuration, an artifact's of it, for one that leaves things open; unchanged where the two disagree."""
        found = None if self.complete is None else self.complete(config)
        return self if found is None else replace(self, config=found)

    def fingerprint(self) -> str:
        """Hex SHA-256 over configuration, headers and the files' identities: changes when the source does."""
        digest = hashlib.sha256(json.dumps(self.config.raw, sort_keys=True).encode())
        for entry in sorted(self.entries.values(), key=lambda entry: entry.name):
            digest.update(entry.identity.encode())
        for adapter in self.adapters:
            digest.update(adapter.sha256.encode())
        if self.store is not None:
            for file in (*self.shards, *sorted(self.companions)):
                digest.update(os.fsencode(f"{file}={self.store.identity(file)}"))
        return digest.hexdigest()


def open_folder(folder: Path, include: Sequence[str] = ()) -> Checkpoint:
    """Open a checkpoint folder, or a repository's folder in the Hub's cache; `include` carries more files by name.

    Raises SourceError, UsageError for an `include` that is wrong.
    """
    if not folder.is_dir():
        refuse_gguf_in(folder)
        raise SourceError(f"{folder} is not a folder", hint="give a checkpoint folder, or ORG/NAME of a Hub repository")
    folder = snapshot_of(folder)
    files = folder_files(folder, include)
    if CONFIG_NAME not in files:
        refuse_adapter(files, str(folder), adapter_config(folder))
        refuse_gguf(str(folder), files)
        raise SourceError(
            f"{folder} has no config.json", hint="point at the folder that holds config.json and the shards"
        )
    config = load_config(folder / CONFIG_NAME)
    shards = shard_names(folder)
    headers = {file: read_header(folder / file, file) for file in shards.shards}
    opened = assemble(str(folder), config, headers, shards.weight_map, files, include)
    check_companions(folder, opened.companions)
    return replace(opened, store=LocalStore(folder), reopen=partial(open_folder, folder, tuple(include)))


def assemble(
    name: str,
    config: Llama4Config,
    headers: Mapping[str, Mapping[str, TensorEntry]],
    weight_map: Mapping[str, str] | None,
    files: Mapping[str, int],
    include: Sequence[str] = (),
) -> Checkpoint:
    """A checkpoint of what was read, wherever it lies; `files` are all files by their names within it.

    Raises SourceError, UsageError for an `include` that is wrong.
    """
    refuse_mlx(name, config.raw)
    entries: Mapping[str, TensorEntry]
    entries, duplicates, notes = taken_once(merge_headers(headers, weight_map), weight_map or {})
    refuse_unmerged(entries)
    config, stale = without_stale_stanza(config, entries)
    config, resized = with_stored_vocabulary(config, entries)
    notes += stale + resized
    entries, head = without_tied_head(config, entries)
    if head is not None:
        notes = [*notes, f"{head.name} is tied to the embedding: runtimes don't read it, and it is left out"]
    beside = choose(files, {CONFIG_NAME, INDEX_NAME, *headers}, include)
    return Checkpoint(
        name,
        config,
        entries,
        beside.carried,
        left_behind=beside.left_behind,
        included=beside.included,
        notes=tuple(notes),
        tied_head=head,
        duplicates=duplicates,
    )


_COMMIT = re.compile(r"[0-9a-f]{40}")


def snapshot_of(folder: Path) -> Path:
    """The folder itself, or the snapshot that a repository's folder in the Hub's cache holds. Raises SourceError."""
    root = folder.absolute().parent if folder.absolute().name == "snapshots" else folder
    if (folder / CONFIG_NAME).exists() or not (root / "snapshots").is_dir():
        return folder
    found = sorted(path for path in (root / "snapshots").iterdir() if path.is_dir())
    main = root / "snapshots" / _main_commit(root)
    if main in found:
        return main
    if len(found) == 1:
        return found[0]
    if not found:
        raise SourceError(f"{root} holds no snapshot", hint="download the repository again")
    names = ", ".join(path.name for path in found[:5])
    raise SourceError(f"{root} holds {len(found)} snapshots and no main: {names}", hint=f"name one: {found[0]}")


def _main_commit(root: Path) -> str:
    """The commit that `refs/main` of a cache folder names, or a name that no snapshot has."""
    try:
        with (root / "refs" / "main").open("rb") as stream:
            commit = stream.read(100).decode("ascii", "replace").strip()
    except OSError:
        return "none"
    return commit if _COMMIT.fullmatch(commit) else "none"


@dataclass(frozen=True)
class ShardNames:
    """The weight files of a checkpoint, and what its index says of them (None without an index)."""

    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None


def shard_names(folder: Path) -> ShardNames:
    """The weight files a folder's index names, or its single file. Raises SourceError."""
    index = folder / INDEX_NAME
    if index.is_file():
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise SourceError(f"{INDEX_NAME} is implausibly large", hint="download it again")
        weight_map = parse_index(index.read_bytes())
        refuse_two_models({path.name for path in folder.iterdir()}, weight_map, str(folder))
        missing = [file for file in sorted(set(weight_map.values())) if not (folder / file).is_file()]
        if missing:
            raise why_missing(missing, weight_map, [path.name for path in folder.iterdir()])
        return ShardNames(tuple(sorted(set(weight_map.values()))), weight_map)
    single = single_weight_file({path.name for path in folder.iterdir() if path.is_file()}, str(folder))
    return ShardNames((single,), None)


def parse_index(raw: bytes) -> dict[str, str]:
    """The `weight_map` of an index, with every file name inside the folder. Raises SourceError."""
    refuse_lfs_pointer(raw, INDEX_NAME)
    try:
        weight_map = parse_json(raw)["weight_map"]
        items = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{INDEX_NAME} has no readable weight_map", hint="download it again") from error
    for name, file in items.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file) or len(file.encode()) > MAX_NAME_BYTES:
            raise SourceError(
                f"{INDEX_NAME} places {name} in {file!r}, which is not a shard of this folder",
                hint="shards lie beside the index, under plain names: move them there and mend it, or download it again",
            )
    if not items:
        raise SourceError(f"{INDEX_NAME} names no tensor", hint="download it again")
    return items


def merge_headers(
    headers: Mapping[str, Mapping[str, TensorEntry]], weight_map: Mapping[str, str] | None
) -> list[TensorEntry]:
    """All tensors of all shards, checked against the index. Raises SourceError."""
    for name, file in (weight_map or {}).items():
        if name not in headers[file]:
            raise SourceError(
                f"{INDEX_NAME} places {name} in {file}, which does not hold it", hint="download both again"
            )
    entries = [entry for header in headers.values() for entry in header.values()]
    unlisted = [entry for entry in entries if entry.name not in weight_map] if weight_map else []
    if unlisted:
        first = min(unlisted, key=lambda entry: entry.name)
        raise SourceError(
            f"{first.file} holds {first.name}, which {INDEX_NAME} does not name", hint="download both again"
        )
    return entries


def check_layout(layout: Catalogue, entries: Mapping[str, TensorEntry]) -> None:
    """Compare headers with the configuration. Raises SourceError naming tensor, shape found and shape expected."""
    for name, spec in layout.by_name.items():
        entry = entries.get(name)
        if entry is None:
            continue
        if entry.shape != spec.shape:
            raise SourceError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, config.json makes it {list(spec.shape)}",
                hint="config.json and the weights are of different models, or the layout is not a Llama 4 one",
            )
        if entry.dtype not in WEIGHT_DTYPES:
            raise SourceError(
                f"{entry.file}: {name} is {entry.dtype}; l4pack reads {', '.join(WEIGHT_DTYPES)}",
                hint="start from the original, unquantized checkpoint",
            )
    _complete(layout, entries)


def _complete(layout: Catalogue, entries: Mapping[str, TensorEntry]) -> None:
    missing = [name for name in layout.by_name if name not in entries]
    if missing:
        raise why_incomplete(layout, missing, entries)
    unknown = [name for name in entries if name not in layout.by_name]
    if unknown:
        raise why_unknown(layout.config, unknown, entries)


HUB_ID = re.compile(r"([A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*)(?:@([\w.\-/]+))?")


def open_bare(text: str) -> Checkpoint | None:
    """A checkpoint of a known model's name or a bare `config.json`, or None when `text` is neither."""
    if text.lower() in KNOWN_MODELS:
        return Checkpoint(text.lower(), known_config(text.lower()), {})
    path = Path(text)
    if path.is_file() and path.suffix == ".json":
        return Checkpoint(text, load_config(path), {})
    return None
