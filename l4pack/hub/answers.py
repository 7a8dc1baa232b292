"""What an answer of the Hub must look like before anything believes it: one schema for each kind of answer.

The client is handed only what the schema names, so that nothing else of an answer ever reaches it. What a Hub sends
where is told by huggingface_hub's own sources; https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md is the
batch's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import to_json

from l4pack.datafile import first_fault

MAX_FILE_BYTES = 2**42
MAX_NAME = 1024
MAX_PARTS = 10_000  # what S3 takes
REASON = 160  # characters of a reason that are shown


def plain_text(text: str) -> str:
    """The text, if every character of it can be shown. Raises ValueError."""
    if not text or len(text) > MAX_NAME or not text.isprintable():
        raise ValueError("not a plain name")
    return text


def file_name(name: str) -> str:
    """A file's name in a repository: below its root, and one that can be written down. Raises ValueError."""
    if {"", ".", ".."} & set(plain_text(name).split("/")):
        raise ValueError("a name that leaves the repository")
    return name


def web_address(text: str) -> str:
    """An http or https address with a host. Raises ValueError."""
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or not text.isprintable():
        raise ValueError("not a web address")
    return text


Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Commit = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
FileSize = Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
FileName = Annotated[str, AfterValidator(file_name)]
PlainText = Annotated[str, AfterValidator(plain_text)]
Address = Annotated[str, StringConstraints(max_length=8192), AfterValidator(web_address)]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class SiblingLfs(_Answer):
    """A large file of a repository."""

    sha256: Digest
    size: FileSize
    pointerSize: FileSize = 0  # noqa: N815 - the Hub's word


class Sibling(_Answer):
    """A file of a repository, as the model's information lists it."""

    rfilename: FileName
    size: FileSize | None = None
    blobId: Commit | None = None  # noqa: N815
    lfs: SiblingLfs | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.lfs is not None and self.size not in (None, self.lfs.size):
            raise ValueError("two sizes for one file")
        return self


class Info(_Answer):
    """A model repository at one commit."""

    id: PlainText
    sha: Commit
    private: bool
    gated: Literal["auto", "manual"] | bool = False
    siblings: list[Sibling]


class EntryLfs(_Answer):
    """A large file of a tree."""

    oid: Digest
    size: FileSize
    pointerSize: FileSize = 0  # noqa: N815


class TreeEntry(_Answer):
    """A file or folder of a tree."""

    type: Literal["file", "directory"]
    path: FileName
    size: FileSize = 0
    oid: Commit
    lfs: EntryLfs | None = None


class Ref(_Answer):
    """A branch or tag."""

    name: PlainText
    ref: PlainText
    targetCommit: Commit  # noqa: N815


class Refs(_Answer):
    """All branches and tags."""

    branches: list[Ref]
    tags: list[Ref]
    converts: list[Ref] = []


class LogEntry(_Answer):
    """A commit of the history; who made it and when is not asked."""

    id: Commit
    title: str = ""
    message: str = ""


class Upload(_Answer):
    """How one file wants to be sent."""

    path: FileName
    uploadMode: Literal["lfs", "regular"]  # noqa: N815
    shouldIgnore: bool = False  # noqa: N815
    oid: Digest | Commit | None = None


class Uploads(_Answer):
    """How files want to be sent."""

    files: list[Upload]


