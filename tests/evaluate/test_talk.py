"""A model says what transformers' own greedy generation says, and two models are compared token by token."""

from __future__ import annotations

import json

import pytest
import torch
from streaming import token_rows
from whole_model import load, logits

from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.evaluate.generate import Asking, continued
from l4pack.evaluate.talk import Answer, Conversation, converse
from l4pack.stream.hidden import TokenSequence
from l4pack.stream.visitor import Progress
from l4pack.timing.jobs import Talk, layer_weights

ASKED = [{"role": "user", "content": "Why is the sky blue?"}]


def test_it_says_what_transformers_says():
    from transformers import AutoTokenizer, Llama4ForConditionalGeneration

    demo = open_source("demo")
    folder = demo.store.path("config.json").parent
    found = converse(demo, None, ASKED, Asking(most=5, compute="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    said = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found.prompt_tokens == inputs["input_ids"].shape[1]
    assert list(found.answer.tokens) == said.tolist()
    assert found.answer.text == tokenizer.decode(said, skip_special_tokens=True)


def test_an_artifact_beside_its_original(l4pack, tmp_path):
    out = tmp_path / "demo-int4"
    assert l4pack("quantize", "demo", "--recipe", "int4-rtn", "--out", out).code == 0
    ended = l4pack("chat", out, "--against", "demo", "--prompt", ASKED[0]["content"], "-n", 3, "--json")
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    ours, theirs = record["artifact"]["tokens"], record["original"]["tokens"]
    parted = next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    assert record["first_difference"] == parted
    assert record["artifact"]["name"].endswith("demo-int4")
    assert record["seconds"] > 0


@pytest.mark.parametrize(
    ("ours", "theirs", "at"), [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1,), (1, 2), 1), ((), (4,), 0)]
)
def test_the_first_difference_is_counted_in_tokens(ours, theirs, at):
    answers = [Answer("x", tokens, "", False) for tokens in (ours, theirs)]
    assert Conversation(3, *answers, 1.0).first_difference == at


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--prompt", " "), "nothing is said to the model"), (("--prompt", "x", "-n", 4096), "are beyond the model's")],
)
def test_what_cannot_be_answered(l4pack, arguments, message):
    ended = l4pack("chat", "demo", *arguments)
    assert ended.code == 2
    assert message in ended.err.splitlines()[0]
    assert ended.err.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_tokens_after_kept_keys_and_values_are_those_of_whole_sequences(checkpoint, kind):
    """Several prompts at once, shorter and longer than a chunk of attention (32), and over the edge of one."""
    source = checkpoint(kind)
    prompts = [tuple(ids) for ids in token_rows(lengths=(30, 5, 80, 64))]
    model, wanted = load(source), [list(ids) for ids in prompts]
    for _ in range(4):
        wanted = [[*ids, int(rows[-1].argmax())] for ids, rows in zip(wanted, logits(model, wanted), strict=True)]
    asking = Asking(most=4, compute="cpu")
    found = continued(open_folder(source), [TokenSequence(ids) for ids in prompts], frozenset(), asking, Progress())
    assert found == [ids[-4:] for ids in wanted]


def test_a_prompt_that_ends_stands_still_while_others_go_on(checkpoint):
    source = open_folder(checkpoint("scout"))
    prompts = [TokenSequence(tuple(ids)) for ids in token_rows(lengths=(20, 9))]
    asking = Asking(most=3, compute="cpu")
    walked: list[int] = []
    free = continued(source, prompts, frozenset(), asking, Progress(walked.append))
    talk = Talk(len(prompts), 1, asking.most)
    assert sum(walked) == talk.walked_bytes([layer_weights(source)])
    ended = continued(source, prompts, frozenset({free[0][0]}), asking, Progress())
    assert ended[0] == free[0][:1]
    assert ended[1] == free[1] or free[0][0] in ended[1]
