"""A checkpoint in a Hub repository: opened by range requests alone, fetched shard by shard when it is read.

The headers fetched are judged by the same code as a local file's. A shard that was fetched is held against the size and
digest the Hub gives for it, and against the header that was read from it before.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils._headers import build_hf_headers

from l4pack.checkpoint.adapter import ADAPTER_WEIGHTS, AdapterFiles, refuse_other_files
from l4pack.checkpoint.companions import is_companion
from l4pack.checkpoint.consolidated import compose, is_consolidated, shard_files
from l4pack.checkpoint.exports import ADAPTER_CONFIG, refuse_adapter, refuse_two_models, single_weight_file
from l4pack.checkpoint.folders import open_any_folder
from l4pack.checkpoint.foreign import refuse_gguf
from l4pack.checkpoint.given import Given, beside, given_files, given_folder
from l4pack.checkpoint.header import LENGTH_BYTES, TensorEntry, parse_header, read_header
from l4pack.checkpoint.pth import PthHeader, parse_pth, read_pth
from l4pack.checkpoint.source import INDEX_NAME, Checkpoint, LocalStore, assemble, parse_index
from l4pack.datafile import parse_json
from l4pack.errors import BudgetError, HubError, SourceError
from l4pack.hub.client import hub_api, hub_errors, patiently
from l4pack.hub.exchange import ASTRAY, Transfer, transferring
from l4pack.model.config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from l4pack.model.params import MAX_PARAMS_BYTES, PARAMS_NAME, parse_params
from l4pack.units import human_bytes
from l4pack.work.folder import FETCHED, claim

HEADER_THREADS = 8
IS_IT = "is this a Llama 4 checkpoint?"
MAX_SHARDS = 2000
MAX_COMPANION = 500_000_000  # bytes of a tokenizer, with room
MAX_REMOTE_BYTES = 32_000_000  # of an index, and of all headers together
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the Hub lists it: bytes, and SHA-256 (large files) or git's name of the content (others)."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def identity(self) -> str:
        """Changes when the content does."""
        return self.sha256 or self.blob_id or str(self.size)

    def transfer(self, commit: str) -> Transfer:
        """What to hold the file to on its way."""
        return Transfer(self.name, self.size, self.identity, commit)


def open_hub(
    repo_id: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    fetch_as_you_go: bool = False,
    folder: Path | None = None,
    include: Sequence[str] = (),
    given: Given | None = None,
) -> Checkpoint:
    """Open a Hub repository's checkpoint; no byte of a weight is fetched yet.

    Shards are fetched into the client's cache as they are asked for. With `fetch_as_you_go` they are fetched into
    `folder` instead, and deleted there when they are released. `given` are companions from elsewhere.
    Raises HubError, or SourceError for what the repository holds.
    """
    api = hub_api(endpoint, token)
    if is_offline_mode():
        return _open_cached(api, repo_id, revision, include, given)
    with hub_errors(api, repo_id, revision):
        remote = open_remote(api, repo_id, revision)
        if is_consolidated(remote.files):
            return _open_consolidated(remote, folder if fetch_as_you_go else None, include, given)
        if CONFIG_NAME not in remote.files:
            refuse_adapter(remote.files, repo_id)
            refuse_gguf(repo_id, remote.files)
        config = parse_config(_json(remote.small(CONFIG_NAME, MAX_CONFIG_BYTES)), f"{repo_id}: config.json")
        headers, weight_map = _headers(remote)
    store = HubStore(remote, headers, folder if fetch_as_you_go else None)
    sizes = {name: file.size for name, file in remote.files.items()}
    opened = assemble(repo_id, config, headers, weight_map, sizes, include)
    opened = replace(opened, store=store, revision=remote.revision)
    return opened if given is None else beside(opened, given)


def _open_consolidated(remote: Remote, folder: Path | None, include: Sequence[str], given: Given | None) -> Checkpoint:
    """Meta's files: their directories and pickles by range requests, some 3 of a file."""
    shards = shard_files(remote.files, remote.repo_id)
    same = Counter(remote.files[file].identity for file in shards).most_common(1)
    if same[0][1] > 1:
        raise SourceError(
            f"{remote.repo_id}: two of its shards are one file", hint="the upload went wrong: ask its owner"
        )
    params = parse_params(remote.small(PARAMS_NAME, MAX_PARAMS_BYTES), f"{remote.repo_id}: {PARAMS_NAME}")
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        headers = dict(zip(shards, threads.map(lambda file: _pth_header(remote, file), shards), strict=True))
    sizes = {name: file.size for name, file in remote.files.items()}
    opened = compose(remote.repo_id, params, headers, sizes, include, given)
    store = HubStore(remote, headers, folder, reread=read_pth)
    opened = replace(opened, store=store, revision=remote.revision)
    return opened if given is None else beside(opened, given)


