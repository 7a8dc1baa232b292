"""A signed artifact: standard tools check it, and a changed byte anywhere fails."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from publishing import NAME, REPO

pytest_plugins = ["publishing_fixtures"]
pytestmark = [
    pytest.mark.usefixtures("own_home"),
    # huggingface_hub hands file objects to httpx in a way that httpx no longer likes.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH's client is not installed"),
]
LIST, SIGNATURE = "l4pack-files.sha256", "l4pack-files.sha256.sig"


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Two keys, and a file that allows the first to sign."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "allowed").write_text(f"me@example.org {(folder / 'mine.pub').read_text()}")
    return folder


@pytest.fixture
def signed(packaged, keys, l4pack):
    ended = l4pack("package", packaged, "--base-model", "meta-llama/Llama-4-Tiny", "--sign", keys / "mine")
    assert ended.code == 0, ended.err
    return packaged


def verified(l4pack, folder, keys):
    ended = l4pack("verify", folder, "--signature", keys / "allowed", "--json")
    found = [one for one in json.loads(ended.out)["findings"] if one["rule"] == "signature"]
    return ended.code, found


def test_standard_tools_check_it(signed, keys, l4pack):
    assert verified(l4pack, signed, keys) == (0, [])
    said = subprocess.run(
        ["ssh-keygen", "-Y", "verify", "-f", keys / "allowed", "-I", "me@example.org", "-n", "l4pack", "-s", SIGNATURE],
        cwd=signed, input=(signed / LIST).read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert b"Good" in said.stdout
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", LIST], cwd=signed, check=True)
    listed = {line.partition("  ")[2] for line in (signed / LIST).read_text().splitlines()}
    assert listed == {path.name for path in signed.iterdir()} - {LIST, SIGNATURE}
    assert {"README.md", "LICENSE", "NOTICE", "config.json", "l4pack-manifest.json"} <= listed


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["README.md", "LICENSE", "USE_POLICY.md", "NOTICE", "config.json", "l4pack-manifest.json", "tokenizer.json",
     "generation_config.json"],
)  # fmt: skip
def test_a_changed_byte_fails(signed, keys, l4pack, name):
    flip(signed / name)
    code, found = verified(l4pack, signed, keys) if name != "config.json" else (1, broken(signed))
    assert code == 1
    assert (found[0]["where"], found[0]["message"]) == (name, "is not what was signed")


def broken(folder):
    """Of a folder whose configuration may be past opening."""
    from l4pack.artifact.signature import broken_files

    return [{"where": name, "message": message} for name, message in broken_files(folder)]


def test_a_changed_weight_fails(signed, keys, l4pack):
    weights = next(signed.glob("*.safetensors"))
    flip(weights)
    code, found = verified(l4pack, signed, keys)
    assert (code, found[0]["where"]) == (1, weights.name)


CHANGES = {
    "a file added": (
        lambda folder: (folder / "accuracy.json").write_text("{}"),
        "accuracy.json",
        "is not on the signed",
    ),
    "a file taken": (lambda folder: (folder / "NOTICE").unlink(), "NOTICE", "on the signed list and not here"),
    "another list": (lambda folder: flip(folder / LIST), SIGNATURE, "is not a signature of this"),
    "no signature": (lambda folder: (folder / SIGNATURE).unlink(), SIGNATURE, "the artifact is not signed"),
    "no list": (lambda folder: (folder / LIST).unlink(), SIGNATURE, "the artifact is not signed"),
    "no signature at all": (lambda folder: (folder / SIGNATURE).write_text("?"), SIGNATURE, "none of the allowed"),
}


@pytest.mark.parametrize(("change", "where", "message"), CHANGES.values(), ids=CHANGES)
def test_what_is_not_as_it_was_signed(signed, keys, change, where, message):
    from l4pack.verify.checks_signature import check_signature
    from l4pack.verify.findings import Findings

    change(signed)
    found = Findings()
    check_signature(signed, keys / "allowed", found)
    (first, *_) = found
    assert first.where == where
    assert message in first.message


@pytest.mark.parametrize(("key", "namespace"), [("other", "l4pack"), ("mine", "git")])
def test_a_signature_by_another_or_for_something_else(signed, keys, l4pack, key, namespace):
    (signed / SIGNATURE).unlink()
    asked = ["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", keys / key, signed / LIST]
    subprocess.run(asked, check=True, capture_output=True)
    code, found = verified(l4pack, signed, keys)
    assert (code, len(found), found[0]["where"]) == (1, 1, SIGNATURE)


def test_what_cannot_be_asked(signed, keys, l4pack, tmp_path, monkeypatch):
    ended = l4pack("verify", signed, "--signature", tmp_path / "nowhere")
    assert ended.code == 2
    assert "is no file of allowed signers" in ended.err
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        ended = l4pack("verify", signed, "--signature", keys / "allowed")
        assert (ended.code, "ssh-keygen is not installed" in ended.err) == (2, True)
    ended = l4pack("package", signed, "--base-model", "meta-llama/Llama-4-Tiny", "--sign", keys / "allowed")
    assert ended.code == 2
    assert "can't sign" in ended.err


def test_push_signs_what_it_sends_and_refuses_what_changed_since(hub, packaged, keys, l4pack, tmp_path):
    ended = l4pack("push", packaged, REPO, "--sign", keys / "mine")
    assert ended.code == 0, ended.err
    there = {name: blob.content for name, blob in hub.repos[REPO].files().items()}
    assert {LIST, SIGNATURE} <= set(there)
    copy = tmp_path / NAME
    copy.mkdir()
    for name, content in there.items():
        (copy / name).write_bytes(content)
    assert verified(l4pack, copy, keys) == (0, [])
    card = packaged / "README.md"
    card.write_text(card.read_text() + "\nA word of mine.\n")
    ended = l4pack("push", packaged, REPO)
    assert ended.code == 1
    assert "README.md is not what was signed" in ended.err
    assert l4pack("push", packaged, REPO, "--sign", keys / "mine").code == 0
