"""Opening and fetching Hub checkpoints, over real HTTP against a loopback Hub."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub.constants
import pytest
from hub_repository import REPO, own_cache  # noqa: F401
from hub_server import HubServer, running_hub
from small_checkpoint import checkpoint_files

from l4pack.checkpoint.hub import HubStore, open_hub
from l4pack.checkpoint.source import Checkpoint, open_folder
from l4pack.errors import HubError, SourceError
from l4pack.hub import client as hubclient
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe

SECRET = "hf_ThisMustNeverBeSeen"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        server.tokens = {SECRET: {"me"}}
        yield server


@pytest.fixture
def opened(hub: HubServer) -> Callable[..., Checkpoint]:
    hub.add(REPO, checkpoint_files())

    def open_it(**options: Any) -> Checkpoint:
        return open_hub(REPO, endpoint=hub.endpoint, **options)

    return open_it


def header_bytes(files: dict[str, bytes]) -> int:
    """Length field and header of every shard, and nothing behind them."""
    shards = [content for name, content in files.items() if name.endswith(".safetensors")]
    return sum(8 + int.from_bytes(content[:8], "little") for content in shards)


def test_opening_fetches_headers_and_not_one_byte_of_a_weight(hub, opened, tmp_path):
    checkpoint = opened()
    files = checkpoint_files()
    assert hub.served("^/large/") == header_bytes(files)
    small = len(files["config.json"]) + len(files["model.safetensors.index.json"])
    assert hub.served("/resolve/") == small
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    local = open_folder(tmp_path)
    assert checkpoint.entries == local.entries
    assert checkpoint.companions == {"tokenizer_config.json": 24} == local.companions
    assert checkpoint.revision == hub.repos[REPO].refs["main"]


def test_the_storage_never_gets_the_token(hub, opened):
    opened(token=SECRET).store.path("model-00001-of-00003.safetensors")
    assert {seen.token for seen in hub.seen if seen.host == "hub"} == {SECRET}
    assert {seen.token for seen in hub.seen if seen.host == "storage"} == {None}


def test_shards_come_into_the_clients_cache_once(hub, opened):
    store = opened().store
    path = store.path("model-00002-of-00003.safetensors")
    assert path.read_bytes() == checkpoint_files()["model-00002-of-00003.safetensors"]
    assert not store.fetches
    store.release("model-00002-of-00003.safetensors")
    before = len(hub.seen)
    assert opened().store.path("model-00002-of-00003.safetensors") == path
    assert not [seen for seen in hub.seen[before:] if seen.path.startswith("/large/") and seen.byte_range is None]


def test_fetch_as_you_go_keeps_only_what_is_in_use(opened, tmp_path):
    folder = tmp_path / "shards"
    checkpoint = opened(fetch_as_you_go=True, folder=folder)
    assert checkpoint.store.fetches
    for shard in checkpoint.shards:
        assert checkpoint.store.path(shard).parent == folder
        assert [path.name for path in folder.glob("*.safetensors")] == [shard]
        checkpoint.store.release(shard)
    assert not list(folder.glob("*.safetensors"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_many_threads_fetch_a_shard_once(hub, opened):
    store = opened().store
    shard = "model-00001-of-00003.safetensors"
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.path(shard))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    whole = [seen for seen in hub.requests("^/large/") if seen.byte_range is None]
    assert len(whole) == 1


def test_identity_and_fingerprint_follow_the_content(hub, opened):
    first = opened()
    assert first.store.identity("model-00001-of-00003.safetensors") == (
        hub.repos[REPO].files()["model-00001-of-00003.safetensors"].sha256
    )
    assert first.fingerprint() == opened().fingerprint()
    files = checkpoint_files()
    files["tokenizer_config.json"] = b'{"model_max_length": 65}'
    hub.add(REPO, files)
    assert first.fingerprint() != opened().fingerprint()


def test_a_revision_is_pinned_when_opened(hub, opened):
    checkpoint = opened()
    hub.add(REPO, {**checkpoint_files(), "tokenizer_config.json": b"{}"})
    assert checkpoint.store.path("tokenizer_config.json").read_bytes() == b'{"model_max_length": 64}'
    assert open_hub(REPO, checkpoint.revision, endpoint=hub.endpoint).revision == checkpoint.revision


def test_a_damaged_download_is_refused_and_not_kept(hub, opened, tmp_path):
    store = opened().store
    fault = hub.fault("GET", "^/large/", corrupt=True)
    with pytest.raises(HubError, match=r"model-00001-of-00003\.safetensors arrived damaged"):
        store.path("model-00001-of-00003.safetensors")
    assert fault.hits == 1
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert store.path("model-00001-of-00003.safetensors").is_file()


def test_a_header_that_differs_from_the_file_is_refused(hub, opened):
    checkpoint = opened()
    shard = checkpoint.shards[0]
    store = HubStore(checkpoint.store.remote, {shard: {}})
    with pytest.raises(HubError, match="arrived damaged"):
        store.path(shard)


def test_a_connection_that_breaks_in_a_body_is_taken_up_again(hub, opened):
    store = opened().store
    fault = hub.fault("GET", "^/large/", drop_after=1000)
    shard = "model-00003-of-00003.safetensors"
    assert store.path(shard).read_bytes() == checkpoint_files()[shard]
    assert fault.hits == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_tried_again(hub, opened, status, monkeypatch):
    waits = []
    monkeypatch.setattr(hubclient.time, "sleep", waits.append)
    hub.fault("GET", "^/api/models/", status=status, headers={"Retry-After": "7"})
    hub.fault("GET", "^/large/", status=status)
    assert opened().shards
    assert waits == [7.0, 1.0]


REFUSALS = [
    ("no such repository", {"repo": "meta-llama/Llama-4-Nano"}, "no such repository", "hf auth login"),
    ("private", {"private": True}, "no such repository", "hf auth login"),
    ("gated, no token", {"gated": True}, "access is gated", "accept the licence at {endpoint}/" + REPO + ", then log"),
    ("gated, token", {"gated": True, "token": SECRET}, "access is gated", "accept the licence at"),
    ("wrong token", {"token": "hf_wrong"}, "the token is not accepted", "hf auth login"),
    ("no such revision", {"revision": "v9"}, "has no revision 'v9'", "/tree/main"),
    ("not a name", {"repo": "a/b/c"}, "not a repository's name", "ORGANISATION/NAME"),
    ("rate limit", {"status": 429}, "too many requests", "try again in 3 s"),
    ("broken Hub", {"status": 502}, "the Hub answered 502", "try again"),
]


@pytest.mark.parametrize(("case", "message", "hint"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_a_refusal_is_one_line_and_a_hint(hub, monkeypatch, case, message, hint):
    monkeypatch.setattr(hubclient.time, "sleep", lambda _: None)
    hub.add(REPO, checkpoint_files(), private=case.get("private", False), gated=case.get("gated", False))
    if "status" in case:
        hub.fault("GET", ".", times=99, status=case["status"], headers={"Retry-After": "3"})
    with pytest.raises(HubError, match=message) as caught:
        open_hub(case.get("repo", REPO), case.get("revision"), endpoint=hub.endpoint, token=case.get("token"))
    error = caught.value
    assert error.exit_code == 5
    assert hint.format(endpoint=hub.endpoint) in error.hint
    assert "\n" not in error.message + error.hint
    assert "hf_" not in error.message + error.hint


def test_no_connection(monkeypatch):
    monkeypatch.setattr(hubclient.time, "sleep", lambda _: None)
    with pytest.raises(HubError, match=r"the connection to http://127\.0\.0\.1:9 failed"):
        open_hub(REPO, endpoint="http://127.0.0.1:9")


def test_offline_the_cache_is_read_and_nothing_else(hub, opened, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        opened()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    online = opened()
    for name in checkpoint_files():
        online.store.path(name)
    before = len(hub.seen)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_hub(REPO, online.revision, endpoint=hub.endpoint).entries == online.entries
    assert len(hub.seen) == before


def broken(change: dict[str, bytes | None]) -> dict[str, bytes]:
    files = {**checkpoint_files(), **change}
    return {name: content for name, content in files.items() if content is not None}


SHARD = "model-00001-of-00003.safetensors"
BROKEN = {
    "no config": ({"config.json": None}, r"has no config\.json"),
    "config is not JSON": ({"config.json": b"{"}, "not JSON"),
    "config is a list": ({"config.json": b"[]"}, "not an object"),
    "another model": ({"config.json": b'{"model_type": "llama"}'}, "not a Llama 4"),
    "a config without end": ({"config.json": b" " * 5_000_000}, "implausibly large"),
    "a shard is missing": ({SHARD: None}, "1 of 3 shards are missing"),
    "no index": ({"model.safetensors.index.json": None}, "has 3 shards but no"),
    "a header that lies": ({SHARD: (10**12).to_bytes(8, "little") + b"{}"}, "claims a header of 1,000,000,000,000"),
    "an empty shard": ({SHARD: b""}, "claims a header of 0 bytes in a file of 0"),
    "a header without JSON": ({SHARD: (4).to_bytes(8, "little") + b"nope"}, "not valid JSON"),
    "an index that leaves the folder": (
        {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()},
        "not a shard of this folder",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_the_repository_holds_is_judged_like_a_folder(hub, change, message):
    hub.add(REPO, broken(change))
    with pytest.raises(SourceError, match=message):
        open_hub(REPO, endpoint=hub.endpoint)


def test_files_in_folders_are_not_companions(hub):
    hub.add(REPO, {**checkpoint_files(), "original/params.json": b"{}", ".gitattributes": b"*", "a\\b.json": b"{}"})
    assert list(open_hub(REPO, endpoint=hub.endpoint).companions) == ["tokenizer_config.json"]


def test_a_server_that_ignores_ranges_is_not_believed(hub, opened, monkeypatch):
    monkeypatch.setattr("hub_server.StorageHandler.content", lambda self, content, headers: hub_reply(content, headers))
    with pytest.raises(HubError, match="does not serve parts of files"):
        opened()


def hub_reply(content, headers):
    from hub_server import Reply

    return Reply(200, content, headers)


def test_quantizing_as_the_shards_arrive_gives_the_same_bytes(hub, checkpoint, tmp_path):
    """The source's shards come and go one after the other; the artifact is that of the same files in a folder."""
    source = checkpoint("scout", shards=4)
    hub.add(REPO, {path.name: path.read_bytes() for path in source.iterdir()})
    fetched = tmp_path / "fetched"
    recipe = load_recipe("int4-rtn")
    remote = open_hub(REPO, endpoint=hub.endpoint, fetch_as_you_go=True, folder=fetched)
    run_plan(make_plan(remote, recipe), tmp_path / "from-hub")
    run_plan(make_plan(open_folder(source), recipe), tmp_path / "from-folder")
    names = {path.name for path in (tmp_path / "from-folder").iterdir()}
    assert names == {path.name for path in (tmp_path / "from-hub").iterdir()}
    for name in names - {"l4pack-manifest.json"}:
        assert (tmp_path / "from-hub" / name).read_bytes() == (tmp_path / "from-folder" / name).read_bytes()
    manifest = json.loads((tmp_path / "from-hub" / "l4pack-manifest.json").read_bytes())
    assert manifest["source"]["repository"] == REPO
    assert manifest["source"]["revision"] == hub.repos[REPO].refs["main"]
    assert fetched.is_dir()
    assert not list(fetched.glob("*.safetensors"))
