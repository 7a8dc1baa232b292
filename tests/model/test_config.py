"""config.json read without transformers: the same defaults, the same lists, and every spelling."""

from __future__ import annotations

import json

import pytest
from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig

from l4pack.errors import SourceError
from l4pack.model.config import KNOWN_MODELS, TextConfig, VisionConfig, known_config, load_config, parse_config

LISTED = ("moe_layers_listed", "no_rope_layers_listed")


@pytest.mark.parametrize(
    ("ours", "theirs"), [(TextConfig(), Llama4TextConfig()), (VisionConfig(), Llama4VisionConfig())]
)
def test_defaults_are_those_of_transformers(ours, theirs):
    fields = [name for name in type(ours).model_fields if name not in LISTED]
    assert {name: getattr(ours, name) for name in fields} == {name: getattr(theirs, name) for name in fields}


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"num_hidden_layers": 5},
        {"num_hidden_layers": 7, "interleave_moe_layer_step": 2},
        {"num_hidden_layers": 6, "moe_layers": [1, 4]},
        {"num_hidden_layers": 6, "moe_layers": []},
        {"num_hidden_layers": 6, "moe_layers": None},
        {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0]},
        {"num_hidden_layers": 4, "no_rope_layers": []},
        {"num_hidden_layers": 6, "no_rope_layers": None, "no_rope_layer_interval": 3},
        {"attention_chunk_size": None},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_layers_are_those_of_transformers(text):
    ours = parse_config({"model_type": "llama4", "text_config": text}).text
    theirs = Llama4TextConfig(**text)
    assert ours.moe_layers == set(theirs.moe_layers)
    assert ours.rope_layers == {i for i, kind in enumerate(theirs.layer_types) if kind == "chunked_attention"}
    assert ours.attention_chunk_size == theirs.attention_chunk_size
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def test_absent_sections_are_filled_in_as_transformers_does():
    ours, theirs = parse_config({"model_type": "llama4"}), Llama4Config()
    assert ours.text.hidden_size == theirs.text_config.hidden_size
    assert ours.vision is not None
    assert ours.vision.hidden_size == theirs.vision_config.hidden_size


def test_tied_embeddings_are_the_text_models_choice():
    text = parse_config({"model_type": "llama4", "tie_word_embeddings": True, "text_config": {}}).text
    assert not text.tie_word_embeddings
    assert parse_config({"model_type": "llama4_text", "tie_word_embeddings": True}).text.tie_word_embeddings


OLD = {"model_type": "llama4", "torch_dtype": "bfloat16",
       "text_config": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_theta": 5e5}}  # fmt: skip
NEW = {"model_type": "llama4", "dtype": "bfloat16",
       "text_config": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}}  # fmt: skip


@pytest.mark.parametrize("raw", [OLD, NEW, {**OLD, "torch_dtype": "torch.bfloat16"},
                                 {"model_type": "llama4", "text_config": {"dtype": "bfloat16"}}])  # fmt: skip
def test_old_and_new_spellings(raw):
    config = parse_config(raw)
    assert config.dtype == "bfloat16"
    assert config.text == TextConfig()
    assert config.raw == raw


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_shipped_configurations_are_read_the_same_by_transformers(name):
    config = known_config(name)
    theirs = Llama4Config(**config.raw)
    assert config.text.moe_layers == set(theirs.text_config.moe_layers)
    assert config.text.rope_layers == {i for i, flag in enumerate(theirs.text_config.no_rope_layers) if flag}
    assert config.vision is not None
    assert config.vision.hidden_size == theirs.vision_config.hidden_size == 1408
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', not a Llama 4"),
        ({}, "model_type is None"),
        ({"model_type": ["llama4"]}, "not a Llama 4"),
        ({"model_type": "llama4", "text_config": [1]}, "text_config is not an object"),
        ({"model_type": "llama4", "vision_config": "none"}, "vision_config is not an object"),
        ({"model_type": "llama4", "text_config": {"hidden_size": 0}}, r"text_config\.hidden_size"),
        ({"model_type": "llama4", "text_config": {"hidden_size": "many"}}, r"text_config\.hidden_size"),
        ({"model_type": "llama4", "text_config": {"num_hidden_layers": 10**9}}, r"text_config\.num_hidden_layers"),
        ({"model_type": "llama4_text", "num_local_experts": 0}, r"config\.json\.num_local_experts"),
        ({"model_type": "llama4", "text_config": {"moe_layers": [48]}}, r"outside 0\.\.47"),
        ({"model_type": "llama4", "text_config": {"num_key_value_heads": 7}}, "no multiple"),
        (
            {"model_type": "llama4", "text_config": {"num_hidden_layers": 1024, "num_local_experts": 4096}},
            "1024 layers of 4096 experts",
        ),
    ],
)
def test_wrong_values_are_named(raw, message):
    with pytest.raises(SourceError, match=message):
        parse_config(raw)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3"])
def test_files_that_are_no_configuration(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"not JSON|not an object"):
        load_config(path)


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(SourceError, match="larger than any"):
        load_config(path)


def test_a_quantized_configuration_says_so():
    stanza = {"quant_method": "compressed-tensors"}
    assert parse_config({"model_type": "llama4", "quantization_config": stanza}).quantized
    assert parse_config({"model_type": "llama4", "compression_config": stanza}).quantized
    assert not parse_config(json.loads(json.dumps({"model_type": "llama4", "quantization_config": None}))).quantized
