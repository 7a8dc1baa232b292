"""The files beside the weights: what goes with an artifact, what is left behind, and what is missed when it is not there."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from l4pack.checkpoint.companions import belongs, check_pattern, is_companion, is_licence
from l4pack.checkpoint.open import open_source
from l4pack.errors import SourceError, UsageError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
PRIVATE = [
    "id_rsa", "id_ed25519.pub", "run.sh", "env", ".env", "prod.env", "nohup.out", "trainer_state.json", "optimizer.pt",
    "events.out.tfevents.1700000000.host.1.0", "hf_quant_config.json", "adapter_config.json", "training_args.bin", "core",
    "notes.txt", "wandb-metadata.json", "LICENSE_KEY.txt", "license.key", "license-server.txt", "modeling_llama4.py",
    "License-id_rsa", "license-private", "NOTICE.internal.md", "l4pack-secrets.json", "accuracy-notes.json",
    "tokenizer.json.bak", "tokenizer.py", "secrets.json", "config.json.orig", "adapter_model.safetensors", "chat.jsonl",
]  # fmt: skip
PUBLIC = [
    "LICENSE", "LICENSE.txt", "LICENCE.md", "license", "LICENSE-2.0", "LLAMA4_LICENSE.txt", "NOTICE", "Notice.txt",
    "USE_POLICY.md", "ACCEPTABLE_USE_POLICY.md", "COPYING", "added_tokens.json", "special_tokens_map.json",
    "tokenizer.model", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json",
]  # fmt: skip
OTHER_TEMPLATE = "additional_chat_templates/tool_use.jinja"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a tiny Scout, to be changed."""
    return shutil.copytree(checkpoint("scout", shards=3), tmp_path / "source")


@pytest.fixture
def lived_in(folder):
    """The same with what lies about in folders that people train in."""
    for name in (*PRIVATE, *PUBLIC):
        (folder / name).write_text("{}" if name.endswith(".json") else "x")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / OTHER_TEMPLATE).write_text("{{ messages }}")
    (folder / "additional_chat_templates" / "id_rsa").write_text("x")
    (folder / "docs").mkdir()
    (folder / "docs" / "card.md").write_text("words")
    return folder


ORDINARY = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_only_what_a_runtime_or_a_reader_needs_goes_along(lived_in, l4pack, tmp_path):
    plan = json.loads(l4pack("plan", lived_in, "--recipe", "int4-rtn", "--json").out)
    left = set(plan["left_behind"])
    assert left == {*PRIVATE, "docs/", "original/", "additional_chat_templates/id_rsa"}
    out = tmp_path / "out"
    assert l4pack("quantize", lived_in, "--recipe", "int4-rtn", "--out", out).code == 0
    written = {str(path.relative_to(out)): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    assert written == plan["files"]
    assert set(written) == {
        *PUBLIC, *ORDINARY, OTHER_TEMPLATE, "config.json", "model.safetensors", "l4pack-manifest.json"
    }  # fmt: skip
    assert all(belongs(name) for name in written)
    assert json.loads(l4pack("inspect", lived_in, "--json").out)["left_behind"] == plan["left_behind"]


def test_the_same_command_finds_what_it_made_and_goes_on(lived_in, l4pack, tmp_path):
    command = ("quantize", lived_in, "-r", "int4-rtn", "-o", tmp_path / "out", "--include", "docs/*.md", "--json")
    assert not json.loads(l4pack(*command).out)["already_done"]
    assert json.loads(l4pack(*command).out)["already_done"]
    assert (tmp_path / "out" / "docs" / "card.md").read_text() == "words"


@pytest.mark.parametrize("name", PRIVATE)
def test_what_is_no_companion(name):
    assert not is_companion(name)
    assert not belongs(name)
    assert belongs(name, {name})


@pytest.mark.parametrize("name", [*PUBLIC, *sorted(ORDINARY), OTHER_TEMPLATE])
def test_what_is_a_companion(name):
    assert is_companion(name)


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/../x.jinja", "additional_chat_templates/.x.jinja", "a/LICENSE"]
)
def test_folders_hold_templates_alone(name):
    assert not is_companion(name)


def test_licences_by_their_names():
    assert is_licence("Llama-4-LICENSE.txt")
    assert not is_licence("tokenizer.json")


def test_more_goes_along_when_it_is_asked_for(lived_in, l4pack):
    includes = ("--include", "notes.txt", "--include", "docs/*", "--include", "*.jsonl")
    asked = json.loads(l4pack("plan", lived_in, "--recipe", "int4-rtn", "--json", *includes).out)
    plain = json.loads(l4pack("plan", lived_in, "--recipe", "int4-rtn", "--json").out)
    added = {"notes.txt": 1, "docs/card.md": 5, "chat.jsonl": 1}
    assert asked["files"].items() >= added.items()
    assert set(plain["left_behind"]) - set(asked["left_behind"]) == {"notes.txt", "docs/", "chat.jsonl"}


