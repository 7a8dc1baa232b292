"""What l4pack's own evaluation says of an artifact, to hold other runtimes' clients against."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from upstream import decompressed, reference

from l4pack.checkpoint.open import open_source
from l4pack.evaluate.desk import model_of
from l4pack.evaluate.forward import Here
from l4pack.evaluate.generate import Asking, continued
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane
from l4pack.stream.visitor import Progress
from l4pack.stream.walk import Walk
from l4pack.text.tokenizer import load_tokenizer
from l4pack.work.identity import Identity

Logs = NDArray[np.float64]


def log_probabilities(artifact: Path, tokens: list[int], work: Path) -> Logs:
    """float64 [tokens, vocabulary] of the token after each, as `evaluate` has them before it scores."""
    packed = Packed([TokenSequence(tuple(tokens))])
    with ExitStack() as stack:
        model = model_of("model", open_source(str(artifact)), Compute.of("cpu"), stack, round_activations=True)
        forward = Here([model], packed)
        work.mkdir()
        walk = Walk([Lane(model.name, model, packed)], work, Identity({"tokens": str(tokens)}), forward.visitor)
        stack.enter_context(walk).run()
        (answers,) = stack.enter_context(forward.answers(walk))
        logits = answers.normed(torch.arange(len(tokens))) @ answers.head(slice(0, answers.vocabulary)).T
    return np.asarray(logits.double().log_softmax(-1).numpy())


@torch.no_grad()
def exact_log_probabilities(source: Path, kind: str, artifact: Path, tokens: list[int]) -> Logs:
    """The same by transformers in float32, with compressed-tensors' products of codes and scales as they are."""
    model = reference(source, kind, decompressed(artifact, exact=True))
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    return np.asarray(logits.double().log_softmax(-1).numpy())


def continuation(artifact: Path, prompt: list[int], most: int) -> list[int]:
    """The likeliest tokens after a prompt, one after another, as `chat` has them."""
    asking = Asking(most=most, compute="cpu")
    found = continued(open_source(str(artifact)), [TokenSequence(tuple(prompt))], frozenset(), asking, Progress())
    return found[0]


def demo_tokens(count: int) -> list[int]:
    """The first tokens of the demo's held-out text."""
    demo = open_source("demo")
    text = (Path(__file__).parents[2] / "l4pack" / "demo" / "heldout.txt").read_text()
    ids: list[int] = load_tokenizer(demo).encode(text[: 20 * count])
    return ids[:count]


def divergence(ours: Logs, theirs: Logs) -> float:
    """Mean KL of rows of log-probabilities, in nats."""
    return float((np.exp(ours) * (ours - theirs)).sum(-1).mean())


def perplexity(logs: Logs, tokens: list[int]) -> float:
    """Of each token after the first, given those before it."""
    return float(np.exp(-logs[np.arange(len(tokens) - 1), tokens[1:]].mean()))
