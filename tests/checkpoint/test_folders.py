"""Folders as people have them: resized vocabularies, tensors stored twice, wrappers' names, several indexes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

INDEX, SHARDS = "model.safetensors.index.json", 3
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
ROUTER = "language_model.model.layers.1.feed_forward.router.weight"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a tiny Scout in three shards, to be changed."""
    return shutil.copytree(checkpoint("scout", shards=SHARDS), tmp_path / "source")


@pytest.fixture(scope="module")
def plain(checkpoint):
    """What the same model's artifact is when nothing about its folder is odd."""
    return checkpoint("scout", shards=SHARDS)


def edit(folder, change, file="config.json"):
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def loaded(folder):
    """Tensors by shard."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def stored(folder, shards):
    """Write shards, and an index of them."""
    for file, tensors in shards.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def made(l4pack, source, name="out"):
    """Quantize without calibration and verify against the source; returns the artifact and the notes of its plan."""
    out = source.with_name(name)
    ended = l4pack("quantize", source, "-r", "int4-rtn", "-o", out, "--json")
    assert ended.code == 0, ended.err
    verified = l4pack("verify", out, "--against", source)
    assert verified.code == 0, verified.out
    return out, " ".join(json.loads(ended.out)["warnings"])


def weights(artifact):
    return {path.name: path.read_bytes() for path in artifact.glob("*.safetensors")}


def same_as_plain(l4pack, plain, artifact):
    ended = l4pack("quantize", plain, "-r", "int4-rtn", "-o", artifact.with_name("plain"))
    assert ended.code == 0, ended.err
    assert weights(artifact) == weights(artifact.with_name("plain"))


def refused(l4pack, folder, *says, commands=("inspect", "plan")):
    for command in commands:
        options = ("-r", "int4-rtn", "-o", folder.with_name("out")) if command == "quantize" else ()
        ended = l4pack(command, folder, *options)
        assert ended.code == 4, ended
        error, hint = ended.err.splitlines()[-2:]
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        for text in says:
            assert text in ended.err


def resize(folder, rows, head_rows=None):
    shards = loaded(folder)
    for tensors in shards.values():
        for name, count in ((EMBEDDING, rows), (HEAD, head_rows or rows)):
            if name in tensors:
                more = tensors[name][:1].expand(max(0, count - len(tensors[name])), -1)
                tensors[name] = torch.cat([tensors[name], more])[:count]
    stored(folder, shards)


@pytest.mark.parametrize("said", [384, 391, 400], ids=["smaller", "agrees", "larger"])
def test_a_resized_vocabulary_is_the_tensors(folder, l4pack, said):
    resize(folder, 391)
    edit(folder, lambda c: c["text_config"].update(vocab_size=said))
    out, notes = made(l4pack, folder)
    assert json.loads((out / "config.json").read_text())["text_config"]["vocab_size"] == 391
    assert ("the embedding has 391 rows" in notes) == (said != 391)
    if said == 384:
        model, told = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
        assert not told["mismatched_keys"]
        assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 391


def test_a_vocabulary_that_is_also_stated_outside_is_put_right_in_both_places(folder, l4pack):
    resize(folder, 391)
    edit(folder, lambda c: c.update(vocab_size=384))
    out, _ = made(l4pack, folder)
    written = json.loads((out / "config.json").read_text())
    assert written["vocab_size"] == written["text_config"]["vocab_size"] == 391


def test_embedding_and_head_of_different_sizes_are_refused(folder, l4pack):
    resize(folder, 391, 384)
    refused(l4pack, folder, "391 rows", "384 rows", "resize_token_embeddings")


def test_a_text_model_with_a_resized_vocabulary(checkpoint, tmp_path, l4pack):
    source = shutil.copytree(checkpoint("text"), tmp_path / "source")
    edit(source, lambda c: c.update(vocab_size=380))
    out, _ = made(l4pack, source)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 384
    assert AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight.shape[0] == 384


def test_a_tied_model_with_a_resized_vocabulary(folder, l4pack):
    resize(folder, 391)
    shards = loaded(folder)
    stored(folder, {file: {n: t for n, t in tensors.items() if n != HEAD} for file, tensors in shards.items()})
    edit(folder, lambda c: c["text_config"].update(tie_word_embeddings=True))
    out, _ = made(l4pack, folder)
    assert json.loads((out / "config.json").read_text())["text_config"]["vocab_size"] == 391


def twice(folder, name, other):
    """Store a tensor once more, in a shard it isn't in; the index places it in the first. Returns the shard."""
    shards = loaded(folder)
    home = next(file for file, tensors in shards.items() if name in tensors)
    away = next(file for file in shards if file != home)
    shards[away][other] = shards[home][name].clone()
    stored(folder, shards)
    if name == other:
        edit(folder, lambda index: index["weight_map"].update({name: home}), INDEX)
    return away


