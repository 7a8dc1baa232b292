"""Images go into the text as the model's processor puts them, into the embeddings as transformers does, and no further
than their folder."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import whole_model
from PIL import Image
from streaming import assert_close, streamed_logits
from tiles import Tiles
from whole_model import one_thread  # noqa: F401

from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.demo import model_path
from l4pack.errors import SourceError, UsageError
from l4pack.evaluate.generate import Asking
from l4pack.evaluate.talk import converse, prompt_of
from l4pack.plan.plan import make_plan
from l4pack.recipe import load_recipe
from l4pack.stream.hidden import Packed
from l4pack.text import images as text_images
from l4pack.text.choice import TextChoice
from l4pack.text.describe import text_lines
from l4pack.text.images import ImageReader
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer

PATCH = "<|patch|>"


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """transformers' processor, but for the class that needs torchvision."""
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    monkeypatch.setattr(Llama4Processor, "check_argument_for_proper_class", lambda *_: None)
    monkeypatch.setattr(text_images, "_classes", lambda: (Tiles, Llama4Processor))


def paint(path, width=56, height=56, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def asked(*images, text="What is it?"):
    parts = [{"type": "image", "path": str(image)} for image in images]
    return {"messages": [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
        {"role": "assistant", "content": "A blue square beside a red one."},
    ]}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    """Write rows, and load them with the demo's processor."""

    def load(*found, source="demo", length=256):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, found)))
        checkpoint = open_source(str(source))
        return load_text(TextChoice(str(path), 16, length), load_tokenizer(checkpoint), 2048, ImageReader(checkpoint))

    return load


