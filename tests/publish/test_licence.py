"""The licence audit: every duty, every violation of it, and which licence governs what."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from folders import Files, write
from hub_server import running_hub
from licence_texts import APACHE, CARD, LICENSE, NOTICE, USE_POLICY, other_files, scout_files
from publishing import policy_named
from typer.testing import CliRunner

from l4pack.artifact.policy import Duty, Policy, policies
from l4pack.cli.app import app
from l4pack.errors import LicenceError, SourceError
from l4pack.publish.licence import audit

NAME = "Llama-4-Scout-17B-16E-Instruct-W4A16-g128"


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: {key: value for key, value in files.items() if key != name}


def with_file(name: str, text: str) -> Callable[[Files], Files]:
    return lambda files: {**files, name: text.encode()}


def card(old: str, new: str) -> Callable[[Files], Files]:
    assert old in CARD
    return with_file("README.md", CARD.replace(old, new))


EU = "principal place of business in, the European Union"
VIOLATIONS = {
    "no licence": (without("LICENSE"), "licence-copy", "LICENSE"),
    "another version's licence": (
        with_file("LICENSE", LICENSE.replace("April 5, 2025", "September 25, 2024")), "licence-copy", "LICENSE"),
    "an empty licence": (with_file("LICENSE", ""), "licence-copy", "LICENSE"),
    "Apache text over Llama 4": (with_file("LICENSE", APACHE), "licence-copy", "LICENSE"),
    "a clause cut out of the licence": (
        with_file("LICENSE", LICENSE.replace("greater than 700 million", "greater")), "licence-copy", "LICENSE"),
    "no use policy": (without("USE_POLICY.md"), "use-policy", "USE_POLICY.md"),
    "a use policy without the EU paragraph": (
        with_file("USE_POLICY.md", USE_POLICY.replace("European Union", "Union")), "use-policy", "USE_POLICY.md"),
    "no notice": (without("NOTICE"), "notice", "NOTICE"),
    "a notice in other words": (
        with_file("NOTICE", NOTICE.replace("is licensed", "was licensed")), "notice", "NOTICE"),
    "a notice without the copyright sign": (with_file("NOTICE", NOTICE.replace("©", "(c)")), "notice", "NOTICE"),
    "the notice of Llama 3": (with_file("NOTICE", NOTICE.replace("Llama 4", "Llama 3.1")), "notice", "NOTICE"),
    "not built with Llama": (card("Built with Llama", "Made from Llama"), "built-with-llama", "README.md"),
    "built with Llama in a comment": (
        card("**Built with Llama**", "<!-- Built with Llama -->"), "built-with-llama", "README.md"),
    "built with Llama in a code block": (
        card("**Built with Llama**", "```\nBuilt with Llama\n```"), "built-with-llama", "README.md"),
    "built with Llama in another case": (
        card("Built with Llama", "built with llama"), "built-with-llama", "README.md"),
    "built with Llama far down": (
        card("**Built with Llama**", "word\n\n" * 20 + "**Built with Llama**"), "built-with-llama", "README.md"),
    "no word of the EU": (card(EU, "principal place of business elsewhere"), "european-union", "README.md"),
    "the EU in pieces": (card(EU, "principal place of business\n\nin the European Union"), "european-union", "README.md"),
    "no word of 700 million": (card("700 million", "many"), "monthly-active-users", "README.md"),
    "licence of Llama 3": (card("license_name: llama4", "license_name: llama3.1"), "licence-metadata", "README.md"),
    "another company's licence": (
        card("license_name: llama4", "license_name: nvidia-open-model-license"), "licence-metadata", "README.md"),
    "licence claimed to be free": (
        card("license: other\nlicense_name: llama4", "license: apache-2.0"), "licence-metadata", "README.md"),
    "no metadata": (with_file("README.md", CARD.split("---")[2]), "licence-metadata", "README.md"),
    "unreadable metadata": (card("license: other", "license: [other"), "licence-metadata", "README.md"),
    "no base model": (
        card("base_model:\n- meta-llama/Llama-4-Scout-17B-16E-Instruct\n", ""), "base-model", "README.md"),
    "no card": (without("README.md"), "built-with-llama", "README.md"),
    "a wrong name": (card(f"# {NAME}", "# Scout-W4A16"), "name", "Scout-W4A16"),
}  # fmt: skip


def test_a_folder_that_meets_every_duty_passes(tmp_path):
    result = audit(str(write(tmp_path / "out", scout_files())))
    assert result.ok
    assert result.findings == ()
    assert (result.policy.policy, result.name, result.duties) == ("llama4", NAME, 9)


@pytest.mark.parametrize(("violate", "rule", "where"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_every_violation_is_found_and_nothing_else(tmp_path, request, violate, rule, where):
    folder = write(tmp_path / NAME, violate(scout_files()))
    result = audit(str(folder))
    assert result.policy.policy == "llama4"
    assert not result.ok
    found = [(finding.rule, finding.where) for finding in result.findings]
    assert (rule, where) in found
    of_the_card = {"no card": 5, "no metadata": 2, "unreadable metadata": 2}
    assert len(found) == of_the_card.get(request.node.callspec.id, 1)
    message = next(finding.message for finding in result.findings if finding.rule == rule)
    assert "License" in message or "Acceptable Use Policy" in message or "metadata" in message


def test_every_duty_has_a_violation():
    rules = {rule for _, rule, _ in VIOLATIONS.values()}
    assert rules == {duty.rule for duty in policy_named("llama4").duties} | {"name"}


SAME = {
    "names of files in another case": lambda f: {
        **without("NOTICE")(without("LICENSE")(f)), "Notice.txt": f["NOTICE"], "license": f["LICENSE"]},
    "other line breaks": lambda f: {**f, "LICENSE": f["LICENSE"].replace(b"\n", b"\r\n   ")},
    "straight quotes": lambda f: {**f, "LICENSE": LICENSE.replace("“", '"').replace("”", '"').encode()},
    "the Hub's own licence id": lambda f: {
        **f, "README.md": CARD.replace("license: other\nlicense_name: llama4", "license: llama4").encode()},
    "a link around Built with Llama": lambda f: {
        **f, "README.md": CARD.replace("**Built with Llama**", "> [*Built with Llama*](https://llama.com)").encode()},
}  # fmt: skip


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_does_not_matter_does_not_matter(tmp_path, change):
    assert audit(str(write(tmp_path / "out", change(scout_files())))).ok


def config(**text: int) -> bytes:
    return json.dumps({"model_type": "llama4", "text_config": text}).encode()


TINY = {"hidden_size": 64, "vocab_size": 512}
GOVERNED = {
    "a model of the architecture with its own licence": ({}, "apache-2.0"),
    "Meta's dimensions under Apache": ({"config.json": config(hidden_size=5120, vocab_size=202048)}, "llama4"),
    "a pruned Llama 4 under Apache": (
        {"config.json": config(hidden_size=5120, vocab_size=202048, num_hidden_layers=4)}, "llama4"),
    "Llama 4 lineage under Apache": (
        {"README.md": b"---\nlicense: apache-2.0\nbase_model: meta-llama/Llama-4-Scout-17B-16E\n---\n"}, "llama4"),
    "Apache claimed, no text": ({"LICENSE": None}, "llama4"),
    "Apache claimed, unknown text": ({"LICENSE": b"do what you like"}, "llama4"),
    "an unknown licence": ({"README.md": b"---\nlicense: wtfpl\n---\n"}, "llama4"),
    "no card and Apache text": ({"README.md": None}, "apache-2.0"),
    "no dimensions": ({"config.json": b'{"model_type": "llama4"}'}, "llama4"),
    "no configuration, Llama 4 in its lineage": (
        {"config.json": None, "README.md": b"---\nbase_model: [unsloth/Llama-4-Maverick]\n---\n"}, "llama4"),
    "another architecture": ({"config.json": b'{"model_type": "opt"}'}, "apache-2.0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "policy"), GOVERNED.values(), ids=GOVERNED)
def test_which_licence_governs(tmp_path, change, policy):
    files = {name: content for name, content in {**other_files(), **change}.items() if content is not None}
    assert audit(str(write(tmp_path / "tiny", files))).policy.policy == policy


def test_a_model_under_its_own_licence_has_that_licences_duties(tmp_path):
    assert audit(str(write(tmp_path / "tiny", other_files()))).ok
    (tmp_path / "tiny" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    assert [finding.rule for finding in audit(str(tmp_path / "tiny")).findings] == ["changes-stated"]


def test_what_no_policy_knows_is_an_error_not_a_pass(tmp_path):
    files = {"config.json": b'{"model_type": "qwen3"}', "README.md": b"---\nlicense: odd\n---\n"}
    with pytest.raises(LicenceError, match="no policy knows licence 'odd'"):
        audit(str(write(tmp_path / "other", files)))


def test_an_empty_folder_is_an_error_not_a_pass(tmp_path):
    with pytest.raises(SourceError, match="is empty"):
        audit(str(tmp_path))
    with pytest.raises(SourceError, match="on this machine"):
        audit(str(tmp_path / "absent"))


def test_a_repository_on_the_hub_is_audited_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with running_hub() as hub:
        hub.add(f"me/{NAME}", {**scout_files(), "model.safetensors": bytes(3_000_000)})
        hub.add("me/My-Llama", {**scout_files(), "NOTICE": b"none"})
        assert audit(f"me/{NAME}", endpoint=hub.endpoint).ok
        found = audit("me/My-Llama", endpoint=hub.endpoint).findings
        assert hub.served("^/large/") == 0
    assert [finding.rule for finding in found] == ["notice", "name"]


HOSTILE = {
    "a heading without end": "# " + " #" * 400_000 + "x",
    "spaces without end": "---\nlicense: other\n---\n" + ("\n" + " " * 1000) * 900,
    "comments without end": "<!--" * 200_000,
    "code without end": "```\n" * 200_000,
    "aliases that double": "---\na0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)) + "base_model: *a59\n---\n",
    "nesting without end": "---\nbase_model: " + "[" * 5000 + "\n---\n",
    "metadata that are a list": "---\n- 1\n---\n",
    "no text at all": "\x00" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_card_is_judged_and_soon(tmp_path, text):
    folder = write(tmp_path / NAME, {**scout_files(), "README.md": text.encode()})
    begun = time.perf_counter()
    assert {finding.rule for finding in audit(str(folder)).findings} >= {"built-with-llama", "licence-metadata"}
    assert time.perf_counter() - begun < 20


def run(*arguments: str):
    return CliRunner().invoke(app, ["licence", *arguments], catch_exceptions=False)


def test_the_command_says_what_is_missing_and_exits_7(tmp_path):
    folder = write(tmp_path / "out", scout_files())
    passed = run(str(folder))
    assert passed.exit_code == 0
    assert "9 duties" in passed.stdout
    (folder / "NOTICE").unlink()
    failed = run(str(folder))
    assert failed.exit_code == 7
    assert "notice" in failed.stdout
    assert "1.b.iii" in " ".join(failed.stdout.split())


def test_the_commands_json(tmp_path):
    folder = write(tmp_path / "out", without("NOTICE")(scout_files()))
    result = run(str(folder), "--json")
    assert result.exit_code == 7
    value = json.loads(result.stdout)
    assert value["ok"] is False
    assert [set(finding) for finding in value["findings"]] == [{"rule", "where", "message"}]
    assert value["findings"][0]["rule"] == "notice"


def test_a_name_can_be_tried(tmp_path):
    folder = write(tmp_path / "out", scout_files())
    assert run(str(folder), "--name", "My-Llama").exit_code == 7


def test_policies_cite_a_clause_for_every_duty():
    assert {policy.policy for policy in policies()} == {"llama4", "apache-2.0", "mit"}
    for policy in policies():
        assert all(duty.clause and duty.message for duty in policy.duties)
        assert policy.text_duty.origin == "source"


def test_a_policy_with_a_duty_of_two_kinds_is_refused():
    with pytest.raises(ValueError, match="give one of files, card, metadata"):
        Duty(rule="x", clause="y", message="z", card=["a"], metadata=[{"b": "c"}])
    with pytest.raises(ValueError, match="a file needs an origin"):
        Duty(rule="x", clause="y", message="z", files=["A"])
    with pytest.raises(ValueError, match="duties"):
        Policy(policy="x", title="x", metadata={}, duties=[], block="")
