"""Uploading an artifact's files to a Hub repository: planned first, resumable, compared afterwards.

Large files are sent one by one to the Hub's storage, which keeps what it has, so a second run sends only what is
missing; through Xet where `hf_xet` is installed, by LFS otherwise. One commit at the end makes all of it visible at
once. The commit's message lists the digests of what was put there, so that a later push knows its own files from
others': only its own are replaced or deleted unasked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from l4pack.checkpoint.companions import belongs, folder_files
from l4pack.checkpoint.hub import RemoteFile
from l4pack.checkpoint.source import HUB_ID
from l4pack.errors import HubError, UsageError
from l4pack.hub.client import hub_errors, patiently
from l4pack.hub.exchange import ASTRAY

MAIN = "main"
CHUNK = 8 * 1024**2
SMALL_FILE = 64 * 1024
MAX_FILES = 100_000
_RECORD = re.compile(r"^- (\S+) sha256:([0-9a-f]{64}) git:([0-9a-f]{40})$", re.MULTILINE)
Advance = Callable[[int], None]


class FileChange(StrEnum):
    """What happens to a file of the repository."""

    ADD = "add"
    REPLACE = "replace"
    KEEP = "keep"
    DELETE = "delete"
    LEAVE = "leave"


@dataclass(frozen=True)
class Destination:
    """Where an artifact goes, and how."""

    repo_id: str
    revision: str = MAIN
    public: bool = False
    pull_request: bool = False
    overwrite: bool = False
    gated: bool = False
    tag: str | None = None
    collection: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for what is no repository's name."""
        if HUB_ID.fullmatch(self.repo_id) is None or "@" in self.repo_id:
            raise UsageError(f"'{self.repo_id}' is not a repository's name", hint="write ORGANISATION/NAME")


@dataclass(frozen=True)
class LocalFile:
    """A file to be uploaded."""

    name: str
    path: Path
    size: int

    @cached_property
    def digests(self) -> tuple[str, str]:
        """Hex SHA-256 of the content, and git's name of it, in one reading."""
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        with self.path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                sha256.update(chunk)
                git.update(chunk)
        return sha256.hexdigest(), git.hexdigest()

    def is_same(self, remote: RemoteFile) -> bool:
        """Whether the Hub lists the same content."""
        return self.size == remote.size and remote.identity in self.digests


@dataclass(frozen=True)
class FileStep:
    """One file of the repository and what is to happen to it."""

    name: str
    size: int
    action: FileChange


@dataclass(frozen=True)
class UploadPlan:
    """What an upload will do."""

    target: Destination
    local: Mapping[str, LocalFile]
    steps: tuple[FileStep, ...]
    exists: bool
    branch_exists: bool
    private: bool
    head: str | None
    left_behind: tuple[str, ...] = ()

    @property
    def send_bytes(self) -> int:
        """Bytes of the files to be added or replaced."""
        return sum(step.size for step in self.steps if step.action in (FileChange.ADD, FileChange.REPLACE))

    def names(self, *actions: FileChange) -> list[str]:
        """Files with one of the actions."""
        return [step.name for step in self.steps if step.action in actions]


@dataclass(frozen=True)
class Uploaded:
    """What an upload did."""

    commit: str
    url: str
    pull_request: str | None
    files: int


def local_files(folder: Path, recorded: Collection[str] = ()) -> dict[str, LocalFile]:
    """The files of an artifact's folder that go to the Hub; `recorded` are those of its manifest. Raises HubError.

    What neither belongs to an artifact nor was carried into this one when it was made stays here.
    """
    found = {}
    for name, size in folder_files(folder, tuple(recorded)).items():
        if belongs(name, recorded):
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise HubError(f"{name} is a link that leaves {folder}", hint="put the file itself there")
            found[name] = LocalFile(name, path, size)
    return found


