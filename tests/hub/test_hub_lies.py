"""A Hub that lies, or what answers in its place: always one line, exit code 5, soon, and nothing where it should not be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_lies import CHUNKED, HEAD, LOGIN, SPACES, changed, endless, everywhere, pours, says
from hub_server import HubServer, Reply, running_hub
from huggingface_hub import get_session
from small_checkpoint import checkpoint_files

from l4pack.checkpoint.hub import open_hub
from l4pack.errors import BudgetError, HubError
from l4pack.hub import exchange
from l4pack.hub.client import hub_api
from l4pack.hub.exchange import Bounds, Transfer, transferring
from l4pack.publish.licence import audit
from l4pack.publish.upload import Destination, local_files, plan_upload, upload

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

REPO = "me/Llama-4-Tiny"
SECRET = "hf_ThisMustNeverBeSeen"
SHARD = "model-00001-of-00003.safetensors"
TINY = Bounds(
    answer_bytes=200_000,
    call_bytes=400_000,
    look_seconds=0.3,
    change_seconds=0.6,
    window_seconds=0.4,
    window_bytes=4000,
    longest_wait=0,
)
SENT = {
    "README.md": b"---\nlicense: other\n---\n# Llama\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 400,
    "small.safetensors": b"small",
}


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with running_hub() as hub:
        hub.part_bytes = 50_000
        yield hub


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test's own cache and token, tiny bounds, and nobody waits between two tries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(exchange, "BOUNDS", TINY)
    for module in ("l4pack.hub.client", "huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", Hurried())


class Hurried:
    """The clock, without its sleep."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        assert 0 <= seconds <= 61


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub with nothing in it, at the address that HF_ENDPOINT would give."""
    for kept in (server.repos, server.large, server.uploads, server.collections):
        kept.clear()
    server.faults.clear()
    server.seen.clear()
    server.poured = 0
    server.tokens = {SECRET: {"me"}}
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    here = template.replace(huggingface_hub.constants.ENDPOINT, server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", here)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    for name, content in SENT.items():
        (made / name).write_bytes(content)
    return made


def refused(action: Callable[[], Any]) -> str | None:
    """What a Hub that lies is answered with: one line, soon, without a secret; None when it got away with it."""
    begun = time.perf_counter()
    error = caught(action)
    assert time.perf_counter() - begun < 8
    if error is None:
        return None
    said = error.message + error.hint
    assert error.exit_code == 5
    assert error.hint
    assert said.isprintable()
    assert len(said) < 600
    assert SECRET not in said
    assert "signature" not in said
    return said


def caught(action: Callable[[], Any]) -> HubError | None:
    try:
        action()
    except HubError as error:
        return error
    return None


def opens(hub: HubServer, folder: Path) -> None:
    open_hub(REPO, endpoint=hub.endpoint)


def sends(**options: Any) -> Callable[[HubServer, Path], None]:
    def send(hub: HubServer, folder: Path) -> None:
        api = hub_api(hub.endpoint, None)
        upload(api, plan_upload(api, Destination(REPO, **options), local_files(folder, SENT)), "Upload")
        revision = options.get("revision", "main")
        there = hub.repos[REPO].files("refs/pr/1" if options.get("pull_request") else revision)
        assert {name: there[name].content for name in SENT} == SENT
        assert options.get("tag") is None or hub.repos[REPO].tags[options["tag"]] == hub.repos[REPO].refs[revision]
        assert not options.get("gated") or hub.repos[REPO].gated
        assert options.get("collection") is None or [REPO] in hub.collections.values()

    return send


def fetches(hub: HubServer, folder: Path) -> None:
    path = open_hub(REPO, endpoint=hub.endpoint).store.path(SHARD)
    assert path.read_bytes() == checkpoint_files()[SHARD]


NEW, OLD = False, True
PLACES: dict[str, tuple[bool, str, str, Callable[[HubServer, Path], None]]] = {
    "information": (OLD, "GET", f"^/api/models/{REPO}$", opens),
    "a small file": (OLD, "GET", "/resolve/.*/config.json", opens),
    "a shard's header": (OLD, "GET", "^/large/", opens),
    "a shard's facts": (OLD, "HEAD", "/resolve/", fetches),
    "the files before": (OLD, "GET", "/tree/", sends()),
    "the commits before": (OLD, "GET", "/commits/", sends(overwrite=True)),
    "a new repository": (NEW, "POST", "/repos/create", sends()),
    "the card": (NEW, "POST", "/validate-yaml", sends()),
    "upload modes": (NEW, "POST", "/preupload/", sends()),
    "upload addresses": (NEW, "POST", "/objects/batch", sends()),
    "storage": (NEW, "PUT", "^/part/", sends()),
    "joining the parts": (NEW, "POST", "/complete_multipart", sends()),
    "the check of a part": (NEW, "POST", "/lfs/verify", sends()),
    "the commit": (NEW, "POST", "/commit/", sends()),
    "a pull request": (OLD, "POST", "/commit/", sends(pull_request=True, overwrite=True)),
    "a branch": (OLD, "POST", "/branch/", sends(revision="next", overwrite=True)),
    "gating": (NEW, "PUT", "/settings", sends(gated=True)),
    "branches and tags": (NEW, "GET", "/refs$", sends(tag="v1")),
    "a tag": (NEW, "POST", "/tag/", sends(tag="v1")),
    "a collection": (NEW, "POST", "^/api/collections/", sends(collection="me/best")),
    "a new collection": (NEW, "POST", "^/api/collections$", sends(collection="Best of all")),
}


def set_up(hub: HubServer, place: str) -> Callable[[HubServer, Path], None]:
    exists, _, _, action = PLACES[place]
    hub.collections["me/best"] = []
    if exists:
        hub.add(REPO, {**checkpoint_files(), "config.json": checkpoint_files()["config.json"]}, private=True)
    return action


COMMON = [
    "a log-in page", "null", "a list", "204", "307 to itself", "an odd wait", "a bomb", "an answer without end",
    "less than announced",
]  # fmt: skip
TOLD = [(place, lie) for place in PLACES for lie in COMMON]
TOLD += [(place, lie) for place in ("information", "a shard's header") for lie in everywhere() if lie not in COMMON]
TOLD += [(place, "a byte at a time") for place in ("storage", "upload addresses", "the commit", "a tag")]
HARMLESS = (
    "the card",
    "the commits before",
    "joining the parts",
    "the check of a part",
    "a branch",
    "gating",
    "a tag",
    "storage",
)


@pytest.mark.parametrize(("place", "lie"), TOLD, ids=map(", ".join, TOLD))
def test_every_lie_in_every_place(hub, folder, place, lie):
    """One line and exit code 5; or, where an answer may say anything, all that was asked for is true."""
    action = set_up(hub, place)
    fault = hub.fault(PLACES[place][1], PLACES[place][2], times=999, raw=everywhere()[lie])
    said = refused(lambda: action(hub, folder))
    assert fault.hits
    assert said or place in HARMLESS
    assert hub.poured < 20_000_000


BAD_NAMES = ["", "/etc/passwd", "../evil", "a/../../evil", "a\x00b", "\x1b[31m", "x" * 2000, "\u202eevil"]
BAD_SIZES = [-1, 10**30, True, "7", None]
BAD_DIGESTS = ["", "../../../evil", "A" * 64, 7]
BAD_COMMITS = ["", "../../evil", "0" * 39, 7]
BAD_ADDRESSES = ["file:///etc/passwd", "http://", "http://[::1", 7]
FIELDS: dict[str, list[tuple[tuple[Any, ...], list[Any]]]] = {
    "information": [
        (("sha",), BAD_COMMITS), (("private",), [None, 0, "no"]), (("gated",), ["maybe", 7, []]),
        (("siblings",), [None, {}, "x", [None], [[]]]), (("siblings", 0, "rfilename"), [*BAD_NAMES, 7, None, "CONFIG.JSON"]),
        (("siblings", 0, "size"), BAD_SIZES), (("siblings", 0, "blobId"), BAD_COMMITS),
        (("siblings", 2, "lfs"), [{}, [], "x"]), (("siblings", 2, "lfs", "sha256"), BAD_DIGESTS),
        (("siblings", 2, "lfs", "size"), [*BAD_SIZES, 7]),
    ],
    "the files before": [
        ((0, "path"), [*BAD_NAMES, 7, None, "CONFIG.JSON", ...]), ((0, "size"), BAD_SIZES),
        ((0, "oid"), BAD_COMMITS), ((0, "type"), ["link", 7, None]), ((2, "lfs"), [{}, [], "x"]),
        ((2, "lfs", "oid"), BAD_DIGESTS), ((2, "lfs", "size"), [*BAD_SIZES, 7]),
    ],
    "the commits before": [((0, "id"), BAD_COMMITS), ((0, "message"), [7, None, []]), ((0, "title"), [7, []])],
    "upload modes": [
        (("files",), [None, {}, [], [None]]), (("files", 0, "path"), [*BAD_NAMES, 7, None, "other"]),
        (("files", 0, "uploadMode"), ["xet", 7, None]), (("files", 0, "oid"), [7, "../x"]),
        (("files", 0, "shouldIgnore"), [7, "no", True]),
    ],
    "upload addresses": [
        (("objects",), [None, {}, [], [None]]), (("objects", 0, "oid"), BAD_DIGESTS), (("objects", 0, "size"), BAD_SIZES),
        (("objects", 0, "actions"), [{}, [], "x", {"upload": None}]), (("transfer",), ["xet", 7]),
        (("objects", 0, "error"), [{"code": 404, "message": "no\nsuch"}, {}, "x", 7]),
        (("objects", 0, "actions", "upload", "href"), BAD_ADDRESSES),
        (("objects", 0, "actions", "upload", "header"), [7, [], {"chunk_size": "\u00b2"}, {"chunk_size": "0"}, {"1": 7}]),
        (("objects", 0, "actions", "verify", "href"), [*BAD_ADDRESSES, "http://localhost:1/verify"]),
    ],
    "the commit": [(("commitOid",), BAD_COMMITS), (("commitUrl",), BAD_ADDRESSES)],
    "a pull request": [(("pullRequestUrl",), [*BAD_ADDRESSES, "http://x/discussions/\u00b2", "http://x/discussions/"])],
    "a new repository": [(("url",), BAD_ADDRESSES)],
    "branches and tags": [
        (("tags",), [None, {}, [None]]), (("branches",), [7]), (("branches", 0, "targetCommit"), BAD_COMMITS),
        (("branches", 0, "name"), [7, None, "\x00", ""]),
    ],
    "a new collection": [(("slug",), [7, None, "a", "../x/y", "a/b c"])],
    "a collection": [(("items",), [None, {}, [], [None]]), (("slug",), [7, None]), (("items", 0, "id"), [7, None, "a/b"])],
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "path"),
    [(place, path) for place, fields in FIELDS.items() for path, _ in fields],
    ids=lambda value: value if isinstance(value, str) else ".".join(map(str, value)),
)
def test_every_field_is_held_to_what_it_must_be(hub, folder, place, path):
    values = dict(FIELDS[place])[path]
    for value in values:
        for kept in (hub.repos, hub.large):
            kept.clear()
        action = set_up(hub, place)

        def alter(reply: Reply, value: Any = value) -> None:
            reply.body = json.dumps(changed(json.loads(reply.body), path, value)).encode()

        hub.faults.clear()
        fault = hub.fault(PLACES[place][1], PLACES[place][2], times=999, alter=alter)
        assert refused(lambda action=action: action(hub, folder)), value
        assert fault.hits


def test_two_files_of_one_name_are_refused(hub):
    set_up(hub, "information")

    def twice(reply: Reply) -> None:
        info = json.loads(reply.body)
        reply.body = json.dumps({**info, "siblings": [*info["siblings"], info["siblings"][0]]}).encode()

    hub.fault("GET", "^/api/models/", alter=twice)
    assert "two files of one name" in (refused(lambda: opens(hub, Path())) or "")


@pytest.mark.parametrize("lie", ["a bomb", "an answer without end", "an announced answer without end"])
def test_what_is_kept_of_an_answer_is_bounded(hub, folder, monkeypatch, lie):
    """With the bounds of every day: some megabytes go over the wire, socket buffers included."""
    monkeypatch.setattr(exchange, "BOUNDS", Bounds())
    set_up(hub, "information")
    hub.fault("GET", "^/api/models/", times=99, raw=everywhere()[lie])
    assert refused(lambda: opens(hub, folder))
    assert hub.poured < 40_000_000


# Pages


def page_after(url: str) -> Callable[[Reply], None]:
    def alter(reply: Reply) -> None:
        reply.headers["Link"] = f'<{url.format(hub=reply.headers.get("X-Hub", ""))}>; rel="next"'

    return alter


@pytest.mark.parametrize("where", ["{storage}/api/models/x", "{hub}/evil", "ftp://x/y", "http://[::1", "", "?cursor=1"])
def test_a_page_names_another_only_on_its_own_list(hub, folder, where):
    """The client would take the token along to wherever a page points."""
    set_up(hub, "the files before")
    hub.fault("GET", "/tree/", alter=page_after(where.format(hub=hub.endpoint, storage=hub.storage)))
    assert refused(lambda: sends()(hub, folder))
    assert not [seen for seen in hub.seen if seen.token and seen.host == "storage"]
    assert not hub.requests("evil")


@pytest.mark.parametrize("body", [b"[]", None])
def test_pages_without_end_are_left(hub, folder, monkeypatch, body):
    monkeypatch.setattr(exchange, "BOUNDS", Bounds(call_requests=20, longest_wait=0))
    set_up(hub, "the commits before")

    def again(reply: Reply) -> None:
        reply.body = body or reply.body
        reply.headers["Link"] = f'<{hub.endpoint}/api/models/{REPO}/commits/main?cursor=1>; rel="next"'

    hub.fault("GET", "/commits/", times=10_000, alter=again)
    said = refused(lambda: sends(overwrite=True)(hub, folder)) or ""
    assert "without end" in said or "can't follow" in said
    assert len(hub.requests("/commits/")) <= 20


# Files


def tells(status: str = "302 Found", /, **headers: str | None) -> Callable[[Reply], None]:
    def alter(reply: Reply) -> None:
        reply.status = int(status.split()[0])
        for name, value in headers.items():
            reply.headers.pop(name.replace("_", "-"), None)
            if value is not None:
                reply.headers[name.replace("_", "-")] = value

    return alter


FACTS = {
    "a digest that leaves the cache": tells(X_Linked_Etag='"../../../evil"'),
    "an absolute digest": tells(X_Linked_Etag='"/tmp/evil"'),
    "another digest": tells(X_Linked_Etag=f'"{"0" * 64}"'),
    "a digest with a NUL": tells(X_Linked_Etag='"a\\0"'),
    "no digest": tells(X_Linked_Etag=None),
    "a commit that leaves the cache": tells(X_Repo_Commit="../../../evil"),
    "another commit": tells(X_Repo_Commit="0" * 40),
    "no commit": tells(X_Repo_Commit=None),
    "another size": tells(X_Linked_Size="7"),
    "a size that is none": tells(X_Linked_Size="\u00b2"),
    "an endless size": tells(X_Linked_Size="9" * 30),
    "an address that is a file": tells(Location="file:///etc/passwd"),
    "no address": tells(Location=""),
    "no file at all": tells("204 No"),
    "not modified": tells("304 No"),
}


@pytest.mark.parametrize("alter", FACTS.values(), ids=FACTS)
def test_what_a_file_is_said_to_be_is_held_to_the_listing(hub, folder, tmp_path, alter):
    set_up(hub, "a shard's facts")
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    hub.fault("HEAD", "/resolve/", times=99, alter=alter)
    assert refused(lambda: fetches(hub, folder))
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]


CONTENT = checkpoint_files()[SHARD]
WHOLE = str(len(CONTENT))
FETCHED: dict[str, Any] = {
    "a log-in page": says(LOGIN, Content_Type="text/html"),
    "nothing": says(),
    "more than listed": says(CONTENT + b"x"),
    "less than listed": says(CONTENT[:-1]),
    "less than announced, every time": says(CONTENT[:100], length=False, Content_Length=WHOLE),
    "another content": says(bytes(len(CONTENT))),
    "a bomb": says(CONTENT, Content_Encoding="gzip"),
    "a file without end": pours(endless(SPACES), head=CHUNKED),
    "a file without a length and without end": pours(endless(b"x" * 8192), head=HEAD + b"Connection: close\r\n\r\n"),
    "a byte at a time": pours(endless(b"x"), pause=0.02, head=HEAD + f"Content-Length: {WHOLE}\r\n\r\n".encode()),
    "a chunk's length a byte at a time": pours(endless(b"0"), pause=0.02, head=CHUNKED),
    "a part nobody asked for": says(
        CONTENT, "206 Partial", Content_Range=f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}0"
    ),
    "no content": says(status="204 No Content", length=False),
    "not modified": says(status="304 Not Modified", length=False),
    "somewhere else, always": says(status="302 Found", Location="/large/elsewhere?signature=s"),
    "busy for years": says(status="429 Slow", Retry_After="99999999"),
    "busy oddly": says(status="429 Slow", Retry_After="\u00b2"),
    "nothing at all": lambda handler: None,
}


@pytest.mark.parametrize("lie", FETCHED.values(), ids=FETCHED)
@pytest.mark.parametrize("private", [False, True], ids=["cache", "folder"])
def test_a_shard_is_what_the_listing_says_or_is_not_there(hub, tmp_path, lie, private):
    set_up(hub, "a shard's facts")
    goes = tmp_path / "goes" if private else None
    store = open_hub(REPO, endpoint=hub.endpoint, fetch_as_you_go=private, folder=goes).store
    hub.fault("GET", "^/large/", times=999, raw=lie)
    asked = len(hub.requests("^/large/"))
    assert refused(lambda: store.path(SHARD))
    assert len(hub.requests("^/large/")) - asked < 60
    assert hub.poured < 20_000_000
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size >= 1000]
    assert left == []


RANGES = {
    "the whole file": lambda reply: setattr(reply, "status", 200) or reply.headers.pop("Content-Range", None),
    "another part": tells("206 Partial", Content_Range="bytes 1-8/99"),
    "a part of another file": tells("206 Partial", Content_Range="bytes 0-7/8"),
    "no word of which part": tells("206 Partial", Content_Range=None),
    "a part that is no number": tells("206 Partial", Content_Range="bytes \u00b2-7/99"),
    "one byte more": lambda reply: setattr(reply, "body", reply.body + b"x"),
    "one byte less": lambda reply: setattr(reply, "body", reply.body[:-1]),
}


@pytest.mark.parametrize("alter", RANGES.values(), ids=RANGES)
def test_a_part_is_the_part_that_was_asked_for(hub, folder, alter):
    set_up(hub, "a shard's header")
    hub.fault("GET", "^/large/", times=99, alter=alter)
    assert refused(lambda: opens(hub, folder))


def test_a_transfer_that_breaks_off_goes_on_as_long_as_something_comes(hub):
    set_up(hub, "a shard's facts")
    store = open_hub(REPO, endpoint=hub.endpoint).store
    fault = hub.fault("GET", "^/large/", times=8, drop_after=max(len(CONTENT) // 10, exchange.LITTLE + 1))
    assert store.path(SHARD).read_bytes() == CONTENT
    assert fault.hits > 1


def test_a_file_larger_than_the_disk_is_not_begun(hub, monkeypatch):
    set_up(hub, "a shard's facts")
    store = open_hub(REPO, endpoint=hub.endpoint).store
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(BudgetError, match="are free"):
        store.path(SHARD)
    assert not hub.requests("/resolve/", "HEAD")


def test_leave_to_read_storage_is_asked_for_while_a_file_is_on_its_way(hub):
    """The answer's headers are what counts; its body is not held to the file's size, but to what such an answer is."""
    path, transfer = f"/api/models/{REPO}/xet-read-token/main", Transfer("a", 10**9, "0" * 64, "0" * 40)
    hub_api(hub.endpoint, None)
    hub.fault("GET", path, raw=says(b'{"accessToken": "x"}', X_Xet_Access_Token="x"))
    hub.fault("GET", path, raw=says(LOGIN))
    with transferring(transfer):
        assert get_session().get(f"{hub.endpoint}{path}").headers["X-Xet-Access-Token"] == "x"
        assert refused(lambda: get_session().get(f"{hub.endpoint}{path}"))


def test_a_hub_that_says_nothing_is_left_soon(hub, folder):
    """Not once for each of the client's own tries: those wait for a minute each."""
    set_up(hub, "a shard's facts")
    hub.fault("HEAD", "/resolve/", times=99, raw=pours(lambda: iter([b""] * 40), pause=0.05))
    assert refused(lambda: fetches(hub, folder))
    assert len(hub.requests("/resolve/", "HEAD")) == exchange.ATTEMPTS