@pytest.mark.parametrize(
    "pattern",
    ["../id_rsa", "/etc/passwd", "~/x", ".env", "docs/.env", "a\\b", "", "docs//card.md", "./notes.txt", "nothing*.txt",
     "config.json", "model-00001-of-00003.safetensors", "adapter_model.safetensors", "adapter_config.json", "*.safetensors",
     "hf_quant_config.json", "l4pack-manifest.json", "optimizer.pt", "README.md", "notes.txt\n", "docs"],
)  # fmt: skip
def test_what_can_not_be_asked_for(lived_in, l4pack, pattern):
    ended = l4pack("plan", lived_in, "--recipe", "int4-rtn", "--include", pattern)
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 2
    with pytest.raises(UsageError):
        open_source(str(lived_in), include=[pattern])


def test_everything_is_not_everything(lived_in):
    """A wildcard takes what may go; hidden files, weights and what misleads runtimes stay."""
    opened = open_source(str(lived_in), include=["*"])
    assert {"id_rsa", "notes.txt"} <= set(opened.included)
    assert {".env", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= set(opened.left_behind)


def test_what_is_asked_for_can_not_be_a_link_out_or_without_a_name(folder, tmp_path):
    (tmp_path / "secret").write_text("key")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="link that leaves"):
        open_source(str(folder), include=["notes.txt"])
    assert "notes.txt" in open_source(str(folder)).left_behind
    (folder / os.fsdecode(b"x-\xff.md")).write_text("x")
    with pytest.raises(SourceError, match="is no name for a published file"):
        open_source(str(folder), include=["x-*"])
    check_pattern("x-*")


@pytest.mark.parametrize("file", ["LICENSE", "tokenizer.json"])
def test_a_link_to_what_stays_behind_is_no_way_out(folder, file):
    (folder / ".env").write_text("TOKEN=x")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(".env")
    with pytest.raises(SourceError, match=r"a link to \.env, which is not to be published"):
        open_source(str(folder))


def test_a_link_to_what_goes_along_is_one_more_name(folder):
    (folder / "LICENSE.txt").write_text("words")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    assert open_source(str(folder)).companions["LICENSE"] == 5


def test_a_configuration_has_nothing_to_include(l4pack):
    assert l4pack("plan", "llama-4-scout", "--include", "LICENSE").code == 2


@pytest.mark.parametrize("command", ["inspect", "plan", "quantize"])
@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "config.json", "LICENSE", "model.safetensors.index.json",
             "model-00002-of-00003.safetensors"],
)  # fmt: skip
def test_git_lfs_pointers_are_named(folder, l4pack, tmp_path, command, file):
    (folder / file).write_bytes(POINTER)
    ended = l4pack(command, folder, *(["--out", tmp_path / "out"] if command == "quantize" else []))
    assert (ended.code, ended.out) == (4, "")
    assert f"{file} is a Git LFS pointer" in ended.err
    assert "git lfs pull" in ended.err


def test_a_pointer_that_stays_behind_is_nobodys_trouble(folder):
    (folder / "merges.csv").write_bytes(POINTER)
    assert "merges.csv" in open_source(str(folder)).left_behind


def test_a_companion_that_is_a_dangling_link(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../blobs/gone")
    with pytest.raises(SourceError, match="is a link to nothing"):
        open_source(str(folder))


MISSING = {
    "tokenizer.json": "can't calibrate or evaluate",
    "tokenizer_config.json": "no special tokens",
    "preprocessor_config.json": "can't take images",
    "generation_config.json": "attn_temperature_tuning",
    "chat_template.jinja": "no chat template",
}


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_what_is_missing_and_what_that_breaks(checkpoint, tmp_path, l4pack, command):
    folder = shutil.copytree(checkpoint("scout"), tmp_path / "source")
    found = {one["file"]: one["breaks"] for one in json.loads(l4pack(command, folder, "--json").out)["missing"]}
    assert set(found) == {"preprocessor_config.json"}
    for name in ORDINARY:
        (folder / name).unlink()
    ended = l4pack(command, folder, "--json")
    assert ended.code == 0
    found = {one["file"]: one["breaks"] for one in json.loads(ended.out)["missing"]}
    assert set(found) == set(MISSING)
    assert all(MISSING[name] in found[name] for name in MISSING)
    shown = l4pack(command, folder).out
    assert all(f"missing   {name}" in shown for name in MISSING)


def test_nothing_is_missing_of_a_text_model_or_a_configuration(checkpoint, l4pack):
    assert json.loads(l4pack("inspect", checkpoint("text"), "--json").out)["missing"] == []
    assert json.loads(l4pack("plan", "llama-4-scout", "--json").out)["missing"] == []


@pytest.mark.parametrize(
    ("file", "content"),
    [("chat_template.jinja", "x"), ("chat_template.json", '{"chat_template": "x"}'), (OTHER_TEMPLATE, "x"),
     ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": "x"}]}')],
)  # fmt: skip
def test_a_template_counts_wherever_it_lies(folder, file, content):
    from l4pack.checkpoint.templates import has_template

    (folder / "tokenizer_config.json").write_text("{}")
    assert not has_template(open_source(str(folder)))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    assert has_template(open_source(str(folder)))
