"""What a model says: a few tokens, the likeliest each time, from weights streamed anew for every one of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l4pack.checkpoint.companions import GENERATION
from l4pack.checkpoint.source import Checkpoint
from l4pack.datafile import small_object
from l4pack.errors import UsageError
from l4pack.evaluate.answers import StreamAnswers
from l4pack.evaluate.same_model import check_same_model
from l4pack.evaluate.scoring import score
from l4pack.plan.memory import computing_on, walk_within
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.modules import Skeleton
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights, stored_itemsize
from l4pack.text.layouts import Chat
from l4pack.text.tokenizer import Template, load_tokenizer
from l4pack.work import machine
from l4pack.work.identity import Identity
from l4pack.work.signals import check_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asking:
    """How a model is asked: most tokens of an answer, where it is computed, and the memory it may take."""

    most: int = 32
    compute: str = "auto"
    max_ram: int | None = None
    max_vram: int | None = None


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
        pairs = zip(self.answer.tokens, self.original.tokens, strict=False)
        lengths = (len(self.answer.tokens), len(self.original.tokens))
        return next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), min(lengths))

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
    messages: Sequence[dict[str, str]],
    asking: Asking,
    progress: Progress | None = None,
) -> Conversation:
    """Let both models answer messages of `role` and `content`, through the model's chat template where it has one.

    Raises UsageError (messages beyond the model's context, a template that refuses them), SourceError, BudgetError,
    StoppedError.
    """
    started, progress = time.monotonic(), progress or Progress()
    if original is not None:
        check_same_model(artifact, original)
    tokenizer = load_tokenizer(original if original is not None and original.store is not None else artifact)
    prompt = _prompt(tokenizer, messages)
    longest = artifact.config.text.max_position_embeddings
    if len(prompt) + asking.most > longest:
        raise UsageError(
            f"{len(prompt):,} tokens and {asking.most:,} more are beyond the model's {longest:,}",
            hint="say less, or ask for fewer tokens",
        )
    ends = _ends(artifact, tokenizer)
    answers = []
    for checkpoint in (artifact, original):
        if checkpoint is not None:
            tokens = continued(checkpoint, prompt, ends, asking, progress)
            said = tuple(token for token in tokens if token not in ends)
            text = tokenizer.decode(said, skip_special_tokens=True)
            answers.append(Answer(checkpoint.name, said, text, len(said) < len(tokens)))
    return Conversation(len(prompt), answers[0], answers[1] if original else None, time.monotonic() - started)


def continued(
    checkpoint: Checkpoint, prompt: Sequence[int], ends: frozenset[int], asking: Asking, progress: Progress
) -> list[int]:
    """The likeliest tokens after `prompt`, one by one, with the one of `ends` that ends them if one comes.

    For every token the whole sequence walks through the model anew: each expert that one of its tokens takes is read.
    """
    compute = Compute.of(asking.compute)
    found: list[int] = []
    whole = [TokenSequence((*prompt, *[0] * asking.most))]
    computing = computing_on(compute, checkpoint.config.text, whole)
    computing = replace(computing, tiles=compute.tiles, stored=stored_itemsize(checkpoint))
    ram, device = machine.memory(asking.max_ram), compute.device_room(asking.max_vram)
    _, ahead = walk_within(computing, lambda one: one.memory(scored=True), ram, device)
    with (
        tempfile.TemporaryDirectory(prefix="l4pack-chat-") as folder,
        Weights(checkpoint, compute.device, compute.dtype, tiled=compute.tiles > 0) as weights,
    ):
        model = Model(checkpoint.name, weights, Skeleton(checkpoint.config, compute.device, compute.dtype))
        for number in range(asking.most):
            check_stop(progress.stop)
            progress.label(f"{checkpoint.name}, token {number + 1} of {asking.most}")
            work = Path(folder) / str(number)
            found.append(_next_token(model, (*prompt, *found), work, progress, ahead=ahead))
            if found[-1] in ends:
                break
    return found


def _next_token(model: Model, tokens: tuple[int, ...], work: Path, progress: Progress, *, ahead: bool) -> int:
    packed = Packed([TokenSequence(tokens)])
    told = Progress(progress.advance, stop=progress.stop)
    with Walk([Lane(model.name, model, packed)], work, Identity({"kind": "chat"}), progress=told, ahead=ahead) as walk:
        walk.run()
        answers = StreamAnswers(model, walk.streams[model.name].current)
        last, target = torch.tensor([len(tokens) - 1]), torch.tensor([0])
        return int(score(answers, last, target).likeliest[0])


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the answer begins; without a template, of the last message as it is."""
    template = Template(tokenizer)
    if not template.there:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    text = template.render(Chat([dict(message) for message in messages]), "the conversation", reply=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ends(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of generation_config.json, and the tokenizer's own."""
    there = checkpoint.store is not None and GENERATION in checkpoint.companions
    named = small_object(checkpoint.store.path(GENERATION)).get("eos_token_id") if checkpoint.store and there else None
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int))