def test_tokens_and_pixels_are_those_of_the_models_own_processor(tmp_path, monkeypatch):
    monkeypatch.undo()
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip("transformers' processor needs a torchvision of the same build as torch")
    from transformers import AutoProcessor

    images = [paint(tmp_path / f"{width}.png", width, height) for width, height in ((100, 70), (50, 50), (300, 40))]
    parts = [{"type": "text", "text": "What is it?"}]
    own = [{"role": "user", "content": [*({"type": "image", "path": str(image)} for image in images), *parts]}]
    theirs = [{"role": "user", "content": [*({"type": "image", "image": Image.open(one)} for one in images), *parts]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    wanted = AutoProcessor.from_pretrained(model_path()).apply_chat_template(theirs, **options)
    demo = open_source("demo")
    found = prompt_of(load_tokenizer(demo), own, ImageReader(demo))
    assert list(found.tokens) == wanted["input_ids"][0].tolist()
    assert torch.equal(found.images.pixel_values(), wanted["pixel_values"])


def test_images_are_where_the_conversation_has_them(rows, tmp_path):
    paint(tmp_path / "small.png")
    (tmp_path / "more").mkdir()
    paint(tmp_path / "more" / "wide.png", width=112, seed=1)
    text = rows(asked("small.png", "more/wide.png"), {"text": "words alone"})
    read, alone = (load_tokenizer(open_source("demo")).decode(one.tokens) for one in text.sequences)
    one, cut = PATCH * 4, "<|tile_x_separator|>"
    small = f"<|image_start|><|image|>{one}<|image_end|>"
    wide = f"<|image_start|>{one}{cut}{one}<|tile_y_separator|><|image|>{one}<|image_end|>"
    assert f"<|header_start|>user<|header_end|>\n\n{small}{wide}What is it?<|eot|>" in read
    assert alone == "<|begin_of_text|>words alone"
    assert text.record["images"] == 2
    assert text.record["image_tokens"] == 16 + 2 * 3 + 2
    assert f"{text.record['image_tokens']} of them for 2 images" in text_lines(text.record)[0]
    seen = text.sequences[0].images
    assert (seen.tiles, seen.pixels) == (4, 56 * 112)
    assert seen.pixel_values().shape == (4, 3, 56, 56)


def test_the_streamed_model_sees_what_transformers_sees(rows, tmp_path, monkeypatch):
    """More tiles than are computed at once, and a text without any beside them."""
    monkeypatch.setattr("l4pack.stream.embed.IMAGE_TILES", 3)
    for number in range(2):
        paint(tmp_path / f"{number}.png", width=112, seed=number)
    sequence = rows(asked("0.png", "1.png")).sequences[0]
    pixels = sequence.images.pixel_values()
    wanted = whole_model.logits(whole_model.load(model_path()), [sequence.tokens], pixel_values=pixels.float())
    assert_close(streamed_logits(model_path(), [sequence.tokens], tmp_path / "work", images=pixels), wanted, 1e-4)


def test_only_text_is_scored(rows, tmp_path):
    paint(tmp_path / "a.png")
    sequence = rows(asked("a.png")).sequences[0]
    packed, known = Packed([sequence]), load_tokenizer(open_source("demo"))
    targets = known.decode(packed.targets())
    assert targets == known.decode(sequence.tokens[1:]).replace(
        "<|image_start|><|image|>" + PATCH * 4 + "<|image_end|>", ""
    )
    assert packed.scored_lengths() == [len(packed.targets())] == [len(packed.scored_rows())]
    assert [sequence.tokens[row + 1] for row in packed.scored_rows()] == packed.targets().tolist()


def test_perplexity_beside_images_is_transformers(l4pack, rows, tmp_path):
    paint(tmp_path / "a.png", width=112)
    sequence = rows(asked("a.png")).sequences[0]
    artifact = shutil.copytree(model_path(), tmp_path / "copy")
    command = (
        "evaluate",
        artifact,
        "--text",
        tmp_path / "rows.jsonl",
        "--sequence-length",
        256,
        "--compute",
        "cpu",
        "--json",
    )
    ended = l4pack(*command)
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    pixels = sequence.images.pixel_values().float()
    found = whole_model.logits(whole_model.load(model_path()), [sequence.tokens], pixel_values=pixels)[0]
    at = sequence.scored()
    true = whole_model.log_probabilities(found)[at - 1, torch.tensor(sequence.tokens)[at]]
    assert record["tokens"] == len(at)
    assert record["perplexity_artifact"] == pytest.approx(float((-true.mean()).exp()), rel=1e-4)
    assert record["text"]["images"] == 1
    planned = json.loads(l4pack(*command, "--dry-run").out)["plan"]
    assert planned["tokens"] == len(sequence.tokens)
    assert planned["predicted"]["phases"]["images"] > 0


def test_a_prompt_with_an_image_is_answered_as_by_transformers(l4pack, tmp_path):
    image = paint(tmp_path / "a.png", width=90, height=40)
    ended = l4pack("chat", "demo", "--prompt", "What is it?", "--image", image, "-n", 3, "--compute", "cpu", "--json")
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    demo = open_source("demo")
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    assert converse(demo, None, messages, Asking(3, "cpu")).answer.record()["tokens"] == record["artifact"]["tokens"]
    prompt = prompt_of(load_tokenizer(demo), messages, ImageReader(demo))
    said, model = list(prompt.tokens), whole_model.load(model_path())
    pixels = prompt.images.pixel_values().float()
    for _ in record["artifact"]["tokens"]:
        said.append(int(whole_model.logits(model, [said], pixel_values=pixels)[0][-1].argmax()))
    assert said[len(prompt.tokens) :] == record["artifact"]["tokens"]
    assert record["prompt_tokens"] == len(prompt.tokens)


def test_calibration_sees_images_and_knows_when_one_changed(rows, tmp_path):
    paint(tmp_path / "a.png")
    rows(asked("a.png"))
    recipe = load_recipe("int4").calibrating(True, samples=2, sequence_length=256)
    plan = make_plan(open_source("demo"), recipe)
    first = with_text(plan, str(tmp_path / "rows.jsonl"))
    assert first.tiles == 1
    assert first.text.record["images"] == 1
    paint(tmp_path / "a.png", seed=7)
    second = with_text(plan, str(tmp_path / "rows.jsonl"))
    assert first.text.record["tokens_sha256"] == second.text.record["tokens_sha256"]
    assert first.manifest.calibration["text_sha256"] != second.manifest.calibration["text_sha256"]
    with pytest.raises(UsageError, match="changed while it was used"):
        first.text.sequences[0].images.pixel_values()
    again = pickle.loads(pickle.dumps(second.text.sequences[0].images))
    assert torch.equal(again.pixel_values(), second.text.sequences[0].images.pixel_values())


def test_a_row_that_is_longer_than_a_sequence_is_left_whole(rows, tmp_path):
    paint(tmp_path / "a.png", width=112, height=112)
    text = rows(asked("a.png"), {"text": "words alone"}, length=40)
    assert text.record["rows"]["with_images_too_long"] == 1
    assert "1 row with images, longer than a sequence" in text_lines(text.record)[1]
    with pytest.raises(UsageError, match="1 of 1 have images and are longer than a sequence"):
        rows(asked("a.png"), length=40)


def test_images_on_the_web_and_tokens_that_pretend_to_be_images_are_left(rows, tmp_path):
    paint(tmp_path / "a.png")
    web = asked("https://example.org/a.png")
    text = rows(web, asked("a.png", text=f"What is {PATCH}?"), asked("data:image/png;base64,AAAA"), {"text": "words"})
    assert text.record["rows"]["with_images"] == 3
    assert len(text.sequences) == 1


def outside(folder):
    paint(folder.parent / "secret.png")
    return "../secret.png"


def linked(folder):
    outside(folder)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    return "link.png"


def large(folder):
    Image.new("1", (20_000, 10_000)).save(folder / "large.png")
    return "large.png"


def words(folder):
    (folder / "words.png").write_text("no image")
    return "words.png"


def cut_off(folder):
    whole = paint(folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return "cut.png"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (outside, "image '../secret.png' lies outside the rows' own folder"),
        (linked, "image 'link.png' lies outside the rows' own folder"),
        (lambda folder: str(outside(folder) and folder.parent / "secret.png"), "lies outside the rows' own folder"),
        (lambda folder: "none.png", "there is no image file"),
        (lambda folder: ".", "there is no image file"),
        (lambda folder: "a\0b.png", "image"),
        (large, "more than 89,478,485 pixels"),
        (words, "words.png: no image that is read"),
        (cut_off, "cut.png: no image that is read"),
    ],
)
def test_images_that_are_refused(l4pack, tmp_path, make, message):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps(asked(make(folder))))
    ended = l4pack("coverage", "demo", "--calibration", folder / "rows.jsonl", "--sequence-length", 256)
    assert ended.code == 2
    assert message in ended.err.splitlines()[0]
    assert f"{folder / 'rows.jsonl'}, line 1" in ended.err.splitlines()[0]
    assert ended.err.splitlines()[1].startswith("hint: ")


