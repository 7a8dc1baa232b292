"""Answers that no Hub gives: what stands between may give them, and a hostile server does."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from typing import Any

from hub_server import Handler

Lie = Callable[[Handler], None]
LOGIN = b"<html><body>Welcome to the airport. Please log in.</body></html>"


def says(body: bytes = b"", status: str = "200 OK", length: bool = True, **headers: str) -> Lie:
    """One answer, all of it at once."""

    def answer(handler: Handler) -> None:
        told = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        told |= {"Content-Length": str(len(body))} if length else {}
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in told.items())]
        handler.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    return answer


def pours(pieces: Callable[[], Iterator[bytes]], *, pause: float = 0.0, head: bytes = b"") -> Lie:
    """An answer that comes in pieces, with a pause behind each, until the client leaves."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(head)
        for piece in pieces():
            handler.wfile.write(piece)
            handler.hub.poured += len(piece)
            time.sleep(pause)

    return answer


def endless(piece: bytes) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        while True:
            yield piece

    return pieces


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SPACES = b"2000\r\n" + b" " * 0x2000 + b"\r\n"

BODIES: dict[str, Lie] = {
    "a log-in page": says(LOGIN, Content_Type="text/html"),
    "a log-in page said to be JSON": says(LOGIN),
    "nothing": says(),
    "null": says(b"null"),
    "a list": says(b"[]"),
    "an object": says(b"{}"),
    "a list of nothing": says(b"[null]"),
    "a number": says(b"7"),
    "a text": says(b'"model"'),
    "true": says(b"true"),
    "not a number": says(b"NaN"),
    "a number without end": says(b'{"size": 1' + b"0" * 100_000 + b"}"),
    "nesting without end": says(b"[" * 100_000),
    "nested objects without end": says(b'{"a":' * 30_000),
    "half an object": says(b'{"id": "a/b", "sha": "'),
    "another charset": says('{"id": "a/b"}'.encode("utf-16"), Content_Type="application/json; charset=utf-16"),
    "bytes that are no text": says(b'{"id": "\xff\xfe"}'),
    "half a surrogate": says(rb'{"id": "a/\ud800"}'),
}
STATUSES: dict[str, Lie] = {
    "204": says(status="204 No Content", length=False),
    "205": says(status="205 Reset Content"),
    "206": says(b"{}", status="206 Partial Content"),
    "202": says(b"{}", status="202 Accepted"),
    "300": says(b"{}", status="300 Multiple Choices"),
    "304": says(status="304 Not Modified", length=False),
    "302 to nowhere": says(status="302 Found"),
    "302 to a file": says(status="302 Found", Location="file:///etc/passwd"),
    "302 without a host": says(status="302 Found", Location="http://"),
    "302 that is no address": says(status="302 Found", Location="http://[::1"),
    "307 to itself": says(status="307 Temporary Redirect", Location=""),
    "a status of its own": says(b"{}", status="999 Whatever"),
    "an error that is a list": says(b"[1]", status="400 Bad Request"),
    "an error that is a page": says(LOGIN, status="403 Forbidden", Content_Type="text/html"),
    "an error in half an encoding": says(b"\x1f\x8b\x08", status="404 Not Found", Content_Encoding="gzip"),
    "an odd wait": says(status="429 Too Many Requests", Retry_After="\u00b2"),
    "a wait of years": says(status="503 Service Unavailable", Retry_After="99999999"),
    "a negative wait": says(status="429 Too Many Requests", Retry_After="-5"),
    "a wait until a date": says(status="503 Slow", Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"),
    "a limit of years": says(status="429 Slow", RateLimit='"api";r=0;t=99999999'),
}
STREAMS: dict[str, Lie] = {
    "a bomb": says(gzip.compress(bytes(10_000_000)), Content_Encoding="gzip"),
    "an answer without end": pours(endless(SPACES), head=CHUNKED),
    "an announced answer without end": pours(endless(b" " * 8192), head=HEAD + b"Content-Length: 99999999999\r\n\r\n"),
    "an error without end": pours(endless(SPACES), head=CHUNKED.replace(b"200 OK", b"404 No")),
    "a byte at a time": pours(endless(b"1\r\n \r\n"), pause=0.02, head=CHUNKED),
    "headers a byte at a time": pours(endless(b"x"), pause=0.02, head=HEAD + b"X-Slow: "),
    "promises without end": pours(endless(b"HTTP/1.1 102 Processing\r\n\r\n"), pause=0.02),
    "less than announced": says(b"{}  ", length=False, Content_Length="4000"),
    "chunks that are none": says(b"zz\r\n{}\r\n0\r\n\r\n", length=False, Transfer_Encoding="chunked"),
    "a chunk cut short": says(b"ff\r\n{}", length=False, Transfer_Encoding="chunked"),
    "no HTTP at all": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n") and None,
    "nothing at all": lambda handler: None,
}


def everywhere() -> dict[str, Lie]:
    """Every lie that is one wherever it is told."""
    return {**BODIES, **STATUSES, **STREAMS}


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of JSON data with one place changed; `...` removes it."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(path) == 1:
        del copy[path[0]]
        return copy
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy
