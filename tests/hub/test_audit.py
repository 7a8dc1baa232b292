"""What is published is audited over real HTTP: by headers alone where they tell, else as it is fetched."""

from __future__ import annotations

import json
import shutil

import pytest
from whole_model import one_thread  # noqa: F401

pytest_plugins = ["publishing_fixtures"]
REPO = "somebody/Tiny-Int4"
MEASURED = ("--samples", 1, "--sequence-length", 48, "--compute", "cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over a lazy dog; " * 12)
    return path


@pytest.fixture
def publish(hub, quantized):
    def add(change=None):
        files = {path.name: path.read_bytes() for path in quantized.iterdir()}
        if change is not None:
            change(files)
        hub.add(REPO, files)
        return files

    return add


def header_bytes(files):
    shards = (content for name, content in files.items() if name.endswith(".safetensors"))
    return sum(8 + int.from_bytes(content[:8], "little") for content in shards)


@pytest.mark.parametrize("name", [REPO, f"hf://{REPO}", f"{REPO}@main"])
def test_headers_tell_without_one_byte_of_a_weight(l4pack, hub, publish, quantized, name):
    files = publish()
    ended = l4pack("verify", name, "--headers-only", "--json")
    assert ended.code == 0, ended.err
    local = json.loads(l4pack("verify", quantized, "--headers-only", "--json").out)
    assert json.loads(ended.out) == local
    assert hub.served("^/large/") == header_bytes(files) + 8  # the length is asked for first
    assert f"{REPO}@" in ended.err
    assert "of weights" in ended.err


def test_a_wrong_header_is_found(l4pack, hub, publish):
    def rename(files):
        name = next(name for name in files if name.endswith(".safetensors"))
        files[name] = files[name].replace(b"input_layernorm", b"input_layernarm", 1)

    publish(change=rename)
    ended = l4pack("verify", REPO, "--headers-only")
    assert ended.code == 1
    assert "input_layernarm" in ended.out.replace("\n", "")


def test_whole_it_is_as_the_folder(l4pack, hub, publish, quantized, licensed_source):
    publish()
    ended = l4pack("verify", REPO, "--against", licensed_source, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == json.loads(l4pack("verify", quantized, "--against", licensed_source, "--json").out)
    before = len(hub.requests("^/large/"))
    assert l4pack("verify", REPO).code == 0  # what was fetched lies in the client's cache
    assert len(hub.requests("^/large/")) == before


def test_a_changed_weight_is_found(l4pack, hub, publish):
    def flip(files):
        name = next(name for name in files if name.endswith(".safetensors"))
        files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])

    publish(change=flip)
    assert l4pack("verify", REPO, "--headers-only").code == 0
    assert l4pack("verify", REPO).code == 1


def test_it_is_measured_as_it_is_published(l4pack, hub, publish, quantized, licensed_source, text, tmp_path):
    publish()
    options = ("--against", licensed_source, "--text", text, *MEASURED, "--json")
    plan = json.loads(l4pack("evaluate", REPO, *options, "--dry-run").out)["plan"]
    assert plan["fetched_bytes"] == sum(path.stat().st_size for path in quantized.iterdir())
    assert hub.served("^/large/") < plan["fetched_bytes"] // 2
    ended = l4pack("evaluate", REPO, *options, "--max-kl", 9)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    here = shutil.copytree(quantized, tmp_path / "Tiny-Int4")
    local = json.loads(l4pack("evaluate", here, *options).out)
    assert found["gates"][0]["ok"]
    for record in (found, local):
        del record["run"], record["gates"]
    assert found == local
    assert l4pack("evaluate", REPO, *options, "--max-kl", 0).code == 6
    assert not (tmp_path / "Tiny-Int4.evaluate.partial").exists()


def test_it_is_compared_with_what_lies_here(l4pack, hub, publish, quantized, licensed_source, text, tmp_path):
    publish()
    here = shutil.copytree(quantized, tmp_path / "Tiny-Int4")
    options = ("--against", licensed_source, "--text", text, *MEASURED, "--json")
    plan = json.loads(l4pack("compare", here, REPO, *options, "--dry-run").out)["plan"]
    assert plan["fetched_bytes"] == sum(path.stat().st_size for path in quantized.iterdir())
    ended = l4pack("compare", here, REPO, *options)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [one["path"].partition("@")[0] for one in found["artifacts"]] == [str(here), REPO]
    assert [one["artifact"] for one in found["artifacts"]] == [one["path"] for one in found["artifacts"]]
    assert found["differences"][0]["kl_difference"] == 0
    assert (here / "accuracy.json").is_file()
    assert l4pack("compare", REPO, REPO, *options).code == 2


def test_a_page_of_what_is_published(l4pack, hub, publish, tmp_path):
    files = publish()
    ended = l4pack("report", REPO)
    assert ended.code == 0, ended.err
    page = (tmp_path / "Tiny-Int4.report.html").read_text()
    assert "Tiny-Int4" in page
    assert json.loads(files["l4pack-manifest.json"])["recipe"]["name"] in page
    assert hub.served("^/large/") == header_bytes(files) + 8


def test_what_is_not_there_is_said_in_a_line(l4pack, hub):
    for command, *more in (["verify"], ["evaluate"], ["report"], ["compare", "demo-int4", "--against", "demo"]):
        ended = l4pack(command, "nobody/nothing", *more)
        assert ended.code == 5
        assert ended.err.count("\n") == 2
        assert l4pack(command, "hf://nothing", *more).code == 4


def test_an_implausible_header_is_refused(l4pack, hub, publish):
    def swell(files):
        name = next(name for name in files if name.endswith(".safetensors"))
        files[name] = (2**40).to_bytes(8, "little") + files[name][8:]

    publish(change=swell)
    ended = l4pack("verify", REPO, "--headers-only")
    assert ended.code == 4
    assert "claims a header of" in ended.err
