"""An export goes to the Hub as its artifact does: with licence, card and name, and only while it holds the artifact's numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from exporting import MIX, with_merge
from huggingface_hub import ModelCard
from licence_texts import LICENSE
from measured import measured
from publishing import BASE

from l4pack.checkpoint.source import open_folder
from l4pack.errors import L4packError, LicenceError, UsageError
from l4pack.export.known import target_named
from l4pack.export.plan import plan_export
from l4pack.export.publish import check_export_ready, find_export, open_export, package_export
from l4pack.export.run import run_export
from l4pack.plan.plan import make_plan
from l4pack.publish.licence import audit
from l4pack.publish.publish import Wishes, package_artifact
from l4pack.quantize.run import run_plan

pytest_plugins = ["publishing_fixtures"]
pytestmark = [
    pytest.mark.usefixtures("own_home"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]
SUFFIX = {"gguf": "-GGUF", "mlx": "-MLX"}


@pytest.fixture(scope="module")
def exported(licensed_source, tmp_path_factory):
    """A packaged artifact and its exports, made before it was packaged."""
    place = tmp_path_factory.mktemp("exported")
    source = with_merge(licensed_source, place / "Llama-4-Tiny")
    run_plan(make_plan(open_folder(source), MIX), place / "out")
    for name in SUFFIX:
        run_export(plan_export(open_folder(place / "out"), target_named(name), split=200_000), place / name)
    package_artifact(place / "out", open_folder(source), Wishes(base_model=BASE))
    return place


@pytest.fixture
def there(exported, tmp_path):
    """The artifact and its exports, which a test may change."""
    for name in ("out", *SUFFIX):
        shutil.copytree(exported / name, tmp_path / name)
    return SimpleNamespace(artifact=tmp_path / "out", **{name: tmp_path / name for name in SUFFIX})


@pytest.mark.parametrize("container", SUFFIX)
def test_from_the_command_line_to_the_hub(container, there, hub, l4pack):
    folder = getattr(there, container)
    packaged = json.loads(l4pack("package", folder, "--of", there.artifact, "--json").out)
    title = ModelCard((there.artifact / "README.md").read_text()).text.splitlines()[1].strip("# ")
    assert packaged["name"] == title + SUFFIX[container]
    assert {"NOTICE", "README.md"} <= set(packaged["written"])
    asked = ("push", folder, f"me/{packaged['name']}", "--of", there.artifact)
    assert json.loads(l4pack(*asked, "--dry-run", "--json").out)["commit"] is None
    assert f"me/{packaged['name']}" not in hub.repos
    ended = l4pack(*asked, "--json")
    assert ended.code == 0, ended.err
    sent = hub.repos[f"me/{packaged['name']}"].files("main")
    own = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: blob.content for name, blob in sent.items() if name != ".gitattributes"} == own
    assert f"me/{packaged['name']}" in own["README.md"].decode()
    assert "ORG/" not in own["README.md"].decode()
    assert l4pack("licence", folder).code == 0
    assert json.loads(l4pack(*asked, "--json").out)["send_bytes"] == 0


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH's client is not installed")
def test_a_signed_export_is_checked_with_and_without_its_artifact(there, l4pack, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    (tmp_path / "allowed").write_text(f"me@example.org {(tmp_path / 'key.pub').read_text()}")
    assert l4pack("package", there.gguf, "--of", there.artifact, "--sign", tmp_path / "key").code == 0
    asked = ("verify", there.gguf, "--signature", tmp_path / "allowed")
    ended = l4pack(*asked)
    assert (ended.code, "signers signed it" in " ".join(ended.out.split())) == (0, True), ended.err
    found = json.loads(l4pack(*asked, "--against", there.artifact, "--json").out)
    assert (found["ok"], found["findings"]) == (True, [])
    assert found["proof"]["weights"] > 0
    (there.gguf / "README.md").write_text("another card")
    ended = l4pack(*asked, "--json")
    assert ended.code == 1
    assert [(one["rule"], one["where"]) for one in json.loads(ended.out)["findings"]] == [("signature", "README.md")]


@pytest.mark.parametrize("command", ["inspect", "plan", "evaluate", "verify"])
def test_files_of_other_runtimes_are_called_what_they_are(there, l4pack, tmp_path, command):
    foreign = shutil.copytree(there.mlx, tmp_path / "foreign")
    (foreign / "l4pack-export.json").unlink()
    file = next(there.gguf.glob("*.gguf"))
    more = ("--against", there.artifact) if command == "evaluate" else ()
    for place, says in ((foreign, "is mlx-lm's"), (file, "is llama.cpp's"), (there.gguf, "is llama.cpp's")):
        if command == "verify" and place is not foreign:
            continue  # it has checks of its own for them
        ended = l4pack(command, place, *more)
        assert (ended.code, says in ended.err, "l4pack budget" in ended.err) == (4, True, True), ended.err
    assert l4pack("budget", foreign, "--device", "h100").code == 0


def test_a_signature_is_of_an_export_not_of_one_file(there, l4pack, tmp_path):
    foreign = shutil.copy(next(there.gguf.glob("*.gguf")), tmp_path)
    ended = l4pack("verify", foreign, "--signature", tmp_path / "allowed")
    assert (ended.code, "leave --signature out" in ended.err) == (2, True)


def test_a_card_says_what_the_files_are(there):
    measured(there.artifact)
    package_artifact(there.artifact, None, Wishes(base_model=BASE))
    for container, library, pipeline in (
        ("gguf", "gguf", "image-text-to-text"),
        ("mlx", "mlx", "text-generation"),
    ):
        folder = getattr(there, container)
        package_export(open_export(folder, there.artifact))
        card = ModelCard((folder / "README.md").read_text())
        data = card.data.to_dict()
        assert (data["library_name"], data["pipeline_tag"], data["base_model"]) == (library, pipeline, [BASE])
        assert (data["base_model_relation"], data["license_name"]) == ("quantized", "llama4")
        assert library in data["tags"]
        assert "vllm" not in card.text
        assert "the numbers here are the same" in card.text
        assert "KL divergence from the original" in card.text
    card = (there.gguf / "README.md").read_text()
    assert "--mmproj" in card
    assert "13282" in card
    assert "llama-gguf-split --merge" in card
    assert "ollama run" not in card
    assert "mlx_lm.generate --model ORG/" in (there.mlx / "README.md").read_text()


def test_what_is_rounded_once_more_is_said(there):
    path = there.gguf / "l4pack-export.json"
    record = json.loads(path.read_bytes())
    path.write_text(
        json.dumps({**record, "rounded": [{"where": "a.b", "to": "Q8_0", "why": "no <type>", "matrices": 1}]})
    )
    package_export(open_export(there.gguf, there.artifact))
    card = (there.gguf / "README.md").read_text()
    assert "round once more" in card
    assert "<type>" not in card
    assert "the numbers here are the same" not in card


def test_an_export_is_of_its_artifact(there, exported):
    with pytest.raises(UsageError, match="is an export") as refused:
        find_export(there.gguf, None)
    assert "--of" in refused.value.hint
    with pytest.raises(UsageError, match="is no export"):
        find_export(there.artifact, there.artifact)
    record = there.gguf / "l4pack-export.json"
    record.write_text(record.read_text().replace('"contents_sha256": "', '"contents_sha256": "0'))
    with pytest.raises(UsageError, match="another digest"):
        open_export(there.gguf, there.artifact)
    record.write_text('{"container": "onnx"}')
    with pytest.raises(L4packError, match="container"):
        open_export(there.gguf, there.artifact)


def test_what_is_not_the_artifacts_does_not_leave(there):
    export = open_export(there.mlx, there.artifact)
    name = package_export(export).name
    assert check_export_ready(export, name)[-1].endswith("each is the artifact's")
    with pytest.raises(LicenceError, match="begin with 'Llama'"):
        check_export_ready(export, "tiny-MLX")
    card = there.mlx / "README.md"
    said = card.read_text()
    card.write_text(said.replace("bit for bit", "more or less"))
    with pytest.raises(L4packError, match="says otherwise"):
        check_export_ready(export, name)
    card.write_text(said)
    shard = max(there.mlx.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(L4packError, match="does not verify"):
        check_export_ready(export, name)


def test_a_gguf_says_itself_that_it_is_llama_4(there):
    """Whatever its card claims."""
    for name in ("LICENSE", "USE_POLICY.md"):
        (there.gguf / name).unlink(missing_ok=True)
    (there.gguf / "LICENSE").write_text(LICENSE)
    (there.gguf / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    found = audit(str(there.gguf))
    assert found.policy.policy == "llama4"
    assert not found.ok
