"""What the Hub's answers mean to a person: every failure of the network or the Hub as one line and a hint.

The client's own messages are not passed on: they hold addresses with signatures in them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import dropwhile
from logging import ERROR
from traceback import walk_tb
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from l4pack import __version__
from l4pack.errors import HubError, L4packError
from l4pack.hub.exchange import (
    ASTRAY,
    ATTEMPTS,
    BOUNDS,
    HUB_HOSTS,
    TRANSIENT,
    HTTPError,
    NoAnswerError,
    TransportError,
    one_call,
)
from l4pack.hub.guard import install

_Result = TypeVar("_Result")

_FAILURES: tuple[type[Exception], ...] = (OSError, HTTPError, L4packError)
_CLIENT = ("huggingface_hub", HTTPError.__module__.partition(".")[0])
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def hub_api(endpoint: str | None, token: str | None) -> HfApi:
    """The client for an endpoint (None: the one huggingface_hub is set to) and a token (None: the one it finds).

    It is told to be quiet: the terminal has one place, and its log lines hold signed addresses. `HF_HUB_VERBOSITY` and
    `HF_DEBUG` bring them back. Its HTTP is bounded. Xet's is its own, which nothing bounds: it is used with the Hub itself.
    """
    install()
    if not (endpoint or constants.ENDPOINT).startswith(tuple(f"https://{host}" for host in HUB_HOSTS)):
        constants.HF_HUB_DISABLE_XET = True
    disable_progress_bars()
    if not {"HF_HUB_VERBOSITY", "HF_DEBUG"} & set(os.environ):
        logging.set_verbosity(ERROR)
    return HfApi(endpoint=endpoint, token=token, library_name="l4pack", library_version=__version__)


@contextmanager
def hub_errors(api: HfApi, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into a HubError about `repo_id`."""
    try:
        yield
    except L4packError:
        raise
    except HFValidationError as error:
        raise HubError(f"'{repo_id}' is not a repository's name", hint="write ORGANISATION/NAME") from error
    except Exception as error:
        explained = _explained(_cause(error), api, repo_id, revision)
        if explained is None and _is_the_clients(error):
            explained = HubError(f"{repo_id}: an answer of {api.endpoint} makes no sense", hint=ASTRAY)
        if explained is None:
            raise
        raise explained from None


def patiently(call: Callable[[], _Result], *, signed: str | None = None) -> _Result:
    """The result of a call that may be repeated, tried again while the Hub is busy, failing or out of reach.

    With `signed`, the endpoint, refusals by another host are tried again too: the call asks for fresh addresses, and
    the old ones may have expired, or what arrived there may have been damaged on its way.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            with one_call():
                return call()
        except Exception as error:
            cause = _cause(error)
            if not _repeatable(cause, signed):
                raise
            time.sleep(retry_after(cause) or 2.0 ** (attempt - 1))
    with one_call():
        return call()


def _repeatable(error: BaseException, signed: str | None) -> bool:
    if isinstance(error, HfHubHTTPError):
        elsewhere = signed is not None and not str(error.response.url).startswith(f"{signed}/")
        return error.response.status_code in TRANSIENT or elsewhere
    return isinstance(error, TransportError | NoAnswerError)


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait for, if it does; the guard has made a small whole number of it."""
    text = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(text) if text else None


def _cause(error: Exception) -> BaseException:
    """What is behind a RuntimeError of the client's upload threads, or behind a file that it could not locate."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _FAILURES):
        cause = cause.__cause__
    if isinstance(cause, LocalEntryNotFoundError) and isinstance(cause.__cause__, HfHubHTTPError):
        return cause.__cause__
    return cause or error


def _is_the_clients(error: Exception) -> bool:
    """Whether an error comes out of the client: it stumbled over what it was given."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    after = dropwhile(lambda name: not name.startswith("l4pack"), reversed(modules))
    behind = modules[len(list(after)) :]
    return bool(behind) and behind[0].startswith(_CLIENT)


def _explained(error: BaseException, api: HfApi, repo_id: str, revision: str | None) -> HubError | None:
    where = f"{api.endpoint}/{repo_id}"
    known = (api.token if isinstance(api.token, str) else None) or get_token()
    match error:
        case HubError():
            return error
        case GatedRepoError():
            hint = f"accept the licence at {where}" + ("" if known else f", then {LOG_IN}")
            return HubError(f"{repo_id}: access is gated, and this account was not let in", hint=hint)
        case RevisionNotFoundError():
            return HubError(f"{repo_id} has no revision '{revision or 'main'}'", hint=f"look at {where}/tree/main")
        case RepositoryNotFoundError():
            hint = "check the name" + ("" if known else f"; if it is private, {LOG_IN}")
            return HubError(f"{repo_id}: no such repository, or not one this account may see", hint=hint)
        case HfHubHTTPError():
            return _by_status(error, api, repo_id)
        case OfflineModeIsEnabled() | LocalEntryNotFoundError() if is_offline_mode():
            return HubError(f"{repo_id}: HF_HUB_OFFLINE is set, and the cache does not hold it", hint="unset it")
        case LocalEntryNotFoundError():
            return HubError(f"{repo_id}: no connection to {api.endpoint}", hint="check the network and HF_ENDPOINT")
        case EntryNotFoundError():
            return HubError(f"{repo_id}: a file is missing", hint=f"look at {where}/tree/{revision or 'main'}")
        case XetDownloadError():
            return HubError(f"{repo_id}: a download broke off", hint="run the same command again")
    return _by_transport(error, api, repo_id)


def _by_status(error: HfHubHTTPError, api: HfApi, repo_id: str) -> HubError:
    status = error.response.status_code
    wait = retry_after(error)
    again = f"try again in {wait:.0f} s" if wait and wait < BOUNDS.longest_wait else "try again in some minutes"
    messages = {
        401: ("the token is not accepted", LOG_IN),
        403: ("the token has no right to do this", "use a token that may write to this organisation and repository"),
        404: ("a file or page is missing", f"look at {api.endpoint}/{repo_id}"),
        409: ("somebody else changed the repository meanwhile", "run the same command again"),
        412: ("somebody else changed the repository meanwhile", "run the same command again"),
        429: ("too many requests for now", again),
    }
    what, hint = messages.get(status, (f"the Hub answered {status}", again))
    return HubError(f"{repo_id}: {what}", hint=hint)


def _by_transport(error: BaseException, api: HfApi, repo_id: str) -> HubError | None:
    """A broken connection; None for what is not the network's fault, such as a full disk."""
    if isinstance(error, OSError) and error.errno is None:
        return HubError(f"{repo_id}: a transfer came out incomplete", hint="run the same command again")
    if isinstance(error, HTTPError):
        return HubError(
            f"{repo_id}: the connection to {api.endpoint} failed", hint="check the network, then run the command again"
        )
    return None