def left_here(folder: Path, sent: Collection[str]) -> tuple[str, ...]:
    """Files and folders of an artifact's folder that don't go to the Hub, hidden ones aside."""
    there = {name.partition("/")[0] + "/" * ("/" in name) for name in folder_files(folder) if name not in sent}
    return tuple(sorted(name for name in there if not name.startswith(".") and not _within(name, sent)))


def _within(folder: str, sent: Collection[str]) -> bool:
    return folder.endswith("/") and any(name.startswith(folder) for name in sent)


def plan_upload(api: HfApi, target: Destination, local: Mapping[str, LocalFile]) -> UploadPlan:
    """Compare a folder's files with the repository's. Changes nothing. Raises HubError."""
    with hub_errors(api, target.repo_id, target.revision):
        info = _repository(api, target.repo_id)
        remote, head, branch = _remote_state(api, target, exists=info is not None)
        own = _own_digests(api, target, remote, local) if head else {}
    private = bool(info.private) if info is not None else not target.public
    _check_visibility(target, exists=info is not None, private=private)
    steps = [_step(file, remote.get(name), own, target) for name, file in sorted(local.items())]
    steps += [_extra(remote[name], own) for name in sorted(set(remote) - set(local))]
    return UploadPlan(target, local, tuple(steps), info is not None, branch, private, head)


def upload(api: HfApi, plan: UploadPlan, message: str, advance: Advance = lambda _: None) -> Uploaded:
    """Do what a plan says, then compare every digest; `advance` is told the bytes sent or found there. Raises HubError.

    Safe to run again after any failure: storage keeps what it got, and nothing is visible before the commit.
    """
    target = plan.target
    with hub_errors(api, target.repo_id, target.revision):
        _prepare(api, plan)
        additions = [_addition(plan.local[name]) for name in plan.names(FileChange.ADD, FileChange.REPLACE)]
        for group in _groups(additions):
            _send(api, target, group)
            advance(sum(addition.upload_info.size for addition in group))
        commit, pull_request = _commit(api, plan, additions, message)
        revision = pull_request or commit
        compare_digests(plan.local, listing(api, target.repo_id, revision), target.repo_id)
        _label(api, target, commit)
    url = f"{api.endpoint}/{target.repo_id}"
    number = pull_request.rpartition("/")[2] if pull_request else None
    return Uploaded(commit, url, f"{url}/discussions/{number}" if number else None, len(additions))


def listing(api: HfApi, repo_id: str, revision: str) -> dict[str, RemoteFile]:
    """Every file of a repository with the digest the Hub gives it."""
    tree = patiently(
        lambda: list(islice(api.list_repo_tree(repo_id, recursive=True, revision=revision), MAX_FILES + 1))
    )
    found: dict[str, RemoteFile] = {}
    for entry in (entry for entry in tree if isinstance(entry, RepoFile)):
        sha256 = entry.lfs.sha256 if entry.lfs else None
        found[entry.path] = RemoteFile(entry.path, entry.size, sha256, None if sha256 else entry.blob_id)
    if len(tree) > MAX_FILES or len({entry.path for entry in tree}) < len(tree):
        raise HubError(f"{repo_id}: the list of its files has no end, or names one twice", hint=ASTRAY)
    return found


def compare_digests(local: Mapping[str, LocalFile], remote: Mapping[str, RemoteFile], repo_id: str) -> None:
    """Raise HubError unless the repository holds every local file with the same digest."""
    for name, file in local.items():
        if name not in remote:
            raise HubError(f"{repo_id}: {name} is not there after the upload", hint="run the same command again")
        if not file.is_same(remote[name]):
            raise HubError(
                f"{repo_id}: {name} arrived with another digest than it was sent with",
                hint="run the same command again; if it comes back, tell the Hub's support",
            )