def _pth_header(remote: Remote, file: str) -> PthHeader:
    size = remote.files[file].size
    return parse_pth(
        lambda start, nbytes: remote.part(file, start, min(nbytes, size - start)), size, file, trusting=True
    )


def given_repository(
    repo_id: str, revision: str | None = None, *, endpoint: str | None = None, token: str | None = None
) -> Given:
    """The companions of a repository and its config.json, fetched into the client's cache. Raises HubError, SourceError."""
    api = hub_api(endpoint, token)
    if is_offline_mode():
        with hub_errors(api, repo_id, revision):
            return given_folder(Path(snapshot_download(repo_id, revision=revision, local_files_only=True)), repo_id)
    with hub_errors(api, repo_id, revision):
        remote = open_remote(api, repo_id, revision)
    store = HubStore(remote, {})
    large = next(
        (name for name in remote.files if is_companion(name) and remote.files[name].size > MAX_COMPANION), None
    )
    if large is not None:
        raise SourceError(f"{repo_id}: {large} is implausibly large", hint=IS_IT)
    files = {name: store.path(name) for name in sorted(remote.files) if is_companion(name)}
    config = store.path(CONFIG_NAME) if CONFIG_NAME in remote.files else Path(CONFIG_NAME)
    return given_files(repo_id, files, config)


def open_remote(api: HfApi, repo_id: str, revision: str | None) -> Remote:
    """A repository's listing at the commit a revision (None: the default branch) stands at now."""
    info = patiently(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    if revision is not None and COMMIT.fullmatch(revision) and revision != info.sha:
        raise HubError(f"{repo_id}: asked for {revision}, the Hub answered with {info.sha}", hint=ASTRAY)
    return Remote(api, repo_id, str(info.sha), _listing(info.siblings or []))


def _open_cached(
    api: HfApi, repo_id: str, revision: str | None, include: Sequence[str], given: Given | None
) -> Checkpoint:
    """What the client's cache holds of a repository, when the network is not to be used."""
    with hub_errors(api, repo_id, revision):
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    return open_any_folder(folder, include, given)


def fetch_adapter(repo_id: str, revision: str | None) -> AdapterFiles:
    """A LoRA adapter's files from a Hub repository. Raises HubError, SourceError where it holds none."""
    api = hub_api(None, None)
    with hub_errors(api, repo_id, revision):
        if is_offline_mode():
            folder = Path(
                snapshot_download(
                    repo_id, revision=revision, local_files_only=True, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]
                )
            )
            refuse_other_files(repo_id, {path.name for path in folder.iterdir()})
            return AdapterFiles(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS, repo_id, folder.name)
        remote = open_remote(api, repo_id, revision)
    refuse_other_files(repo_id, set(remote.files))
    store = HubStore(remote, {})
    return AdapterFiles(store.path(ADAPTER_CONFIG), store.path(ADAPTER_WEIGHTS), repo_id, remote.revision)


def _listing(siblings: Sequence[Any]) -> dict[str, RemoteFile]:
    """The repository's files, those with names that would lead out of a folder left out."""
    found = {}
    for file in siblings:
        parts = file.rfilename.split("/")
        if "\\" not in file.rfilename and not {"", ".", ".."} & set(parts) and file.size is not None:
            sha256 = file.lfs.sha256 if file.lfs else None
            found[file.rfilename] = RemoteFile(file.rfilename, file.size, sha256, None if sha256 else file.blob_id)
    return found