@pytest.mark.parametrize("other", [ROUTER, ROUTER.removeprefix("language_model."), f"module.{ROUTER}"])
def test_a_tensor_stored_twice_is_taken_once(folder, plain, l4pack, other):
    twice(folder, ROUTER, other)
    assert "stored twice" in l4pack("inspect", folder).out.replace("\n", " ")
    out, notes = made(l4pack, folder)
    assert f"1 tensor is stored twice ({ROUTER} in" in notes
    same_as_plain(l4pack, plain, out)


@pytest.mark.parametrize("other", [ROUTER, f"module.{ROUTER}"])
def test_a_tensor_stored_twice_with_other_numbers_is_refused(folder, l4pack, other):
    away = twice(folder, ROUTER, other)
    tensors = load_file(folder / away)
    tensors[other][-1, -1] += 1
    save_file(tensors, folder / away, {"format": "pt"})
    refused(l4pack, folder, "hold different numbers", away, commands=("quantize",))
    assert not folder.with_name("out").exists()


def test_a_tensor_stored_twice_in_other_shapes_is_refused(folder, l4pack):
    away = twice(folder, ROUTER, f"module.{ROUTER}")
    tensors = load_file(folder / away)
    tensors[f"module.{ROUTER}"] = tensors[f"module.{ROUTER}"][:-1].clone()
    save_file(tensors, folder / away, {"format": "pt"})
    refused(l4pack, folder, "stored twice, and differ")


def test_a_whole_model_under_two_prefixes(folder, plain, l4pack):
    shards = loaded(folder)
    shards["more.safetensors"] = {
        f"module.{name}": tensor.clone() for tensors in shards.values() for name, tensor in tensors.items()
    }
    stored(folder, shards)
    out, _ = made(l4pack, folder)
    same_as_plain(l4pack, plain, out)


def test_names_of_compiled_layers(folder, plain, l4pack):
    shards = loaded(folder)
    stored(
        folder,
        {
            file: {
                name.replace(".layers.0.", ".layers.0._orig_mod.")
                .replace(".experts.", "._orig_mod.experts.")
                .replace(".self_attn.", "._fsdp_wrapped_module.self_attn."): tensor
                for name, tensor in tensors.items()
            }
            for file, tensors in shards.items()
        },
    )
    assert "named as released" in l4pack("inspect", folder).out.replace("\n", " ")
    out, notes = made(l4pack, folder)
    assert "torch's wrappers" in notes
    same_as_plain(l4pack, plain, out)


def test_the_layout_is_named(checkpoint, l4pack):
    layout = json.loads(l4pack("inspect", checkpoint("scout", layout="unfused"), "--json").out)["layout"]
    assert layout.startswith("safetensors, experts one by one")


def test_another_index_beside_the_models_stays_behind(folder, plain, l4pack):
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for kind in ("consolidated", "model.fp16"):
        for file in shards:
            shutil.copy(folder / file, folder / file.replace("model", kind))
        other = {name: file.replace("model", kind) for name, file in weight_map.items()}
        (folder / f"{kind}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": other}))
    out, _ = made(l4pack, folder)
    same_as_plain(l4pack, plain, out)
    assert not list(out.glob("*fp16*"))
    assert not list(out.glob("consolidated*"))


def test_only_a_variants_index(folder, l4pack):
    (folder / INDEX).rename(folder / "model.fp16.safetensors.index.json")
    refused(l4pack, folder, "model.fp16.safetensors.index.json", "rename")


def test_an_index_whose_shards_are_gone(folder, l4pack):
    for path in sorted(folder.glob("*.safetensors")):
        path.rename(folder / path.name.replace("of-0000", "of-1000"))
    refused(l4pack, folder, "not of the shards that are here")


def spell_old(config):
    """As transformers before version 5 wrote it."""
    for section in (config, config["text_config"], config["vision_config"]):
        if "dtype" in section:
            section["torch_dtype"] = section.pop("dtype")
        rope = section.pop("rope_parameters", None)
        if rope:
            section["rope_theta"] = rope.pop("rope_theta")
            section["rope_scaling"] = rope if rope["rope_type"] != "default" else None


def test_old_spellings_in_the_configuration(folder, plain, l4pack):
    edit(folder, spell_old)
    out, _ = made(l4pack, folder)
    same_as_plain(l4pack, plain, out)
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.text_config.rope_parameters["factor"] == 16.0
    assert model.dtype == torch.bfloat16