def _repository(api: HfApi, repo_id: str) -> Any:
    try:
        return patiently(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        return None


def _remote_state(api: HfApi, target: Destination, *, exists: bool) -> tuple[dict[str, RemoteFile], str | None, bool]:
    """The files a commit will stand on, its head, and whether the branch is there already."""
    if not exists:
        if target.pull_request:
            what = f"{target.repo_id}: no such repository to open a pull request in"
            raise HubError(what, hint="leave --pr out, or check the name")
        return {}, None, target.revision == MAIN
    try:
        info = patiently(lambda: api.model_info(target.repo_id, revision=target.revision))
        return listing(api, target.repo_id, str(info.sha)), str(info.sha), True
    except RevisionNotFoundError:
        if target.pull_request:
            raise
        info = patiently(lambda: api.model_info(target.repo_id))
        return listing(api, target.repo_id, str(info.sha)), str(info.sha), False


def _own_digests(
    api: HfApi, target: Destination, remote: Mapping[str, RemoteFile], local: Mapping[str, LocalFile]
) -> dict[str, set[str]]:
    """Digests by name of all that earlier pushes say they put there; asked for only when it matters."""
    foreign = [name for name, file in remote.items() if name not in local or not local[name].is_same(file)]
    if not [name for name in foreign if not name.startswith(".")]:
        return {}
    start = target.revision
    try:
        commits = patiently(lambda: api.list_repo_commits(target.repo_id, revision=start))
    except RevisionNotFoundError:
        commits = patiently(lambda: api.list_repo_commits(target.repo_id))
    own: dict[str, set[str]] = {}
    for commit in commits:
        for name, sha256, git in _RECORD.findall(commit.message or ""):
            own.setdefault(name, set()).update((sha256, git))
    return own


def _check_visibility(target: Destination, *, exists: bool, private: bool) -> None:
    if exists and not private and not target.public and not target.pull_request:
        raise HubError(f"{target.repo_id} exists and is public", hint="say --public if that is meant")
    if exists and private and target.public:
        raise HubError(
            f"{target.repo_id} exists and is private; l4pack does not change that",
            hint="leave --public out, and publish it in the repository's settings when you are sure",
        )


def _step(file: LocalFile, there: RemoteFile | None, own: Mapping[str, set[str]], target: Destination) -> FileStep:
    if there is None:
        return FileStep(file.name, file.size, FileChange.ADD)
    if file.is_same(there):
        return FileStep(file.name, file.size, FileChange.KEEP)
    if there.identity not in own.get(file.name, ()) and not target.overwrite:
        raise HubError(
            f"{target.repo_id} holds another {file.name}, which l4pack did not put there",
            hint="say --overwrite to replace it, or choose another repository or --revision",
        )
    return FileStep(file.name, file.size, FileChange.REPLACE)


def _extra(there: RemoteFile, own: Mapping[str, set[str]]) -> FileStep:
    mine = there.identity in own.get(there.name, ())
    return FileStep(there.name, there.size, FileChange.DELETE if mine else FileChange.LEAVE)


def _prepare(api: HfApi, plan: UploadPlan) -> None:
    target = plan.target
    if not plan.exists:
        patiently(lambda: api.create_repo(target.repo_id, private=not target.public, exist_ok=True))
    if target.gated:
        patiently(lambda: api.update_repo_settings(target.repo_id, gated="manual"))
        if not patiently(lambda: api.model_info(target.repo_id)).gated:
            raise HubError(f"{target.repo_id}: the Hub did not gate it", hint="gate it in the repository's settings")
    if not plan.branch_exists:
        patiently(lambda: api.create_branch(target.repo_id, branch=target.revision, exist_ok=True))


def _addition(file: LocalFile) -> CommitOperationAdd:
    addition = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.path)
    addition.upload_info.sha256 = bytes.fromhex(file.digests[0])  # known: the client need not read it again for that
    return addition


