"""Opening checkpoints on disk: folders, Hub cache folders, bare configurations; layouts found from names and checked."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from models import unfuse, write_weights
from safetensors.torch import load_file

from l4pack.artifact.manifest import source_record
from l4pack.checkpoint.companions import is_companion
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder, parse_index
from l4pack.errors import SourceError
from l4pack.model.config import KNOWN_MODELS

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a tiny Scout in three shards, to be changed."""
    return shutil.copytree(checkpoint("scout", shards=3), tmp_path / "source")


def rewrite(folder, change):
    """Load the weights of a single-file checkpoint, change them, and save them again."""
    state = load_file(folder / "model.safetensors")
    state = change(state) or state
    write_weights(folder, state)


@pytest.mark.parametrize("kind", ["scout", "maverick", "text"])
@pytest.mark.parametrize("layout", ["fused", "unfused"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_is_found(checkpoint, kind, layout, shards):
    opened = open_source(str(checkpoint(kind, layout=layout, shards=shards)))
    assert opened.layout.fused is (layout == "fused")
    assert set(opened.layout.by_name) == set(opened.entries)
    assert len(opened.shards) == shards
    assert opened.weight_bytes == 2 * opened.layout.parameters
    assert not opened.bare
    assert set(opened.float_names.values()) == {"BF16"}


NESTED = [("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"),
          ("vision_model.", "model.vision_model."), ("multi_modal_projector.", "model.multi_modal_projector.")]  # fmt: skip


def nested(state):
    renamed = {}
    for name, tensor in state.items():
        old, new = next(pair for pair in NESTED if name.startswith(pair[0]))
        renamed[new + name.removeprefix(old)] = tensor
    return renamed


@pytest.mark.parametrize("change", [nested, lambda state: nested(unfuse(state))], ids=["fused", "unfused"])
def test_other_prefixes_are_found_in_the_names(checkpoint, tmp_path, change):
    folder = shutil.copytree(checkpoint("maverick"), tmp_path / "nested")
    rewrite(folder, change)
    naming = open_source(str(folder)).layout.naming
    assert (naming.text, naming.head, naming.vision, naming.projector) == (
        "model.language_model.", "lm_head", "model.vision_model.", "model.multi_modal_projector.",
    )  # fmt: skip


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


NORM = "language_model.model.norm.weight"
DOWN = "language_model.model.layers.1.feed_forward.experts.down_proj"
WRONG = {
    "transposed experts": (
        lambda s: s.update({DOWN: torch.zeros(4, 128, 64, dtype=torch.bfloat16)}),
        rf"{DOWN} has shape \[4, 128, 64\], config\.json makes it \[4, 128, 128\]",
    ),
    "long norm": (
        lambda s: s.update({NORM: torch.ones(129, dtype=torch.bfloat16)}),
        rf"{NORM} has shape \[129\], config\.json makes it \[128\]",
    ),
    "integers": (lambda s: s.update({NORM: torch.ones(128, dtype=torch.int16)}), "is I16; l4pack reads BF16, F16, F32"),
    "doubles": (lambda s: s.update({NORM: torch.ones(128, dtype=torch.float64)}), "is F64; l4pack reads"),
    "one missing": (lambda s: without(s, NORM), f"1 tensors that config.json implies are missing, the first is {NORM}"),
    "one too many": (lambda s: s.update({"extra.weight": torch.ones(1)}), "1 tensors are not part of Llama 4, the first"),
    "no embedding": (
        lambda s: without(s, "language_model.model.embed_tokens.weight"),
        "no token embedding",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_weights_that_disagree_with_the_configuration(checkpoint, tmp_path, change, message):
    folder = shutil.copytree(checkpoint("scout"), tmp_path / "wrong")
    rewrite(folder, change)
    with pytest.raises(SourceError, match=message):
        _ = open_folder(folder).layout


def test_weights_of_another_architecture(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("scout"), tmp_path / "wrong")
    shutil.copy(checkpoint("maverick") / "config.json", folder)
    with pytest.raises(SourceError, match=r"config\.json"):
        _ = open_folder(folder).layout


def test_a_hub_cache_folder_is_read_through_its_links(folder, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--meta-llama--Llama-4-Tiny"
    (cached / "blobs").mkdir(parents=True)
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(cached / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    opened = open_source(str(snapshot))
    assert "tokenizer.json" in opened.companions
    record = source_record(opened)
    assert (record["repository"], record["revision"]) == ("meta-llama/Llama-4-Tiny", commit)
    assert record["name"] == "Llama-4-Tiny"


def test_no_companion_comes_from_outside(folder, tmp_path):
    (tmp_path / "secret").write_text("key")
    (folder / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="NOTICE is a link that leaves"):
        open_folder(folder)


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "added_tokens.json").symlink_to("tokenizer_config.json")
    assert open_folder(folder).companions["added_tokens.json"] == (folder / "tokenizer_config.json").stat().st_size


def test_companions_are_what_runtimes_and_readers_need(folder):
    (folder / "LICENSE").write_text("licence")
    (folder / "README.md").write_text("card")
    (folder / ".gitattributes").write_text("")
    (folder / "consolidated.00.pth").write_text("weights")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    assert set(open_folder(folder).companions) == {
        "LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", INDEX, "README.md", ".cache", "model.gguf", "a.safetensors"])
def test_what_is_no_companion(name):
    assert not is_companion(name)


def test_the_fingerprint_changes_with_any_file(folder):
    first = open_folder(folder).fingerprint()
    assert open_folder(folder).fingerprint() == first
    for name in ("config.json", "tokenizer.json", "model-00002-of-00003.safetensors"):
        before = open_folder(folder).fingerprint()
        path = folder / name
        if name == "config.json":
            path.write_text(json.dumps({**json.loads(path.read_text()), "note": 1}))
        else:
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert open_folder(folder).fingerprint() != before


def test_where_a_source_lies_does_not_reach_the_manifest(folder, monkeypatch):
    before = source_record(open_source(str(folder)))
    monkeypatch.chdir(folder)
    assert source_record(open_source(".")) == before
    assert before["name"] == folder.name


@pytest.mark.parametrize("name", [*KNOWN_MODELS, "Llama-4-Scout"])
def test_known_models_need_no_files(name):
    opened = open_source(name)
    assert opened.bare
    assert opened.layout.parameters > 10**11


def test_a_bare_configuration(folder):
    opened = open_source(str(folder / "config.json"))
    assert opened.bare
    assert opened.layout.parameters == open_folder(folder).layout.parameters


BAD_INDEXES = [
    (b"", "no readable weight_map"),
    (b"{}", "no readable weight_map"),
    (b"[]", "no readable weight_map"),
    (b"[" * 100_000, "no readable weight_map"),
    (b'{"weight_map": []}', "no readable weight_map"),
    (b'{"weight_map": {}}', "names no tensor"),
    (b'{"weight_map": {"a": 5}}', "which is not a shard of this folder"),
    (b'{"weight_map": {"a": null}}', "which is not a shard of this folder"),
]
OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", ".hidden.safetensors", "a\\b.safetensors",
           "x.safetensors\n", "x.bin", "", "x.safetensors\x00", "~.safetensors", "-x.safetensors"]  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), BAD_INDEXES)
def test_indexes_that_are_none(raw, message):
    with pytest.raises(SourceError, match=message):
        parse_index(raw)


@pytest.mark.parametrize("file", OUTSIDE)
def test_no_index_leads_outside(file):
    with pytest.raises(SourceError, match="not a shard of this folder"):
        parse_index(json.dumps({"weight_map": {"a": file}}).encode())


def test_the_index_must_agree_with_the_headers(folder):
    index = json.loads((folder / INDEX).read_text())
    original = dict(index["weight_map"])
    name = next(iter(original))
    for weight_map, message in (
        ({**original, name: "model-00003-of-00003.safetensors"}, f"places {name} in .*, which does not hold it"),
        ({**original, "other": original[name]}, "places other in .*, which does not hold it"),
        ({key: file for key, file in original.items() if key != name}, f"holds {name}, which .* does not name"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(SourceError, match=message):
            open_folder(folder)


def test_a_tensor_in_two_shards(folder):
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    with pytest.raises(SourceError, match=r"places .* in model-00002-of-00003\.safetensors, which does not hold it"):
        open_folder(folder)


@pytest.mark.parametrize("text", ["no-such-folder", "a/b/c", "http://example.org/x", "", "x" * 300])
def test_what_is_no_source(text):
    with pytest.raises((SourceError, OSError)):
        open_source(text)