def test_what_a_checkpoint_needs_to_see(checkpoint, rows, tmp_path, monkeypatch):
    image = paint(tmp_path / "a.png")
    content = [{"role": "user", "content": [{"type": "image", "path": str(image)}]}]

    def ask(source):
        return converse(open_source(str(source)), None, content, Asking(1, "cpu"))

    with pytest.raises(UsageError, match="reads no images"):
        ask(checkpoint("text"))
    with pytest.raises(SourceError, match=r"has no preprocessor_config\.json"):
        ask(checkpoint("scout"))
    damaged = shutil.copytree(model_path(), tmp_path / "demo")
    (damaged / "preprocessor_config.json").write_text('{"size": {"height": 9000, "width": 9000}, "max_patches": 4}')
    with pytest.raises(SourceError, match="makes 4 tiles of 9000 x 9000, the vision tower takes 56 x 56"):
        ask(damaged)
    blind = shutil.copytree(model_path(), tmp_path / "blind")
    (blind / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    with pytest.raises(UsageError, match="the chat template has no place for its 1 images"):
        ask(blind)


def test_without_torchvision_it_is_said(monkeypatch, tmp_path, l4pack):
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    image = paint(tmp_path / "a.png")
    ended = l4pack("chat", "demo", "--prompt", "x", "--image", image)
    assert ended.code == 2
    assert "images need torchvision" in ended.err
    assert "l4pack[images]" in ended.err