@dataclass(frozen=True)
class Remote:
    """A repository at one commit."""

    api: HfApi = field(repr=False)
    repo_id: str
    revision: str
    files: Mapping[str, RemoteFile]

    def small(self, name: str, limit: int) -> bytes:
        """The whole content of a file that must not be larger than `limit` bytes, checked. Raises SourceError."""
        file = self.files.get(name)
        if file is None:
            raise SourceError(f"{self.repo_id} has no {name}", hint="name a repository that holds a whole checkpoint")
        if file.size > limit:
            raise SourceError(f"{self.repo_id}: {name} is implausibly large", hint=IS_IT)
        content = self.part(name, 0, file.size)
        if not has_digest(file, content):
            raise HubError(f"{self.repo_id}: {name} arrived damaged", hint="run the same command again")
        return content

    def part(self, name: str, start: int, nbytes: int) -> bytes:
        """Bytes `start` to `start + nbytes` of a file, and not one more, whatever the server sends."""
        if nbytes == 0:
            return b""
        with transferring(self.files[name].transfer(self.revision)):
            return patiently(lambda: self._part(name, start, nbytes))

    def _part(self, name: str, start: int, nbytes: int) -> bytes:
        url = hf_hub_url(self.repo_id, name, revision=self.revision, endpoint=self.api.endpoint)
        span = {"Range": f"bytes={start}-{start + nbytes - 1}"}
        headers = build_hf_headers(token=self.api.token, headers=span)
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and (start, nbytes) != (0, self.files[name].size):
                raise HubError(f"{self.repo_id}: the server does not serve parts of files", hint="download it first")
            content = response.read()  # no more of it than was asked for: the client sees to that
        if len(content) != nbytes:
            raise HubError(f"{self.repo_id}: a part of {name} arrived wrong", hint="run the same command again")
        return content


def _json(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise SourceError(f"config.json: not JSON ({error})", hint=IS_IT) from error
    if not isinstance(value, dict):
        raise SourceError("config.json: not an object", hint=IS_IT)
    return value


def _headers(remote: Remote) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, str] | None]:
    weight_map = parse_index(remote.small(INDEX_NAME, MAX_REMOTE_BYTES)) if INDEX_NAME in remote.files else None
    if weight_map:
        refuse_two_models(remote.files, weight_map, remote.repo_id)
    shards = sorted(set(weight_map.values())) if weight_map else [single_weight_file(remote.files, remote.repo_id)]
    missing = [file for file in shards if file not in remote.files]
    if missing:
        raise SourceError(
            f"{remote.repo_id}: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}",
            hint="the upload was not finished: ask its owner, or choose another revision",
        )
    lengths = header_lengths(remote, shards)
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        headers = list(threads.map(lambda file: _header(remote, file, lengths[file]), shards))
    return dict(zip(shards, headers, strict=True)), weight_map


def header_lengths(remote: Remote, shards: Sequence[str]) -> dict[str, int]:
    """Bytes of each shard's header, as its first bytes say. Raises SourceError for what no checkpoint has."""
    if len(shards) > MAX_SHARDS:
        raise SourceError(f"{remote.repo_id}: {len(shards):,} shards are implausible", hint=IS_IT)
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        lengths = list(threads.map(lambda file: _header_length(remote, file), shards))
    if sum(lengths) > MAX_REMOTE_BYTES:
        raise SourceError(f"{remote.repo_id}: headers of {sum(lengths):,} bytes are implausible", hint=IS_IT)
    return dict(zip(shards, lengths, strict=True))


def _header_length(remote: Remote, file: str) -> int:
    """Bytes of one shard's header, as the file's first bytes say."""
    size = remote.files[file].size
    length = int.from_bytes(remote.part(file, 0, min(LENGTH_BYTES, size)), "little")
    if size < LENGTH_BYTES or length > min(MAX_REMOTE_BYTES, size - LENGTH_BYTES):
        raise SourceError(
            f"{file} claims a header of {length:,} bytes in a file of {size:,}",
            hint="the file is damaged in the repository",
        )
    return length


def _header(remote: Remote, file: str, length: int) -> dict[str, TensorEntry]:
    data_bytes = remote.files[file].size - LENGTH_BYTES - length
    return parse_header(remote.part(file, LENGTH_BYTES, length), data_bytes, file)


def has_digest(file: RemoteFile, content: bytes) -> bool:
    """Whether bytes are the content the Hub lists."""
    if file.sha256:
        return hashlib.sha256(content).hexdigest() == file.sha256
    return file.blob_id is None or hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id


