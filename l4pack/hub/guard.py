"""The HTTP client that huggingface_hub is given: every answer is bounded in size, time and tries before it is used.

Answers about a repository are read whole, checked by their schema and handed on without what the schema does not name.
Files are held to the size and the digest that the repository's listing gives for them, while they arrive. Nothing
may come compressed: what is asked for is asked for as it is, so that bytes on the wire are bytes of the answer.
Time is what is spent waiting for the network; what is done with the bytes does not count.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import hf_raise_for_status, hf_request_event_hook

from l4pack.errors import HubError
from l4pack.hub import exchange as exchanges
from l4pack.hub.answers import CREATE, CREATE_COLLECTION, AnswerKind, Asked, find_kind
from l4pack.hub.exchange import (
    ASTRAY,
    CALL,
    EXCHANGE,
    HUB_HOSTS,
    TRANSFER,
    TRANSIENT,
    Exchange,
    NoAnswerError,
    Transfer,
)

if TYPE_CHECKING:
    import httpx2 as http
else:  # httpx, or httpx2, whichever this huggingface_hub stands on
    http = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

_KEY = "l4pack"


@cache
def install() -> None:
    """Let huggingface_hub use this client from now on, in the whole process."""
    set_client_factory(_client)


def _client() -> Any:
    hooks: dict[str, list[Callable[..., Any]]] = {
        "request": [hf_request_event_hook, _before],
        "response": [_after],
    }
    client = _Client(event_hooks=hooks, follow_redirects=True, timeout=None, max_redirects=exchanges.BOUNDS.redirects)
    client.headers["Accept-Encoding"] = "identity"
    return client


class _Client(http.Client):
    """A client whose failures to get an answer about a repository are tried again in one place only."""

    def send(self, request: http.Request, **options: Any) -> http.Response:
        try:
            return super().send(request, **options)
        except http.TooManyRedirects:
            raise HubError(f"{_host(request.url)} redirects without end", hint=ASTRAY) from None
        except http.TransportError as error:
            exchange = request.extensions.get(_KEY)
            if exchange is None or not exchange.ends_with(error, request.method):
                raise
            what = f"the connection to {request.url.scheme}://{_host(request.url)} failed"
            raise NoAnswerError(what, hint="check the network, then run the command again") from error


def _host(url: http.URL) -> str:
    return url.netloc.decode("ascii", "replace").rpartition("@")[2]


def _before(request: http.Request) -> None:
    """Begin an exchange, or go on with the one that a redirect belongs to."""
    exchange = request.extensions.get(_KEY)
    if exchange is None:
        exchange = _begin(request)
        given = request.extensions.get("timeout") or {}
        silence = (
            exchanges.BOUNDS.look_seconds if request.method in ("GET", "HEAD") else exchanges.BOUNDS.change_seconds
        )
        limits = {name: given.get(name) or silence for name in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, _KEY: exchange, "timeout": limits, "trace": _trace}
    EXCHANGE.set(exchange)
    request.headers["Accept-Encoding"] = "identity"


def _begin(request: http.Request) -> Exchange:
    host = _host(request.url)
    looks = request.method in ("GET", "HEAD")
    found = find_kind(request.method, request.url.path)
    if found is not None:
        call = CALL.get()
        if call is not None and looks:
            call.count(1, 0, host)
        kind, prefix, subject = found
        body = b"" if looks else request.read()
        query = request.url.query.decode("ascii")
        return Exchange(
            Asked(f"{request.url.scheme}://{host}{prefix}", subject, query, body), host, kind, changes=not looks
        )
    transfer = TRANSFER.get() if looks else None
    if transfer is not None and request.method == "GET":
        transfer.begin()
    return Exchange(Asked("", "", "", b""), host, None, transfer, changes=not looks)


# Time


def _trace(event: str, info: dict[str, Any]) -> None:
    """Watch the clock over a new connection: its streams are the first to know that bytes arrive."""
    if event.endswith(("connect_tcp.complete", "start_tls.complete")):
        stream = info["return_value"]
        stream.read = _timed(stream.read, len)
        stream.write = _timed(stream.write)


def _timed(move: Callable[..., Any], size: Callable[[Any], int] | None = None) -> Callable[..., Any]:
    def timed(data: Any, timeout: float | None = None) -> Any:
        exchange, begun, nbytes = EXCHANGE.get(), time.monotonic(), 0
        try:
            moved = move(data, timeout=timeout)
            nbytes = len(data) if size is None else size(moved)
            return moved
        finally:
            if exchange is not None:
                exchange.moved(nbytes, time.monotonic() - begun)

    return timed


# Answers


def _after(response: http.Response) -> None:
    """Check an answer before the client looks at it."""
    exchange = response.request.extensions[_KEY]
    _plain_wait(
        response,
        exchanges.BOUNDS.inner_wait if exchange.changes and not exchange.is_answer else exchanges.BOUNDS.longest_wait,
    )
    if response.status_code >= 400:
        _refused(response, exchange)
    elif response.status_code in (301, 302, 303, 307, 308) and "Location" in response.headers:
        _redirected(response, exchange)
    elif exchange.transfer is not None:
        _file(response, exchange, exchange.transfer)
    elif exchange.kind is not None:
        _answer(response, exchange, exchange.kind)
    elif response.request.method not in ("GET", "HEAD"):
        _acknowledged(response, exchange)


def _plain_wait(response: http.Response, longest: int) -> None:
    """Leave one header that says how long to wait, and no longer than anyone would."""
    asked = response.headers.pop("Retry-After", "")
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*([0-9]{1,9})", response.headers.pop("ratelimit", ""))
    seconds = limit[1] if limit else asked.strip()
    if re.fullmatch("[0-9]{1,9}", seconds):
        response.headers["Retry-After"] = str(min(int(seconds), longest))


def _refused(response: http.Response, exchange: Exchange) -> None:
    """An error: its status and code are what counts. What nothing is lost by is tried again by our caller alone."""
    if exchange.kind is CREATE_COLLECTION and response.status_code == 409:
        _there_already(response, exchange, CREATE_COLLECTION)
    else:
        known = exchange.kind is CREATE and response.status_code == 409
        _aside(response, CREATE.settle(None, exchange.asked) if known else {})
    begun = exchange.transfer is not None and exchange.transfer.received > 0
    fresh = exchange.is_answer or (exchange.transfer is not None and not begun) or response.request.method == "HEAD"
    if fresh and response.status_code in TRANSIENT:
        hf_raise_for_status(response)


def _there_already(response: http.Response, exchange: Exchange, kind: AnswerKind) -> None:
    """What could not be made as it is there: the answer says where, and is read as the one that made it would be."""
    try:
        _replace(response, kind.read(_whole(response, exchange, exchanges.BOUNDS.answer_bytes), exchange.asked))
    except ValueError as error:
        raise exchange.bad(f"this is not {kind.title} ({error})") from None


def _redirected(response: http.Response, exchange: Exchange) -> None:
    request = response.request
    try:
        target = request.url.join(response.headers["Location"])
    except (http.InvalidURL, ValueError):
        raise exchange.bad("it redirects to no address") from None
    if target.scheme not in ("http", "https") or not target.host:
        raise exchange.bad("it redirects to no web address")
    if request.url.scheme == "https" and target.scheme == "http":
        raise exchange.bad("it redirects to where nothing is encrypted")
    if request.method not in ("GET", "HEAD") and not _keeps_method(response, exchange, target):
        raise exchange.bad("it sends what is to be changed elsewhere")
    if exchange.transfer is not None and request.method == "HEAD":
        _facts(response, exchange, exchange.transfer, final=not _followed(request.url, target))
    if request.method != "HEAD":
        _aside(response, {})


def _followed(url: http.URL, target: http.URL) -> bool:
    """Whether the client looks for a file's facts at a redirect's target, as it does within the Hub."""
    here, there = ((address.scheme, address.host, address.port) for address in (url, target))
    return here == there or target.host in HUB_HOSTS


def _keeps_method(response: http.Response, exchange: Exchange, target: http.URL) -> bool:
    """Whether what is posted or put is asked for again where it may go: storage has regions, the Hub has not."""
    within = not exchange.is_answer or target.host == response.request.url.host
    return within and response.status_code in (307, 308)


def _answer(response: http.Response, exchange: Exchange, kind: AnswerKind) -> None:
    if response.status_code not in (200, 201):
        raise exchange.bad(f"status {response.status_code} for {kind.title}")
    content = _whole(response, exchange, exchanges.BOUNDS.answer_bytes)
    call = CALL.get()
    if call is not None:
        call.count(0, len(content), exchange.host)
    try:
        content = kind.read(content, exchange.asked)
    except ValueError as error:
        raise exchange.bad(f"this is not {kind.title} ({error})") from None
    if kind.pages:
        _next_page(response, exchange, content)
    _replace(response, content)


def _next_page(response: http.Response, exchange: Exchange, content: bytes) -> None:
    """A page names another only on the same list, and only if it holds something itself."""
    more = response.links.get("next", {}).get("url")
    if more is None:
        return
    here = response.request.url
    try:
        url = http.URL(more)
    except (http.InvalidURL, ValueError):
        raise exchange.bad("a page names no address") from None
    if (url.scheme, url.netloc, url.path) != (here.scheme, here.netloc, here.path) or content == b"[]":
        raise exchange.bad("a page names another that can't follow it")


def _acknowledged(response: http.Response, exchange: Exchange) -> None:
    """An answer that says only that something was done."""
    if response.status_code not in (200, 201, 204):
        raise exchange.bad(f"status {response.status_code}")
    content = _whole(response, exchange, exchanges.BOUNDS.aside_bytes)
    if "html" in response.headers.get("Content-Type", "").lower() and content.lstrip().startswith(b"<"):
        raise exchange.bad("a page instead of an acknowledgement")
    _replace(response, content)


def _whole(response: http.Response, exchange: Exchange, limit: int) -> bytes:
    """The whole body, as it comes over the wire. Raises HubError for more than `limit` bytes, or for a compressed one."""
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise exchange.bad("it compresses what it was asked not to")
    content = bytearray()
    try:
        for chunk in response.stream:  # type: ignore[union-attr]
            content += chunk
            if len(content) > limit:
                raise exchange.bad(f"more than {limit:,} bytes")
    finally:
        response.stream.close()  # type: ignore[union-attr]
    return bytes(content)


def _aside(response: http.Response, instead: dict[str, str]) -> None:
    """Put something in place of a body that is not used; the connection lives on if the body is short."""
    nbytes = 0
    try:
        for chunk in response.stream:  # type: ignore[union-attr]
            nbytes += len(chunk)
            if nbytes > exchanges.BOUNDS.aside_bytes:
                break
    except http.TransportError:
        pass  # the headers said all that is needed
    finally:
        response.stream.close()  # type: ignore[union-attr]
    _replace(response, json.dumps(instead).encode())


def _replace(response: http.Response, content: bytes) -> None:
    for name in ("Content-Encoding", "Transfer-Encoding"):
        response.headers.pop(name, None)
    response.headers["Content-Length"] = str(len(content))
    response.stream = http.ByteStream(content)


# Files


def _file(response: http.Response, exchange: Exchange, transfer: Transfer) -> None:
    if response.request.method == "HEAD":
        _facts(response, exchange, transfer, final=True)
        return
    start, stop = _span(response.request, transfer)
    if response.status_code == 206:
        where = response.headers.get("Content-Range", "").strip()
        if where != f"bytes {start}-{stop - 1}/{transfer.size}":
            raise exchange.bad(f"another part of {transfer.name} than was asked for")
    elif response.status_code == 200:
        start, stop = 0, transfer.size
    else:
        raise exchange.bad(f"status {response.status_code} for {transfer.name}")
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise exchange.bad("it compresses what it was asked not to")
    length = response.headers.get("Content-Length", "")
    if length and length != str(stop - start):
        raise exchange.bad(f"{transfer.name} is not of its listed size")
    response.stream = _Measured(response.stream, exchange, transfer, stop - start)


def _span(request: http.Request, transfer: Transfer) -> tuple[int, int]:
    """First byte and one past the last that a request asks for."""
    asked = re.fullmatch("bytes=([0-9]+)-([0-9]*)", request.headers.get("Range", "bytes=0-"))
    if asked is None:
        return 0, transfer.size
    return int(asked[1]), min(int(asked[2]) + 1, transfer.size) if asked[2] else transfer.size


def _facts(response: http.Response, exchange: Exchange, transfer: Transfer, *, final: bool) -> None:
    """Hold digest, size and commit of a file's headers to its listing: the client makes paths of them."""
    if final and response.status_code not in (200, 301, 302, 303, 307, 308):
        raise exchange.bad(f"status {response.status_code} for {transfer.name}")
    headers = response.headers
    etag = headers.get("X-Linked-Etag") or (None if response.is_redirect else headers.get("ETag"))
    size = headers.get("X-Linked-Size") or (None if response.is_redirect else headers.get("Content-Length"))
    told = {
        "digest": (etag and etag.removeprefix("W/").strip('"'), transfer.digest),
        "commit": (headers.get("X-Repo-Commit"), transfer.commit),
        "size": (size, str(transfer.size)),
    }
    for what, (said, listed) in told.items():
        if said is None and (not final or what == "size"):
            continue
        if said != listed:
            raise exchange.bad(f"{transfer.name} has another {what} than its listing")
    route = response.links.get("xet-auth", {}).get("url") or headers.get("X-Xet-Refresh-Route") or ""
    if not route.startswith(f"https://{_host(response.request.url)}/"):
        headers.pop("X-Xet-Hash", None)  # the token would go where the route leads


class _Measured(http.SyncByteStream):
    """A file's bytes, and not one more than was asked for."""

    def __init__(self, stream: Any, exchange: Exchange, transfer: Transfer, limit: int) -> None:
        self._stream, self._exchange, self._transfer, self._limit = stream, exchange, transfer, limit

    def __iter__(self) -> Iterator[bytes]:
        nbytes = 0
        for chunk in self._stream:
            nbytes += len(chunk)
            self._transfer.received += len(chunk)
            if nbytes > self._limit:
                raise self._exchange.bad(f"{self._transfer.name} is longer than listed")
            yield chunk

    def close(self) -> None:
        self._stream.close()
