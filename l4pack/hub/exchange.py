"""Requests to the Hub and what they may take: bounds, tries, and the time that the network spends."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from huggingface_hub.errors import HfHubHTTPError

from l4pack.errors import HubError
from l4pack.hub.answers import AnswerKind, Asked

if TYPE_CHECKING:
    import httpx2 as http
else:  # httpx, or httpx2, whichever this huggingface_hub stands on
    http = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

HTTPError, TransportError = http.HTTPError, http.TransportError
TRANSIENT = (408, 429, 500, 502, 503, 504)
ATTEMPTS = 5
LITTLE = 4096
AGAIN = "run the same command again"
ASTRAY = "check HF_ENDPOINT, and whether a proxy or a log-in page answers in the Hub's place"
HUB_HOSTS = ("huggingface.co", "hf.co", "hub-ci.huggingface.co")


@dataclass(frozen=True)
class Bounds:
    """What an answer may take. Bytes and seconds."""

    answer_bytes: int = 8 * 1024**2  # of one answer about a repository
    call_bytes: int = 64 * 1024**2  # of all pages of one call
    call_requests: int = 300
    aside_bytes: int = 64 * 1024  # of an answer whose content is not used
    look_seconds: float = 20.0  # without a byte, for what is looked at; thrice that for a whole answer
    change_seconds: float = 120.0  # without a byte, and for a whole answer, for what is changed
    window_seconds: float = 30.0
    window_bytes: int = 128 * 1024  # that must move in a window
    redirects: int = 8
    longest_wait: int = 60
    inner_wait: int = 10  # between two tries that the client makes by itself


BOUNDS = Bounds()


class NoAnswerError(HubError):
    """Nothing, or less than was announced, came back: the request may be tried again."""


@dataclass
class Call:
    """All the requests that one call to the client makes."""

    requests: int = 0
    nbytes: int = 0

    def count(self, requests: int, nbytes: int, host: str) -> None:
        """Note requests and bytes. Raises HubError when they are more than any repository needs."""
        self.requests += requests
        self.nbytes += nbytes
        if self.requests > BOUNDS.call_requests or self.nbytes > BOUNDS.call_bytes:
            raise HubError(f"{host} answers without end", hint=ASTRAY)


@dataclass
class Transfer:
    """A file on its way: what the listing says of it, and how its fetching went so far.

    `digest` is the hex SHA-256 or git name of the content, `commit` the repository's commit, both as listed.
    """

    name: str
    size: int
    digest: str
    commit: str
    received: int = 0
    counted: int = 0
    fruitless: int = 0

    def begin(self) -> None:
        """Count a try. Raises HubError after too many that brought nothing, or too many bytes in all."""
        if self.received - self.counted <= max(self.size // 100, LITTLE):
            self.fruitless += 1
        self.counted = self.received
        if self.fruitless > ATTEMPTS + 1 or self.received > 2 * self.size:
            raise HubError(f"{self.name}: the transfer broke off again and again", hint=AGAIN)


@dataclass
class Exchange:
    """One request, the redirects it leads to, and the time the network took."""

    asked: Asked
    host: str
    kind: AnswerKind | None = None
    transfer: Transfer | None = None
    changes: bool = False
    seconds: float = 0.0
    _window: list[float] = field(default_factory=lambda: [0.0, 0.0])  # seconds, bytes

    @property
    def is_answer(self) -> bool:
        """Whether the answer is about a repository, not a file's content."""
        return self.kind is not None

    def ends_with(self, error: http.TransportError, method: str) -> bool:
        """Whether a failure is for our caller to try again. Broken transfers of files are the client's to go on with."""
        if self.is_answer or (method == "HEAD" and self.transfer is not None):
            return True
        return self.changes and isinstance(error, http.TimeoutException)

    def moved(self, nbytes: int, seconds: float) -> None:
        """Note what went over the wire and how long that took. Raises HubError when it is too slow."""
        self.seconds += seconds
        self._window[0] += min(seconds, BOUNDS.window_seconds / 12)  # a server that thinks is not one that drips
        self._window[1] += nbytes
        late = self.is_answer and self.seconds > (BOUNDS.change_seconds if self.changes else 3 * BOUNDS.look_seconds)
        if self._window[0] > BOUNDS.window_seconds:
            late = late or self._window[1] < BOUNDS.window_bytes
            self._window = [0.0, 0.0]
        if late:
            raise HubError(f"{self.host} answers too slowly", hint="try again later, or from another network")

    def bad(self, what: str) -> HubError:
        """The error for an answer that can't be right."""
        return HubError(f"{self.host} does not answer as the Hub does: {what}", hint=ASTRAY)


CALL: ContextVar[Call | None] = ContextVar("CALL", default=None)
TRANSFER: ContextVar[Transfer | None] = ContextVar("TRANSFER", default=None)
EXCHANGE: ContextVar[Exchange | None] = ContextVar("EXCHANGE", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """Bound together all that the block asks of the Hub."""
    token = CALL.set(Call())
    try:
        yield
    finally:
        CALL.reset(token)


@contextmanager
def transferring(transfer: Transfer) -> Iterator[None]:
    """Hold what the block fetches to a file's listed size and digest."""
    token = TRANSFER.set(transfer)
    try:
        yield
    finally:
        TRANSFER.reset(token)
