"""Packaging an artifact, and what must be true before it may leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from licence_texts import APACHE, LICENSE, USE_POLICY
from measured import measured, record
from publishing import BASE, NAME, made, rewrite_manifest

from l4pack.artifact.manifest import source_record
from l4pack.artifact.manifest_schema import SCHEMA_FILE, SourceRecord, artifact_bytes, read_manifest, schema_json
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.errors import BudgetError, L4packError, LicenceError, QualityError, UsageError
from l4pack.evaluate.schema import PAIRED
from l4pack.model.tensors import catalogue
from l4pack.publish.base_model import base_claim
from l4pack.publish.family import rungs
from l4pack.publish.publish import Wishes, address_card, check_ready, package_artifact

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
    assert "| 1 x NVIDIA H100 80 GB SXM | 1 | 1,024 | 1,024 |" in card.text
    assert f"vllm serve ORG/{NAME} --max-model-len 1024 " in card.text
    assert "1 x NVIDIA GeForce RTX 5090 32 GB, 1,024 tokens, FP8 KV cache" in card.text
    assert check_ready(unpackaged, NAME)[1].startswith("licence: Llama 4")
    assert package_artifact(unpackaged, open_folder(licensed_source), Wishes(base_model=BASE)).written == ()


def test_missing_licence_files_come_from_the_source(unpackaged, licensed_source):
    for name in ("LICENSE", "USE_POLICY.md"):
        (unpackaged / name).unlink()
    with pytest.raises(LicenceError, match="LICENSE is missing, and the source"):
        package_artifact(unpackaged)
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


def test_a_base_model_gives_name_and_licence(hub, unpackaged):
    """An artifact of a folder that nobody knows: what it was made from is said when it is packaged."""
    base = "some-org/Llama-4-Mine"
    hub.add(base, {"LICENSE": LICENSE.encode(), "USE_POLICY.md": USE_POLICY.encode()})
    for name in ("LICENSE", "USE_POLICY.md"):
        (unpackaged / name).unlink()
    packaged = package_artifact(unpackaged, None, Wishes(base_model=base))
    assert packaged.name == "Llama-4-Mine-W4A16-g128"
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
    "a list": ("[]", "does not hold an object"),
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
    package_artifact(folder, None, Wishes(base_model=BASE))


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


# A card says what the records say


def packaged_with(folder: Path, **changes: Any) -> None:
    measured(folder, **changes)
    package_artifact(folder, None, Wishes(base_model=BASE))


def test_a_card_that_says_otherwise_than_the_records_is_refused(packaged, l4pack):
    packaged_with(packaged, kl_mean=0.0)
    assert check_ready(packaged, NAME)
    measured(packaged, kl_mean=0.01004)
    ended = l4pack("push", packaged, f"me/{NAME}", "--dry-run")
    assert ended.code == 1
    assert "README.md says otherwise than the records beside it, in 'Accuracy'" in ended.err
    assert f"hint: l4pack package {packaged}" in ended.err
    (packaged / "accuracy.json").unlink()
    with pytest.raises(L4packError, match="in 'Accuracy'"):
        check_ready(packaged, NAME)


EDITS = {
    "a figure": ("± 0.0010 |", "± 0.0001 |", "Accuracy"),
    "the number of tokens": ("same 4,096 tokens", "same 409,600 tokens", "Accuracy"),
    "a second section": ("## Memory", "## Accuracy\n\nBetter.\n\n## Memory", "Accuracy"),
    "a section that is gone": ("## Accuracy", "## Precision", "Accuracy"),
    "a section in a comment": ("## Accuracy", "<!--\n## Accuracy", "Accuracy"),
    "a context": ("| 1 | 1,024 | 1,024 |", "| 1 | 1,048,576 | 1,024 |", "Memory"),
    "the size": ("bits a parameter", "bit a parameter", "Weight"),
    "the command": ("l4pack quantize Llama-4-Tiny", "l4pack quantize meta-llama/Llama-4-Tiny", "How it was made"),
}


@pytest.mark.parametrize(("old", "new", "where"), EDITS.values(), ids=EDITS)
def test_figures_changed_by_hand_are_refused(packaged, old, new, where):
    packaged_with(packaged)
    card = packaged / "README.md"
    assert old in card.read_text()
    card.write_text(card.read_text().replace(old, new, 1))
    with pytest.raises(L4packError, match=f"in '{where}'"):
        check_ready(packaged, NAME)


def test_what_else_an_owner_writes_on_a_card_is_the_owners(packaged):
    packaged_with(packaged)
    card = packaged / "README.md"
    text = card.read_text().replace("## Limits", "## Mine\n\nWith love.\n\n## Limits and more").replace("\n", "\r\n")
    card.write_text(text.replace("language:", "datasets:\r\n- mine\r\nlanguage:"))
    assert check_ready(packaged, NAME)


def test_a_card_of_an_own_template_knows_what_it_was_made_of(packaged, tmp_path):
    own = tmp_path / "card.jinja"
    own.write_text("# {{ name }}\n\nKL {{ accuracy.rows[2][2] if accuracy }}\n")
    measured(packaged)
    package_artifact(packaged, None, Wishes(base_model=BASE, template=own))
    assert check_ready(packaged, NAME)
    measured(packaged, kl_mean=0.3)
    with pytest.raises(L4packError, match="says otherwise"):
        check_ready(packaged, NAME)


def test_a_gate_that_was_missed_is_refused_whatever_the_recipe_promises(packaged, l4pack):
    missed = {"gate": "max_kl", "limit": 0.01, "value": 0.02, "ok": False}
    packaged_with(packaged, gates=[missed])
    assert "`max_kl` 0.01: 0.02, **missed**" in (packaged / "README.md").read_text()
    told = l4pack("package", packaged, "--base-model", BASE)
    assert told.code == 0
    assert "missed: max_kl; the card says so, and push refuses the artifact" in told.out
    assert "next:" not in told.out
    assert json.loads(l4pack("package", packaged, "--base-model", BASE, "--json").out)["gates_missed"] == ["max_kl"]
    for gate in (missed, {**missed, "ok": True}, {**missed, "value": 0.001, "ok": True}):
        measured(packaged, gates=[gate])
        ended = l4pack("push", packaged, f"me/{NAME}", "--dry-run")
        assert ended.code == 6
        assert "1 of 1 quality gates missed: max_kl 0.01 (0.02)" in ended.err
    other = record(packaged, tokens=100, gates=[missed])
    measured(packaged, evaluations=[other])
    with pytest.raises(QualityError, match="max_kl"):
        check_ready(packaged, NAME)


def test_a_record_of_other_weights_is_refused(packaged, l4pack):
    whole = record(packaged)
    for stale in ({"identity": {**whole["identity"], "artifact": "0" * 64}}, {"evaluations": [
        {**whole, "identity": {**whole["identity"], "artifact": "0" * 64}}]}):  # fmt: skip
        measured(packaged, **stale)
        for command in (
            ["package", packaged, "--base-model", BASE],
            ["push", packaged, f"me/{NAME}"],
            ["report", packaged],
        ):
            ended = l4pack(*command)
            assert ended.code == 6, ended.err
            assert "was measured on other weights or another config.json than this folder's" in ended.err
    measured(packaged)
    config = json.loads((packaged / "config.json").read_text())
    config["text_config"]["attn_scale"] = 0.2
    (packaged / "config.json").write_text(json.dumps(config))
    assert "another config.json" in l4pack("package", packaged, "--base-model", BASE).err


def test_every_evaluation_stands_on_the_card(packaged):
    task = {"questions": 50, "accuracy": {"value": 0.5, "standard_error": 0.07}}
    alone = {**record(packaged, tokens=100, tasks={"arc": task}, **dict.fromkeys(PAIRED)), "against": None}
    packaged_with(packaged, evaluations=[alone])
    text = (packaged / "README.md").read_text()
    assert "same 4,096 tokens" in text
    assert "| 100 | not measured | not measured |" in text
    assert "| Task arc, 50 questions, accuracy | not measured | 0.500 ± 0.070 |" in text


SCOUT, MAVERICK = "meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Maverick-17B-128E"


@pytest.mark.parametrize("base", [SCOUT, MAVERICK, "unsloth/Llama-4-Scout-17B-16E", "meta-llama/Llama-4-Scout-Next"])
def test_a_small_model_is_not_made_from_a_large_one(packaged, l4pack, base):
    before = (packaged / "README.md").read_text()
    ended = l4pack("package", packaged, "--base-model", base)
    assert ended.code == 7
    assert f"this can't be made from {base}: that has" in ended.err
    card = packaged / "README.md"
    assert card.read_text() == before
    card.write_text(card.read_text().replace(f"- {BASE}", f"- {base}"))
    ended = l4pack("push", packaged, f"me/{NAME}")
    assert (ended.code, f"can't be made from {base}" in ended.err) == (7, True)


def test_who_says_what_a_model_was_made_from(packaged):
    text = (packaged / "README.md").read_text()
    assert f"| Source | `Llama-4-Tiny` |\n| Base model | `{BASE}`, declared by the publisher |" in text
    known = open_source("llama-4-scout")
    source = SourceRecord(**{**source_record(known), "repository": SCOUT, "weight_bytes": 1})
    assert base_claim(SCOUT, source, known.config.raw) == ""
    copy = "unsloth/Llama-4-Scout-17B-16E-Instruct"
    assert base_claim(copy, source, known.config.raw).endswith("are those of Llama 4 Scout")
    assert base_claim("me/Scout-tuned", source, known.config.raw) == "declared by the publisher"
    without_vision = known.config.model_copy(update={"vision": None})
    text_only = source.model_copy(update={"parameters": catalogue(without_vision).parameters})
    assert base_claim(SCOUT, text_only, known.config.raw) == ""
    with pytest.raises(LicenceError, match="parameters"):
        base_claim(MAVERICK, source, known.config.raw)
    wider = {**known.config.raw, "text_config": {**known.config.raw["text_config"], "num_attention_heads": 80}}
    with pytest.raises(LicenceError, match="another num_attention_heads"):
        base_claim(SCOUT, source, wider)


def test_the_command_on_the_card_is_the_one_that_was_run(l4pack, tmp_path):
    out = tmp_path / "demo-int4"
    assert l4pack("quantize", "demo", "--recipe", "int4-rtn", "--out", out, "--shard-size", "2MB").code == 0
    assert l4pack("package", out, "--source", "demo", "--name", "demo-x", "--base-model", "me/demo").code == 0
    text = (out / "README.md").read_text()
    assert "\nl4pack quantize demo --recipe int4-rtn --shard-size 2000000B --out demo-x\n" in text


def test_one_artifact_has_one_size(l4pack, tmp_path):
    out = tmp_path / "demo-int4"
    size = json.loads(l4pack("plan", "demo", "--recipe", "int4-rtn", "--json").out)["artifact_bytes"]
    built = l4pack("build", "demo", "--recipe", "int4-rtn", "--out", out, "--skip-evaluate")
    assert f"{size:,} bytes" in built.out
    assert f"({size:,} bytes)" in (out / "README.md").read_text()
    assert artifact_bytes(out) == size == sum(
        path.stat().st_size for path in out.iterdir() if path.name not in ("README.md", "accuracy.json")
    )  # fmt: skip
    measured(out)
    assert artifact_bytes(out) == size
    assert l4pack("report", out, "--out", tmp_path / "page.html").code == 0
    assert f"{size:,} bytes" in (tmp_path / "page.html").read_text()
    assert f"{size:,} bytes" in l4pack("plan", "demo", "--recipe", "int4-rtn").out


def test_a_family_stands_on_the_card_of_each(unpackaged, licensed_source, tmp_path):
    """From large to small, with what was measured of each, and where each runs."""
    other = made(licensed_source, tmp_path / "Llama-4-Tiny-FP8", {"extends": "fp8"})
    measured(unpackaged)
    measured(other, kl_mean=0.001, kl_standard_error=0.0001)
    package_artifact(other, None, Wishes(base_model=BASE))
    address_card(other, "me/Llama-4-Tiny-FP8")
    package_artifact(unpackaged, None, Wishes(base_model=BASE, family=rungs([str(other)], unpackaged)))
    card = (unpackaged / "README.md").read_text()
    table = card.partition("## Family")[2].partition("##")[0].splitlines()
    rows = [line for line in table if line.startswith("| ")][1:]
    assert len(rows) == 2
    assert "](https://huggingface.co/me/Llama-4-Tiny-FP8)" in rows[0]
    assert "0.00100 ± 0.00010" in rows[0]
    assert f"**{NAME}** (this)" in rows[1]
    assert "0.0200 ± 0.0010" in rows[1]
    assert all("RTX 5090" in row for row in rows)
    check_ready(unpackaged, NAME)


def test_a_family_is_of_one_original(unpackaged, checkpoint, tmp_path):
    stranger = made(checkpoint("maverick"), tmp_path / "Llama-4-Other", {})
    with pytest.raises(UsageError, match="was made from another model"):
        rungs([str(stranger)], unpackaged)


def test_a_family_on_the_hub_is_read_by_its_headers(hub, l4pack, unpackaged, licensed_source, checkpoint, tmp_path):
    """A repository, or all of a collection but strangers and the artifact itself, under whatever name it is there."""
    published = {
        "me/Llama-4-Tiny-FP8": made(licensed_source, tmp_path / "fp8", {"extends": "fp8"}),
        "me/Llama-4-Other": made(checkpoint("maverick"), tmp_path / "other", {}),
        "me/The-Same": unpackaged,
    }
    measured(published["me/Llama-4-Tiny-FP8"], kl_mean=0.001, kl_standard_error=0.0001)
    for name, folder in published.items():
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    hub.add("me/Something", {"config.json": b"{}"})
    hub.collections["me/tiny-64f9"] = [*published, "me/Something"]
    ended = l4pack(
        "package", unpackaged, "--base-model", BASE, "--family", "https://huggingface.co/collections/me/tiny-64f9"
    )
    assert ended.code == 0, ended.err
    assert "me/Something: no artifact of l4pack, left out" in ended.err
    assert ": of another model, left out" in ended.err
    card = (unpackaged / "README.md").read_text()
    table = card.partition("## Family")[2].partition("##")[0].splitlines()
    rows = [line for line in table if line.startswith("| ")][1:]
    assert len(rows) == 2
    assert "[Llama-4-Tiny-FP8](https://huggingface.co/me/Llama-4-Tiny-FP8)" in rows[0]
    assert "0.00100 ± 0.00010" in rows[0]
    (alone,) = rungs(["me/Llama-4-Tiny-FP8"], unpackaged)
    assert alone == rungs(["collections/me/tiny-64f9"], unpackaged)[0]
    assert hub.served("^/large/") < 300_000
    for name, code in (("collections/me/nothing", 5), ("me/Llama-4-Other", 2), ("hf://nothing", 4), ("nowhere", 2)):
        ended = l4pack("package", unpackaged, "--base-model", BASE, "--family", name)
        assert ended.code == code, (name, ended.err)
        assert ended.err.count("error:") == 1
