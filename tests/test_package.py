"""Packaging an artifact, and what must be true before it may leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from licence_texts import APACHE, LICENSE, USE_POLICY
from measured import measured, record
from publishing import BASE, NAME, rewrite_manifest

from l4pack.artifact.manifest_schema import SCHEMA_FILE, read_manifest, schema_json
from l4pack.checkpoint.source import open_folder
from l4pack.errors import BudgetError, L4packError, LicenceError, QualityError, UsageError
from l4pack.publish import Wishes, check_ready, package_artifact

pytest_plugins = ["publishing_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")
PROMISE = {"model": "llama-4-scout", "device": "h100", "context": 512}


# Packaging


def test_packaging_makes_an_artifact_ready(unpackaged, licensed_source):
    result = package_artifact(unpackaged, open_folder(licensed_source), Wishes(base_model=BASE))
    assert result.name == NAME
    assert set(result.written) == {"NOTICE", "README.md"}
    assert result.audit.ok
    card = huggingface_hub.ModelCard((unpackaged / "README.md").read_text())
    assert card.data.language == ["en", "fr"]
    assert "| 1 x NVIDIA H100 80 GB SXM | 1,024 tokens |" in card.text
    assert check_ready(unpackaged, NAME)[0].startswith("licence: Llama 4")
    assert package_artifact(unpackaged, open_folder(licensed_source), Wishes(base_model=BASE)).written == ()


def test_missing_licence_files_come_from_the_source(unpackaged, licensed_source):
    for name in ("LICENSE", "USE_POLICY.md"):
        (unpackaged / name).unlink()
    with pytest.raises(LicenceError, match="LICENSE is missing, and the source"):
        package_artifact(unpackaged, None, Wishes(base_model=BASE))
    package_artifact(unpackaged, open_folder(licensed_source), Wishes(base_model=BASE))
    assert (unpackaged / "LICENSE").read_bytes() == (licensed_source / "LICENSE").read_bytes()


def test_missing_licence_files_are_fetched_from_the_source_repository(hub, unpackaged):
    hub.add(BASE, {"LICENSE": LICENSE.encode(), "USE_POLICY.md": USE_POLICY.encode()})
    revision = hub.repos[BASE].refs["main"]
    hub.add(BASE, {"LICENSE": b"another one"})
    rewrite_manifest(unpackaged, lambda m: m["source"].update(repository=BASE, revision=revision))
    for name in ("LICENSE", "USE_POLICY.md"):
        (unpackaged / name).unlink()
    assert package_artifact(unpackaged).audit.ok
    assert (unpackaged / "LICENSE").read_text() == LICENSE


def test_a_licence_is_never_made_up(hub, unpackaged):
    hub.add(BASE, {"LICENSE": APACHE.encode()})
    rewrite_manifest(unpackaged, lambda m: m["source"].update(repository=BASE, revision=None))
    (unpackaged / "LICENSE").unlink()
    with pytest.raises(LicenceError, match=f"LICENSE is missing, and {BASE} has none that serves"):
        package_artifact(unpackaged)
    assert not (unpackaged / "LICENSE").exists()


def test_a_model_of_its_own_licence_keeps_it(unpackaged):
    (unpackaged / "LICENSE").write_text(APACHE)
    (unpackaged / "USE_POLICY.md").unlink()
    result = package_artifact(unpackaged, None, Wishes(name="tiny-int4"))
    assert (result.audit.policy.policy, result.name, result.written) == ("apache-2.0", "tiny-int4", ("README.md",))
    with pytest.raises(LicenceError, match="must begin with 'Llama'"):
        package_artifact(unpackaged, None, Wishes(name="tiny-int4", base_model="meta-llama/Llama-4-Scout-17B-16E"))


@pytest.mark.parametrize(
    ("wishes", "error", "message"),
    [
        (Wishes(name="My-Llama", base_model=BASE), LicenceError, "must begin with 'Llama'"),
        (Wishes(name="llama4-tiny", base_model=BASE), LicenceError, "must begin with 'Llama'"),
        (Wishes(base_model="not a repo"), UsageError, "not a repository's name"),
        (Wishes(), LicenceError, r"README\.md: the card's metadata must name the model it was made from"),
    ],
)
def test_packaging_refuses(unpackaged, wishes, error, message):
    with pytest.raises(error, match=message):
        package_artifact(unpackaged, None, wishes)


MANIFESTS = {
    "absent": (None, "has no l4pack-manifest"),
    "not JSON": ("{", "is not JSON"),
    "a list": ("[]", "Input should be"),
    "another version": ({"schema_version": 3}, "schema_version"),
    "an unknown key": ({"clock": 1}, "clock"),
    "a repository that is none": ({"source": {"repository": "../x"}}, r"source\.repository"),
    "a digest that is none": ({"tensors": {"a": {"sha256": "abc"}}}, r"tensors\.a\.sha256"),
    "a recipe in other words": ({"recipe": {"name": "x"}}, "recipe"),
}


@pytest.mark.parametrize(("manifest", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_packaging_needs_a_manifest_that_can_be_read(unpackaged, manifest, message):
    path = unpackaged / "l4pack-manifest.json"
    whole = json.loads(path.read_bytes())
    path.unlink()
    if isinstance(manifest, str):
        path.write_text(manifest)
    elif manifest is not None:
        source = {**whole["source"], **manifest.pop("source", {})}
        path.write_text(json.dumps({**whole, "source": source, **manifest}))
    with pytest.raises(UsageError, match=message):
        package_artifact(unpackaged, None, Wishes(base_model=BASE))


def test_the_shipped_schema_is_that_of_the_manifest(quantized):
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_json()
    schema = json.loads(schema_json())
    manifest = json.loads((quantized / "l4pack-manifest.json").read_bytes())
    assert set(schema["required"]) <= set(manifest) <= set(schema["properties"])
    assert read_manifest(quantized).tensors.keys() == manifest["tensors"].keys()


# What must be true first


def test_what_does_not_verify_is_refused(packaged):
    shard = next(packaged.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 64
    shard.write_bytes(raw)
    with pytest.raises(L4packError, match="does not verify") as caught:
        check_ready(packaged, NAME)
    assert caught.value.exit_code == 1


def test_what_misses_a_duty_is_refused(packaged):
    (packaged / "NOTICE").unlink()
    with pytest.raises(LicenceError, match=r"NOTICE: the file is missing.*1\.b\.iii"):
        check_ready(packaged, NAME)


def test_a_repository_of_another_name_is_refused(packaged):
    with pytest.raises(LicenceError, match="must begin with 'Llama'"):
        check_ready(packaged, "My-Llama")


def promise(folder: Path, **changes: Any) -> None:
    rewrite_manifest(folder, lambda m: m["recipe"].update(promise={**PROMISE, **changes}))


def test_a_promise_that_is_kept_passes(packaged):
    promise(packaged)
    said = check_ready(packaged, NAME)
    assert any(line.startswith("budget: 512 tokens on h100 fits") for line in said)
    assert any(line == "gates: the recipe has none" for line in said)


def test_a_promise_that_is_not_kept_is_refused(packaged):
    promise(packaged, sequences=1_000_000, context=1024)
    with pytest.raises(BudgetError, match=r"promises 1,024 tokens on h100, which lacks .* GiB") as caught:
        check_ready(packaged, NAME)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("gates", "missed"),
    [
        ({"max_kl": 0.02, "min_agreement": 0.95, "max_perplexity_ratio": 1.04}, None),
        ({"max_kl": 0.0199}, r"max_kl 0\.0199 \(0\.02\)"),
        ({"min_agreement": 0.951}, r"min_agreement 0\.951 \(0\.95\)"),
        ({"max_perplexity_ratio": 1.039}, r"max_perplexity_ratio 1\.039 \(1\.04\)"),
    ],
)
def test_gates(packaged, gates, missed):
    promise(packaged, gates=gates)
    with pytest.raises(QualityError, match="accuracy was not measured"):
        check_ready(packaged, NAME)
    measured(packaged)
    package_artifact(packaged, None, Wishes(base_model=BASE))
    if missed is None:
        assert any(line.startswith("gates: ") and line.endswith("met") for line in check_ready(packaged, NAME))
        return
    with pytest.raises(QualityError, match=missed) as caught:
        check_ready(packaged, NAME)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("value", [float("nan"), "0.1", None])
def test_a_gate_is_not_passed_by_what_is_no_number(packaged, value):
    promise(packaged, gates={"max_kl": 0.5})
    (packaged / "accuracy.json").write_text(json.dumps({**record(packaged), "kl_mean": value}))
    with pytest.raises((QualityError, UsageError)):
        check_ready(packaged, NAME)
