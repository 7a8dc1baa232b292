"""What models say: a few tokens after a conversation, the likeliest each time, of an artifact and of its original."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack.checkpoint.companions import GENERATION
from l4pack.checkpoint.source import Checkpoint
from l4pack.datafile import small_object
from l4pack.errors import UsageError
from l4pack.evaluate.generate import Asking, continued
from l4pack.evaluate.same_model import check_same_model
from l4pack.evaluate.sample import PROMPTS, on_a_line, parting
from l4pack.stream.hidden import TokenSequence
from l4pack.stream.visitor import Progress
from l4pack.text.images import ImageReader
from l4pack.text.layouts import IMAGE, Chat
from l4pack.text.tokenizer import Template, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What one model said: token ids without the end's, and whether it came to its end by itself."""

    name: str
    tokens: tuple[int, ...]
    text: str
    ended: bool

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "text": self.text, "tokens": list(self.tokens), "ended": self.ended}


@dataclass(frozen=True)
class Conversation:
    """Both models' answers to the same messages; `first_difference` counts tokens from 0, None where there is none."""

    prompt_tokens: int
    answer: Answer
    original: Answer | None
    seconds: float

    @property
    def first_difference(self) -> int | None:
        """The first token that the two chose otherwise."""
        if self.original is None or self.answer.tokens == self.original.tokens:
            return None
        return parting(self.answer.tokens, self.original.tokens)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "artifact": self.answer.record(),
            "original": self.original.record() if self.original else None,
            "first_difference": self.first_difference,
            "seconds": self.seconds,
        }


def converse(
    artifact: Checkpoint,
    original: Checkpoint | None,
    messages: Messages,
    asking: Asking,
    progress: Progress | None = None,
) -> Conversation:
    """Let both models answer messages of `role` and `content`, through the model's chat template where it has one.

    Content is a text, or a list of parts as the template has them, those of an image with its `path`. Raises UsageError
    (messages beyond the model's context, a template that refuses them, an image that can't be read), SourceError,
    BudgetError, StoppedError.
    """
    if original is not None:
        original = original.completed(artifact.config)
        check_same_model(artifact, original)
    first = _first(artifact, original)
    tokenizer = load_tokenizer(first)
    prompt = prompt_of(tokenizer, messages, ImageReader(first))
    longest = artifact.config.text.max_position_embeddings
    if len(prompt.tokens) + asking.most > longest:
        raise UsageError(
            f"{len(prompt.tokens):,} tokens and {asking.most:,} more are beyond the model's {longest:,}",
            hint="say less, or ask for fewer tokens",
        )
    return answers(artifact, original, [prompt], tokenizer, asking, progress)[0]


def answers(
    artifact: Checkpoint,
    original: Checkpoint | None,
    prompts: Sequence[TokenSequence],
    tokenizer: PreTrainedTokenizerBase,
    asking: Asking,
    progress: Progress | None = None,
) -> list[Conversation]:
    """What both models say after each of the prompts; the weights of each are read once a token for all of them."""
    started, ends = time.monotonic(), _ends(artifact, tokenizer)
    said: list[list[Answer]] = []
    for checkpoint in (one for one in (artifact, original) if one is not None):
        found = continued(checkpoint, prompts, ends, asking, progress or Progress())
        said.append([_answer(checkpoint, tokens, ends, tokenizer) for tokens in found])
    seconds = time.monotonic() - started
    return [
        Conversation(len(prompt.tokens), both[0], both[1] if len(both) > 1 else None, seconds)
        for prompt, both in zip(prompts, zip(*said, strict=True), strict=True)
    ]


def sample(
    artifact: Checkpoint, original: Checkpoint | None, asking: Asking, progress: Progress | None = None
) -> dict[str, Any] | None:
    """What both say after each of `PROMPTS`, as `accuracy.json` holds it; None where a prompt fills the model's context.

    A template that refuses a prompt is left out. Raises SourceError, BudgetError, StoppedError.
    """
    tokenizer = load_tokenizer(_first(artifact, original))
    prompts = [_sample_prompt(tokenizer, text) for text in PROMPTS]
    longest = max(len(prompt.tokens) for prompt in prompts)
    most = min(asking.most, artifact.config.text.max_position_embeddings - longest)
    if most < 1:
        return None
    found = answers(artifact, original, prompts, tokenizer, replace(asking, most=most), progress)
    return {
        "tokens": most,
        "seconds": found[0].seconds,
        "answers": [_sample_answer(text, one) for text, one in zip(PROMPTS, found, strict=True)],
    }


def _sample_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenSequence:
    try:
        return prompt_of(tokenizer, [{"role": "user", "content": text}])
    except UsageError:
        return TokenSequence(tuple(tokenizer(text)["input_ids"]))


def _sample_answer(prompt: str, found: Conversation) -> dict[str, Any]:
    record = {"prompt": prompt, **found.record()}
    for model in (record["artifact"], record["original"]):
        if model is not None:
            model["text"] = on_a_line(model["text"])
            del model["name"]
    del record["seconds"]
    return record


def _answer(
    checkpoint: Checkpoint, tokens: Sequence[int], ends: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> Answer:
    said = tuple(token for token in tokens if token not in ends)
    return Answer(checkpoint.name, said, tokenizer.decode(said, skip_special_tokens=True), len(said) < len(tokens))


def _first(artifact: Checkpoint, original: Checkpoint | None) -> Checkpoint:
    """Whose tokenizer and processor both are asked with."""
    return original if original is not None and original.store is not None else artifact


def prompt_of(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, reader: ImageReader | None = None
) -> TokenSequence:
    """A conversation up to where the answer begins; without a template, the last message as it is.

    Raises UsageError where the template refuses it, and what reading an image raises.
    """
    template, chat = Template(tokenizer), Chat([dict(message) for message in messages])
    if template.there:
        text = template.render(chat, "the conversation", reply=True)
    else:
        chat = Chat(chat.messages[-1:])
        text = "".join([*[IMAGE] * len(chat.images), *chat.texts])
    if chat.images and reader is not None:
        seen = reader.see(text, [Path(path) for path in chat.images], "the conversation")
        return TokenSequence(seen.tokens, images=seen.pictures)
    return TokenSequence(tuple(tokenizer(text, add_special_tokens=not template.there)["input_ids"]))


def _ends(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of generation_config.json, and the tokenizer's own."""
    there = checkpoint.store is not None and GENERATION in checkpoint.companions
    named = small_object(checkpoint.store.path(GENERATION)).get("eos_token_id") if checkpoint.store and there else None
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int))