def test_a_commit_asked_for_by_its_hash_is_the_one_answered(hub):
    set_up(hub, "information")
    hub.fault(
        "GET", "/revision/", alter=lambda reply: setattr(reply, "body", reply.body.replace(b'"sha": "', b'"sha": "0'))
    )
    assert refused(lambda: open_hub(REPO, "1" * 40, endpoint=hub.endpoint))


# The token


def test_the_token_goes_nowhere_else(hub, folder):
    """Redirects to another host, and an address for the check of an upload, are followed without it or not at all."""
    for place, status in [
        ("information", "302 Found"),
        ("upload modes", "307 Temporary"),
        ("the commit", "308 Permanent"),
    ]:
        action = set_up(hub, place)
        hub.faults.clear()
        lie = says(status=status, Location=f"{hub.storage}/evil?signature=s")
        hub.fault(PLACES[place][1], PLACES[place][2], times=99, raw=lie)
        assert refused(lambda action=action: action(hub, folder))
    assert not [seen for seen in hub.seen if seen.host == "storage" and seen.token]


# The commands

COMMANDS = {
    "inspect": ("inspect", REPO),
    "plan": ("plan", REPO, "--recipe", "int4-rtn"),
    "quantize": ("quantize", REPO, "--recipe", "int4-rtn", "--out", "{out}", "--fetch-as-you-go"),
    "build": ("build", REPO, "--recipe", "int4-rtn", "--out", "{out}"),
    "budget": ("budget", REPO, "--device", "h100"),
    "licence": ("licence", REPO),
}


@pytest.mark.parametrize("lie", ["a log-in page", "null", "204", "a bomb", "half a surrogate"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_end_in_one_line_and_5(hub, l4pack, tmp_path, command, lie):
    set_up(hub, "information")
    hub.fault("GET", "^/api/models/", times=99, raw=everywhere()[lie])
    ended = l4pack(*(part.format(out=tmp_path / "made") for part in COMMANDS[command]))
    assert ended.code == 5
    assert [line.partition(":")[0] for line in ended.err.splitlines()] == ["error", "hint"]
    assert "Traceback" not in ended.out + ended.err


@pytest.mark.parametrize("lie", ["a log-in page", "nothing", "a list"])
def test_an_audit_believes_no_other_text(hub, lie):
    set_up(hub, "information")
    hub.fault("GET", "/resolve/", times=99, raw=everywhere()[lie])
    assert refused(lambda: audit(REPO, endpoint=hub.endpoint))
