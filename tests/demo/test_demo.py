"""The shipped demo model is what its card says: loadable, trained, routed unevenly to every expert, and small."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import AutoTokenizer, Llama4ForConditionalGeneration, PreTrainedTokenizerFast

from l4pack.demo import calibration_path, heldout_path, model_path

MODEL_LIMIT, TEXT_LIMIT = 16_000_000, 1_000_000
WINDOW, BATCH = 512, 8
TOLERANCE = 0.001


@pytest.fixture(scope="module")
def model() -> Llama4ForConditionalGeneration:
    loaded, report = Llama4ForConditionalGeneration.from_pretrained(
        model_path(), dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path())


def test_the_folder_fits_its_size_budget() -> None:
    assert sum(file.stat().st_size for file in model_path().iterdir()) <= MODEL_LIMIT
    assert heldout_path().stat().st_size + calibration_path().stat().st_size <= TEXT_LIMIT


def test_experts_are_fused_and_the_index_lists_every_tensor_of_at_least_three_shards() -> None:
    index = json.loads((model_path() / "model.safetensors.index.json").read_bytes())
    found, size = {}, 0
    for file in sorted(model_path().glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                tensor = shard.get_tensor(name)
                assert tensor.dtype == torch.bfloat16, name
                found[name], size = file.name, size + tensor.nbytes
    assert found == index["weight_map"]
    assert size == index["metadata"]["total_size"]
    assert len(set(found.values())) >= 3
    assert "language_model.model.layers.0.feed_forward.experts.gate_up_proj" in found


def test_every_text_matrix_divides_into_groups_of_128() -> None:
    config = json.loads((model_path() / "config.json").read_bytes())["text_config"]
    attention = config["num_attention_heads"] * config["head_dim"]
    sizes = [config[key] for key in ("hidden_size", "intermediate_size", "intermediate_size_mlp")]
    assert all(size % 128 == 0 for size in [*sizes, attention])


def test_held_out_text_reproduces_the_stated_bits_per_byte_and_reaches_every_expert(
    model: Llama4ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    counts, hooks = zip(
        *[_counted(layer.feed_forward.router) for layer in model.language_model.model.layers], strict=True
    )
    found = _bits_per_byte(model, tokenizer, heldout_path().read_text(encoding="utf-8"))
    for hook in hooks:
        hook.remove()
    assert found == pytest.approx(_stated_bits_per_byte(), abs=TOLERANCE)
    assert all(count.min() > 0 for count in counts)
    assert all(count.max() > 1.2 * count.min() for count in counts), "routing should be uneven"


def _counted(router: torch.nn.Module) -> tuple[torch.Tensor, RemovableHandle]:
    """A running count of the tokens that `router` sends to each expert; the other experts' scores are zero."""
    count = torch.zeros(router.num_experts)

    def add(_router, _inputs, outputs) -> None:
        count.add_((outputs[0] > 0).sum(0))

    return count, router.register_forward_hook(add)


def _stated_bits_per_byte() -> float:
    card = (model_path() / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^\| bits per byte \| ([\d.]+)", card, flags=re.M)
    assert match
    return float(match[1])


@torch.no_grad()
def _bits_per_byte(model: Llama4ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    row = torch.tensor(tokenizer(text)["input_ids"])
    whole = (len(row) - 1) // WINDOW * WINDOW
    inputs, targets = row[:whole].view(-1, WINDOW), row[1 : whole + 1].view(-1, WINDOW)
    pairs = [
        *zip(inputs.split(BATCH), targets.split(BATCH), strict=True),
        (row[None, whole:-1], row[None, whole + 1 :]),
    ]
    return sum(_nats(model, *pair) for pair in pairs) / math.log(2) / len(text.encode())


def _nats(model: Llama4ForConditionalGeneration, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()


def test_an_image_changes_what_follows_it(
    model: Llama4ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = model.config
    side = config.vision_config.image_size
    patches = int((side // config.vision_config.patch_size) ** 2 * config.vision_config.pixel_shuffle_ratio**2)
    prompt = "<|image_start|><|image|>" + "<|patch|>" * patches + "<|image_end|>What is this?"
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert (tokens == config.image_token_index).sum() == patches
    images = torch.rand(2, 1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        first, second = (model(input_ids=tokens, pixel_values=image).logits for image in images)
    assert first.isfinite().all()
    assert not torch.equal(first[:, -1], second[:, -1])
    assert torch.equal(first[:, 0], second[:, 0])


def test_the_chat_template_uses_header_and_turn_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "What does os.walk do?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nWhat does os.walk do?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    assert "<|image|>Why?<|eot|>" in tokenizer.apply_chat_template(parts, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text[len("<|begin_of_text|>") :])["input_ids"] == ids


def test_the_vocabulary_has_every_token_the_processor_asks_for(tokenizer: PreTrainedTokenizerFast) -> None:
    """Llama4Processor itself needs torchvision; what it reads from the folder does not."""
    config = json.loads((model_path() / "config.json").read_bytes())
    image = json.loads((model_path() / "preprocessor_config.json").read_bytes())
    names = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in [*names, "<|patch|>"]}
    assert len(set(ids.values())) == len(ids)
    assert all(token < config["text_config"]["vocab_size"] for token in ids.values())
    assert ids["<|patch|>"] == config["image_token_index"]
    assert (ids["<|image_start|>"], ids["<|image_end|>"]) == (config["boi_token_index"], config["eoi_token_index"])
    assert image["size"] == {"height": config["vision_config"]["image_size"], "width": 56}


def test_held_out_and_calibration_text_share_no_long_paragraph() -> None:
    heldout, calibration = (_long_paragraphs(path) for path in (heldout_path(), calibration_path()))
    assert len(heldout) > 100
    assert not heldout & calibration


def _long_paragraphs(path: Path) -> set[str]:
    paragraphs = (" ".join(part.split()) for part in path.read_text(encoding="utf-8").split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= 80}


def test_the_model_is_licensed_as_the_projects_own_work() -> None:
    card = (model_path() / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "not a Llama model" in card
    assert (model_path() / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
