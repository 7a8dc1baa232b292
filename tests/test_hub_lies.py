"""A Hub that lies, or what answers in its place: always one line, exit code 5, soon, and nothing where it should not be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_lies import everywhere
from hub_server import HubServer, running_hub
from small_checkpoint import checkpoint_files

from l4pack import hubguard
from l4pack.artifact.upload import Target, local_files, plan_upload, upload
from l4pack.checkpoint.hub import open_hub
from l4pack.errors import HubError
from l4pack.hubclient import hub_api
from l4pack.hubguard import Bounds

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

REPO = "me/Llama-4-Tiny"
SECRET = "hf_ThisMustNeverBeSeen"
SHARD = "model-00001-of-00003.safetensors"
TINY = Bounds(
    answer_bytes=200_000,
    call_bytes=400_000,
    answer_seconds=0.25,
    look_seconds=0.25,
    change_seconds=0.25,
    window_seconds=0.25,
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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(hubguard, "BOUNDS", TINY)
    for module in ("l4pack.hubclient", "huggingface_hub.utils._http", "huggingface_hub.file_download"):
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
        upload(api, plan_upload(api, Target(REPO, **options), local_files(folder)), "Upload")
        revision = options.get("revision", "main")
        there = hub.repos[REPO].files("refs/pr/1" if options.get("pull_request") else revision)
        assert {name: there[name].content for name in SENT} == SENT
        assert options.get("tag") is None or hub.repos[REPO].tags[options["tag"]] == hub.repos[REPO].refs[revision]
        assert not options.get("gated") or hub.repos[REPO].gated
        assert options.get("collection") is None or hub.collections[options["collection"]] == [REPO]

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
}


def set_up(hub: HubServer, place: str) -> Callable[[HubServer, Path], None]:
    exists, _, _, action = PLACES[place]
    hub.collections["me/best"] = []
    if exists:
        hub.add(REPO, {**checkpoint_files(), "config.json": checkpoint_files()["config.json"]}, private=True)
    return action


COMMON = [
    "a log-in page", "nothing", "null", "a list", "an object", "a list of nothing", "204", "304", "307 to itself",
    "an odd wait", "a bomb", "an answer without end", "a byte at a time", "less than announced",
]  # fmt: skip
TOLD = [(place, lie) for place in PLACES for lie in COMMON]
TOLD += [(place, lie) for place in ("information", "a shard's header") for lie in everywhere() if lie not in COMMON]
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
