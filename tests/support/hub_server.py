"""A Hub on the loopback interface, for the real `huggingface_hub` client to talk to over real HTTP.

Two servers on two ports: the Hub itself, and the storage that large files are redirected to with signed addresses (the
client must not send its token there). Every request is recorded with the bytes it was answered with, and faults can be
ordered by method and path. The protocol is the one the client speaks: its own sources are the reference.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".sig")  # stored as large files whatever their size
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")


def git_sha1(content: bytes) -> str:
    """The name git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """One version of a file."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return git_sha1(pointer.encode() if self.large else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def lfs(self, oid_key: str) -> dict[str, object]:
        return {oid_key: self.sha256, "size": len(self.content), "pointerSize": 134}


@dataclass
class Repo:
    """A model repository: commits, and branches, tags and pull requests that point at them."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    log: list[tuple[str, str, str]] = field(default_factory=list)  # commit, title, description
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Blob], ref: str = "main", title: str = "commit", text: str = "") -> str:
        facts = f"{self.name} {len(self.commits)} {title} " + " ".join(sorted(f"{p}:{b.oid}" for p, b in files.items()))
        sha = hashlib.sha1(facts.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        self.log.append((sha, title, text))
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.refs.get(revision) or self.tags.get(revision)

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.resolve(revision)]


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests whose method and path match."""

    method: str
    path: re.Pattern[str]
    times: int = 1
    status: int | None = None  # answer with this status
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None  # close the connection after this many bytes of the body
    corrupt: bool = False  # change a byte of what is served or stored
    raw: Callable[[Handler], None] | None = None  # write something else to the socket, then hang up
    alter: Callable[[Reply], None] | None = None  # change the answer
    hits: int = 0


@dataclass(frozen=True)
class Seen:
    """One request that was answered."""

    host: str
    method: str
    path: str
    status: int
    nbytes: int
    token: str | None
    byte_range: str | None


class HubServer:
    """The state of the Hub; `endpoint` is what clients are given."""

    def __init__(self, hub_handler: type[Handler]) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}  # token -> namespaces it may write to
        self.token_role = "write"
        self.admitted: set[tuple[str, str]] = set()  # (token, repo) let into a gated repository
        self.collections: dict[str, list[str]] = {}
        self.large: dict[str, bytes] = {}  # what the storage holds, by SHA-256
        self.uploads: dict[str, dict[int, bytes]] = {}  # parts of unfinished uploads
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.part_bytes = 64 * 1024  # above it, uploads are cut in parts
        self.page = 1000
        self.poured = 0  # bytes of answers that come in pieces
        self.expired: set[str] = set()  # signatures that hold no longer
        self.signatures = 0
        self.lock = threading.RLock()
        self._servers = [_Server(("127.0.0.1", 0), kind) for kind in (hub_handler, StorageHandler)]
        for server in self._servers:
            server.hub = self
        hub, storage = (server.server_port for server in self._servers)
        # Two names for this machine, so that to any client the storage is another host.
        self.endpoint, self.storage = f"http://127.0.0.1:{hub}", f"http://localhost:{storage}"

    def start(self) -> None:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(
        self, name: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False, ref: str = "main"
    ) -> Repo:
        """A repository that holds these files."""
        repo = self.repos.setdefault(name, Repo(name, private, gated))
        blobs = {path: Blob(content, path.endswith(LARGE)) for path, content in files.items()}
        self.large.update({blob.sha256: blob.content for blob in blobs.values() if blob.large})
        repo.commit(blobs, ref)
        return repo

    def fault(self, method: str, path: str, times: int = 1, **what: object) -> Fault:
        """Order a fault for requests whose path matches the regular expression `path`."""
        fault = Fault(method, re.compile(path), times, **what)
        self.faults.append(fault)
        return fault

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.hits < fault.times and fault.method == method and fault.path.search(path):
                    fault.hits += 1
                    return fault
        return None

    def sign(self, path: str) -> str:
        """An address on the storage that holds until it is put among `expired`."""
        with self.lock:
            self.signatures += 1
            return f"{self.storage}{path}?signature=s{self.signatures}"

    def served(self, pattern: str, method: str = "GET") -> int:
        """Body bytes answered to requests whose path matches."""
        return sum(seen.nbytes for seen in self.requests(pattern, method))

    def requests(self, pattern: str, method: str | None = None) -> list[Seen]:
        """The requests whose path matches."""
        return [seen for seen in self.seen if re.search(pattern, seen.path) and method in (None, seen.method)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class Reply(Exception):  # noqa: N818 - an answer, not always an error
    """Ends the handling of a request with this answer."""

    def __init__(self, status: int, body: object = None, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.body = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {"Content-Type": "application/json", **(headers or {})}


def refuse(status: int, code: str, message: str) -> Reply:
    return Reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: else each answer waits for an acknowledgement
    server: _Server
    kind = ""

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    @property
    def token(self) -> str | None:
        return (self.headers.get("authorization") or "").removeprefix("Bearer ") or None

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):
            super().handle_one_request()

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.fault = self.hub.take_fault(self.command, url.path)
        if self.fault and self.fault.raw:
            self._body()
            self.hub.seen.append(Seen(self.kind, self.command, self.path, 0, 0, self.token, self.headers.get("Range")))
            self.fault.raw(self)
            self._hang_up()
        try:
            if self.fault and self.fault.status:
                self._body()
                raise Reply(self.fault.status, b"", self.fault.headers)
            self.answer(unquote(url.path))
            raise Reply(404)
        except Reply as reply:
            self._send(reply)

    def answer(self, path: str) -> None:
        raise NotImplementedError

    def _body(self) -> bytes:
        """The request's body; with a fault, the connection breaks in its middle."""
        if (self.headers.get("Transfer-Encoding") or "").lower() == "chunked":
            return b"".join(self._chunks())
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault and self.fault.drop_after is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(length, self.fault.drop_after))
            self._hang_up()
        return self.rfile.read(length)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _hang_up(self) -> None:
        self.close_connection = True
        raise ConnectionAbortedError

    def _send(self, reply: Reply) -> None:
        if self.fault and self.fault.alter:
            self.fault.alter(reply)
        body = reply.body
        if self.fault and self.fault.corrupt and self.command == "GET" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else body
        cut = self.fault.drop_after if self.fault and self.command == "GET" else None
        body = body if cut is None else body[:cut]
        self.hub.seen.append(
            Seen(self.kind, self.command, self.path, reply.status, len(body), self.token, self.headers.get("Range"))
        )
        self.wfile.write(body)
        if cut is not None:
            self._hang_up()

    def content(self, content: bytes, headers: Mapping[str, str]) -> Reply:
        """A file, or the part of it that the Range header asks for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return Reply(200, content, {"Accept-Ranges": "bytes", **headers})
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            return Reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        where = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return Reply(206, content[start : end + 1], {**headers, **where})


class StorageHandler(Handler):
    """Where large files lie; knows signatures, not tokens."""

    kind = "storage"

    def answer(self, path: str) -> None:
        body = self._body()
        if not self.query.get("signature") or self.query["signature"] in self.hub.expired:
            raise Reply(403, b"Request has expired")
        parts = path.strip("/").split("/")
        if parts[0] == "large" and self.command == "GET":
            raise self.content(self.hub.large[parts[1]], {"ETag": f'"{parts[1]}"'})
        if self.command == "PUT":
            self._store(parts, body)

    def _store(self, parts: list[str], body: bytes) -> None:
        if self.fault and self.fault.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        etag = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        if parts[0] == "large":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                raise Reply(400, b"the content is not what its digest says")
            self.hub.large[parts[1]] = body
        elif parts[0] == "part":
            self.hub.uploads.setdefault(parts[1], {})[int(parts[2])] = body
        raise Reply(200, b"", etag)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A Hub for the length of a test; the client's connections are closed with it."""
    from hub_api import HubHandler
    from huggingface_hub import close_session

    hub = HubServer(HubHandler)
    hub.start()
    try:
        yield hub
    finally:
        close_session()
        hub.stop()