class LfsAction(_Answer):
    """Where something is sent, and with what."""

    href: Address
    header: dict[PlainText, Annotated[str, StringConstraints(max_length=8192)]] = {}

    def addresses(self, size: int) -> list[str]:
        """Where the parts of a file of `size` bytes go: one address, or one for each part. Raises ValueError."""
        if "chunk_size" not in self.header:
            return [self.href]
        parts = {key: value for key, value in self.header.items() if key != "chunk_size" and key[:1].isdigit()}
        count = -(-size // _whole_number(self.header["chunk_size"]))
        if count > MAX_PARTS or sorted(map(_whole_number, parts)) != list(range(1, count + 1)):
            raise ValueError("parts that don't make the file")
        return [self.href, *(web_address(part) for part in parts.values())]


class Actions(_Answer):
    """What is to be done for one large file."""

    upload: LfsAction
    verify: LfsAction | None = None


class BatchError(_Answer):
    """Why a large file is not taken."""

    code: int
    message: str = ""


class BatchObject(_Answer):
    """One large file that the storage has, wants, or refuses."""

    oid: Digest
    size: FileSize
    actions: Actions | None = None
    error: BatchError | None = None


class Batch(_Answer):
    """What the storage says about large files to be sent."""

    objects: list[BatchObject]
    transfer: Literal["basic", "multipart"] | None = None


class Committed(_Answer):
    """A commit that was made."""

    commitOid: Commit  # noqa: N815
    commitUrl: Address  # noqa: N815
    pullRequestUrl: Address | None = None  # noqa: N815


class Created(_Answer):
    """A repository that was made."""

    url: Address


class CollectionItem(_Answer):
    """One entry of a collection."""

    id: PlainText
    type: PlainText
    object_id: PlainText = Field("0", alias="_id")
    position: int = 0


class Collection(_Answer):
    """A collection; its looks are not asked."""

    slug: PlainText
    items: list[CollectionItem]


class NewCollection(_Answer):
    """A collection that was made, or is there already."""

    slug: Annotated[str, StringConstraints(pattern=r"^[\w.\-]+/[\w.\-]+$", max_length=256)]
    items: list[CollectionItem] = []


class Organisation(_Answer):
    """An organisation that an account belongs to, and as what."""

    name: PlainText
    roleInOrg: PlainText | None = None  # noqa: N815


class AccessToken(_Answer):
    """What a token may do at all: read, write, or what is listed for it."""

    role: PlainText | None = None


class Auth(_Answer):
    """By what an account was told."""

    accessToken: AccessToken | None = None  # noqa: N815


class Account(_Answer):
    """Whose token it is."""

    name: PlainText
    orgs: list[Organisation] = []
    auth: Auth = Auth()


@dataclass(frozen=True)
class Asked:
    """A request to the Hub: the endpoint, the part of the path that names a repository, the query, and the body."""

    endpoint: str
    subject: str
    query: str
    body: bytes

    @property
    def posted(self) -> dict[str, Any]:
        """The JSON object that was sent."""
        return dict(json.loads(self.body))


Settle = Callable[[Any, Asked], Any]


@dataclass(frozen=True)
class AnswerKind:
    """One kind of answer: its schema, and what of it and of the request must agree."""

    title: str
    method: str
    path: re.Pattern[str]
    schema: TypeAdapter[Any]
    settle: Settle
    pages: bool = False

    def read(self, content: bytes, asked: Asked) -> bytes:
        """The JSON to pass on. Raises ValueError with a reason fit to be shown."""
        try:
            value = self.settle(self.schema.validate_json(content), asked)
        except ValidationError as error:
            raise ValueError(_reason(error)) from None
        return to_json(value, by_alias=True)


def _reason(error: ValidationError) -> str:
    where, message = first_fault(error)
    text = f"{where}: {message}" if where else message
    return "".join(letter for letter in text if letter.isascii() and letter.isprintable())[:REASON]


def _whole_number(text: str) -> int:
    if re.fullmatch("[0-9]{1,13}", text) is None or int(text) == 0:
        raise ValueError("not a whole number")
    return int(text)


def _different(names: Iterable[str]) -> None:
    """Raise ValueError when two files of a folder's root could be taken for one another."""
    seen: set[str] = set()
    for name in names:
        key = name if "/" in name else name.casefold()
        if key in seen:
            raise ValueError("two files of one name")
        seen.add(key)


def _info(info: Info, asked: Asked) -> Info:
    _different(file.rfilename for file in info.siblings)
    if "blobs" in parse_qs(asked.query) and any(
        file.size is None or (file.lfs is None and file.blobId is None) for file in info.siblings
    ):
        raise ValueError("a file without size or digest")
    return info


def _tree(page: list[TreeEntry], _: Asked) -> list[TreeEntry]:
    _different(entry.path for entry in page)
    if any(entry.lfs is not None and entry.lfs.size != entry.size for entry in page):
        raise ValueError("two sizes for one file")
    return page


def _log(page: list[LogEntry], _: Asked) -> list[dict[str, Any]]:
    return [{**entry.model_dump(), "authors": [], "date": "1970-01-01T00:00:00.000Z"} for entry in page]


def _uploads(answer: Uploads, asked: Asked) -> Uploads:
    wanted = sorted(file["path"] for file in asked.posted["files"])
    if sorted(file.path for file in answer.files) != wanted:
        raise ValueError("other files than were asked about")
    return answer


def _batch(answer: Batch, asked: Asked) -> dict[str, Any]:
    wanted = {item["oid"]: item["size"] for item in asked.posted["objects"]}
    if {item.oid: item.size for item in answer.objects} != wanted or len(answer.objects) != len(wanted):
        raise ValueError("other objects than were asked about")
    secure = urlsplit(asked.endpoint).scheme == "https"
    for actions in (item.actions for item in answer.objects if item.actions is not None):
        verify = [actions.verify.href] if actions.verify is not None else []
        if any(not href.startswith((f"{asked.endpoint}/", "https://huggingface.co/")) for href in verify):
            raise ValueError("a check elsewhere")  # the token goes along with it
        item = next(item for item in answer.objects if item.actions is actions)
        if secure and any(urlsplit(href).scheme != "https" for href in actions.upload.addresses(item.size)):
            raise ValueError("an address without https")
        actions.upload.addresses(item.size)
    return answer.model_dump(exclude_none=True)


def _committed(answer: Committed, asked: Asked) -> dict[str, Any]:
    here = f"{asked.endpoint}/{asked.subject}"
    made = {"commitOid": answer.commitOid, "commitUrl": f"{here}/commit/{answer.commitOid}"}
    if "create_pr" not in parse_qs(asked.query):
        return made
    number = re.search(r"/discussions/([0-9]{1,9})$", answer.pullRequestUrl or "")
    if number is None:
        raise ValueError("no pull request")
    return {**made, "pullRequestUrl": f"{here}/discussions/{number[1]}"}


def _created(_: Created | None, asked: Asked) -> dict[str, str]:
    posted = asked.posted
    return {"url": f"{asked.endpoint}/" + "/".join(filter(None, [posted.get("organization"), posted["name"]]))}


def _collection(answer: Collection, _: Asked) -> dict[str, Any]:
    looks = {"title": answer.slug, "owner": {}, "lastUpdated": "1970-01-01T00:00:00.000Z", "position": 0}
    looks |= {"private": True, "theme": "blue", "upvotes": 0}
    return {"slug": answer.slug, "items": [item.model_dump(by_alias=True) for item in answer.items], **looks}


def _new_collection(answer: NewCollection, _: Asked) -> dict[str, Any]:
    return _collection(Collection(slug=answer.slug, items=answer.items), _)


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _kind(
    title: str, request: str, schema: Any, settle: Settle = lambda value, _: value, pages: bool = False
) -> AnswerKind:
    method, _, path = request.partition(" ")
    return AnswerKind(title, method, re.compile(f"(.*){path}"), TypeAdapter(schema), settle, pages)


_ID = "([^/]+/[^/]+)"
_MODEL = f"/api/models/{_ID}"
CREATE = _kind("a new repository", "POST /api/repos/create()", Created, _created)
CREATE_COLLECTION = _kind("a new collection", "POST /api/collections()", NewCollection, _new_collection)
KINDS = (
    _kind("a model's information", f"GET {_MODEL}(?:/revision/.+)?", Info, _info),
    _kind("a list of files", f"GET {_MODEL}/tree/.+", list[TreeEntry], _tree, pages=True),
    _kind("a list of commits", f"GET {_MODEL}/commits/.+", list[LogEntry], _log, pages=True),
    _kind("branches and tags", f"GET {_MODEL}/refs", Refs),
    _kind("leave to read storage", f"GET {_MODEL}/xet-read-token/.+", dict[str, Any], _nothing),
    _kind("upload modes", f"POST {_MODEL}/preupload/.+", Uploads, _uploads),
    _kind("upload addresses", f"POST /{_ID}.git/info/lfs/objects/batch", Batch, _batch),
    _kind("a commit", f"POST {_MODEL}/commit/.+", Committed, _committed),
    CREATE,
    _kind("an account", "GET /api/whoami-v2()", Account),
    _kind("a check of the card", "POST /api/validate-yaml()", dict[str, Any], _nothing),
    CREATE_COLLECTION,
    _kind("a collection", f"GET /api/collections/{_ID}", Collection, _collection),
    _kind("a collection", f"POST /api/collections/{_ID}/items", Collection, _collection),
)


def find_kind(method: str, path: str) -> tuple[AnswerKind, str, str] | None:
    """The kind of answer that a request wants, what precedes the path (an endpoint's own), and the repository."""
    for kind in KINDS:
        found = kind.path.fullmatch(path) if kind.method == method else None
        if found is not None:
            return kind, found[1], found[2]
    return None