@dataclass
class HubStore:
    """The files of a Hub repository, fetched when asked for. Safe to use from several threads.

    `folder` is None to keep files in the client's cache, or a private folder that `release` deletes from.
    """

    remote: Remote
    headers: Mapping[str, Any] = field(repr=False)
    folder: Path | None = None
    reread: Callable[[Path, str], Any] = read_header
    elsewhere: Mapping[str, Path] = field(default_factory=dict, repr=False)  # files of other origin, by name
    _checked: dict[str, Path] = field(default_factory=dict, repr=False)
    _locks: defaultdict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock), repr=False)

    @property
    def fetches(self) -> bool:
        """Whether shards are dropped when they are released."""
        return self.folder is not None

    def path(self, file: str) -> Path:
        """The file on this machine, fetched and checked first if need be. Raises HubError."""
        if file in self.elsewhere:
            return self.elsewhere[file]
        with self._locks[file]:
            if file not in self._checked:
                self._checked[file] = self._fetch(file)
            return self._checked[file]

    def release(self, file: str) -> None:
        """Delete a shard from the private folder; the client's cache is left as it is."""
        if file in self.elsewhere:
            return
        with self._locks[file]:
            if self.folder is not None:
                self._checked.pop(file, None)
                (self.folder / file).unlink(missing_ok=True)  # an earlier run may have left it

    def identity(self, file: str) -> str:
        """The digest the Hub lists for the file."""
        if file in self.elsewhere:
            return LocalStore(Path(), self.elsewhere).identity(file)
        return self.remote.files[file].identity

    def small(self, file: str, limit: int) -> bytes:
        """A small file's content, held in memory and checked; nothing is kept. Raises SourceError, HubError."""
        if file in self.elsewhere:
            return LocalStore(Path(), self.elsewhere).small(file, limit)
        with hub_errors(self.remote.api, self.remote.repo_id, self.remote.revision):
            return self.remote.small(file, limit)

    def beside(self, files: Mapping[str, Path]) -> HubStore:
        """The repository, and files on this machine."""
        return HubStore(self.remote, self.headers, self.folder, self.reread, {**self.elsewhere, **files})

    def _fetch(self, file: str) -> Path:
        api, repo_id, revision = self.remote.api, self.remote.repo_id, self.remote.revision
        if file not in self.remote.files:
            raise SourceError(f"{repo_id} has no {file}", hint="is the repository complete?")
        if self.folder is not None:
            claim(self.folder, FETCHED)
        cached = self._is_cached(file)
        self.check_room([file])
        with hub_errors(api, repo_id, revision), transferring(self.remote.files[file].transfer(revision)):
            path = Path(patiently(lambda: api.hf_hub_download(repo_id, file, revision=revision, local_dir=self.folder)))
        self._check(file, path, digest=not cached)
        return path

    def _is_cached(self, file: str) -> bool:
        found = try_to_load_from_cache(self.remote.repo_id, file, revision=self.remote.revision)
        return self.folder is None and isinstance(found, str)

    def check_room(self, files: Sequence[str]) -> None:
        """Raise BudgetError where the disk has no room for those of the files that are not there yet."""
        folder = (self.folder or Path(constants.HF_HUB_CACHE)).absolute()
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        needed = sum(self.remote.files[file].size for file in files if not self._is_cached(file))
        free = shutil.disk_usage(there).free
        if needed > free:
            what = f"{files[0]} takes" if len(files) == 1 else f"{len(files)} files take"
            raise BudgetError(
                f"{folder}: {what} {human_bytes(needed)}, and {human_bytes(free)} are free",
                hint="free some space, or set HF_HOME to a larger disk",
            )

    def _check(self, file: str, path: Path, *, digest: bool) -> None:
        """Compare with the Hub's listing and with the header read before; a wrong file is not kept."""
        listed = self.remote.files[file]
        good = path.stat().st_size == listed.size and (not digest or _digest_agrees(listed, path))
        if good and file in self.headers:
            good = self.reread(path, file) == self.headers[file]
        if not good:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise HubError(
                f"{self.remote.repo_id}: {file} arrived damaged (size or digest is not the Hub's)",
                hint="run the same command again",
            )


def _digest_agrees(file: RemoteFile, path: Path) -> bool:
    if file.sha256 is None:
        return has_digest(file, path.read_bytes())
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