def _groups(additions: list[CommitOperationAdd]) -> list[list[CommitOperationAdd]]:
    """All small files together, then each large one by itself, so that each is safe before the next is begun."""
    small = [addition for addition in additions if addition.upload_info.size < SMALL_FILE]
    large = [[addition] for addition in additions if addition.upload_info.size >= SMALL_FILE]
    return [small, *large] if small else large


def _send(api: HfApi, target: Destination, additions: list[CommitOperationAdd]) -> None:
    """Send files to storage, except those that storage has or that the commit itself will carry."""

    def send() -> None:
        api.preupload_lfs_files(
            target.repo_id,
            additions,
            revision=target.revision,
            create_pr=target.pull_request,
            num_threads=1,
            free_memory=False,
        )

    patiently(send, signed=api.endpoint)


def _commit(api: HfApi, plan: UploadPlan, additions: list[CommitOperationAdd], message: str) -> tuple[str, str | None]:
    """One commit of everything; its hash, and the pull request's revision if one was opened."""
    target = plan.target
    deletions = [CommitOperationDelete(path_in_repo=name) for name in plan.names(FileChange.DELETE)]
    if not additions and not deletions:
        return str(plan.head), None

    def commit() -> Any:
        return api.create_commit(
            target.repo_id,
            [*additions, *deletions],
            commit_message=message,
            commit_description=_description(plan.local.values()),
            revision=target.revision,
            create_pr=target.pull_request,
            parent_commit=plan.head if plan.exists else None,
        )

    if target.pull_request:  # repeating it could open two
        info = commit()
        return str(info.oid), info.pr_revision
    try:
        return str(patiently(commit).oid), None
    except HfHubHTTPError as error:
        done = _already_committed(api, plan)
        if done is None:
            raise error
        return done, None


def _already_committed(api: HfApi, plan: UploadPlan) -> str | None:
    """The head, when a commit whose answer was lost went through after all."""
    info = patiently(lambda: api.model_info(plan.target.repo_id, revision=plan.target.revision))
    there = listing(api, plan.target.repo_id, str(info.sha))
    same = all(name in there and file.is_same(there[name]) for name, file in plan.local.items())
    return str(info.sha) if same and not set(plan.names(FileChange.DELETE)) & set(there) else None


def _description(files: Iterable[LocalFile]) -> str:
    records = [f"- {file.name} sha256:{file.digests[0]} git:{file.digests[1]}" for file in files]
    return "\n".join(["Put here by l4pack:", "", *records])


def _label(api: HfApi, target: Destination, commit: str) -> None:
    """Tag the commit and add the repository to a collection, unless that is done already."""
    if target.tag is not None:
        if target.tag not in _tags(api, target):
            patiently(lambda: api.create_tag(target.repo_id, tag=str(target.tag), revision=commit, exist_ok=True))
        if _tags(api, target).get(target.tag) != commit:
            raise HubError(
                f"{target.repo_id}: tag {target.tag} stands at another commit; the upload itself is complete",
                hint="choose another --tag",
            )
    if target.collection is not None:
        slug = _collection(api, target, target.collection)
        there = patiently(lambda: api.add_collection_item(slug, target.repo_id, item_type="model", exists_ok=True))
        if target.repo_id not in {item.item_id for item in there.items}:
            raise HubError(
                f"{target.collection} does not hold {target.repo_id} after all; the upload itself is complete",
                hint="add it on the collection's page",
            )


def _collection(api: HfApi, target: Destination, named: str) -> str:
    """The slug of a collection: as given, else of the one with that title among the repository owner's, made if need be."""
    if "/" in named:
        return named
    owner = target.repo_id.partition("/")[0]
    made = patiently(lambda: api.create_collection(named, namespace=owner, private=not target.public, exists_ok=True))
    return str(made.slug)


def _tags(api: HfApi, target: Destination) -> dict[str, str]:
    tags = patiently(lambda: api.list_repo_refs(target.repo_id)).tags
    return {tag.name: tag.target_commit for tag in tags}
