"""What would be refused of an artifact, known from its source alone, is what packaging and pushing it then refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from publishing import BASE, NAME, made

from l4pack.checkpoint.source import open_folder
from l4pack.errors import L4packError
from l4pack.publish.ahead import refused_later
from l4pack.publish.publish import Wishes, check_ready, package_artifact
from l4pack.recipe import load_recipe

pytest_plugins = ["publishing_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")
SCOUT = "meta-llama/Llama-4-Scout-17B-16E-Instruct"

# What is done to the source, how it is packaged, and the file or value that is named.
REFUSED = {
    "no licence": (lambda folder: (folder / "LICENSE").unlink(), {"base_model": BASE}, "LICENSE"),
    "another licence": (lambda folder: (folder / "LICENSE").write_text("mine"), {"base_model": BASE}, "LICENSE"),
    "no use policy": (lambda folder: (folder / "USE_POLICY.md").unlink(), {"base_model": BASE}, "USE_POLICY.md"),
    "no base model": (lambda folder: None, {}, "README.md"),
    "a base model it can't be": (lambda folder: None, {"base_model": SCOUT}, SCOUT),
    "a name": (lambda folder: None, {"base_model": BASE, "name": "Tiny"}, "Tiny"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), {"base_model": BASE}, "tokenizer.json"),
    "no processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        {"base_model": BASE},
        "preprocessor_config.json",
    ),
}


def publish(artifact, source, wishes):
    package_artifact(artifact, source, wishes)
    check_ready(artifact, wishes.name or NAME)


@pytest.mark.parametrize(("spoil", "wishes", "where"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_later_is_known_from_the_source(licensed_source, tmp_path, spoil, wishes, where):
    source = Path(shutil.copytree(licensed_source, tmp_path / "Llama-4-Tiny"))
    spoil(source)
    checkpoint, recipe = open_folder(source), load_recipe("int4-rtn")
    (found,) = refused_later(checkpoint, recipe, **wishes)
    assert found.where == where
    assert found.hint
    artifact = made(source, tmp_path / "out", {})
    with pytest.raises(L4packError) as raised:
        publish(artifact, checkpoint, Wishes(**wishes))
    assert found.message in raised.value.message


def test_nothing_is_refused_of_what_can_be_pushed(licensed_source):
    assert refused_later(open_folder(licensed_source), load_recipe("int4-rtn"), base_model=BASE) == []


@pytest.mark.parametrize(
    "command", [["plan"], ["quantize", "--out", "out", "--dry-run"], ["build", "--out", "out", "--dry-run"]]
)
def test_plans_say_what_push_would_refuse(checkpoint, tmp_path, monkeypatch, l4pack, command):
    """A tiny model without any file of its licence."""
    monkeypatch.chdir(tmp_path)
    name, *options = command
    told = l4pack(name, checkpoint("scout"), "--recipe", "int4-rtn", *options)
    assert told.code == 0
    assert "push      would refuse LICENSE: LICENSE is missing, and" in told.out
    found = json.loads(l4pack(name, checkpoint("scout"), "--recipe", "int4-rtn", *options, "--json").out)
    refused = found.get("refused_later") or found["plan"]["refused_later"]
    assert {"LICENSE", "USE_POLICY.md", "README.md"} <= {one["where"] for one in refused}
    assert all(one.keys() == {"rule", "where", "message", "hint"} for one in refused)
