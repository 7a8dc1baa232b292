"""`l4pack chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from l4pack.cli import console
from l4pack.cli.opening import opened_original
from l4pack.cli.options import (
    AgainstOption,
    AsJsonOption,
    CompanionsOption,
    ComputeOption,
    ImageOption,
    LoraOption,
    MaxRamOption,
    MaxVramOption,
    PromptOption,
    SourceOption,
    TokensOption,
)
from l4pack.cli.said import both
from l4pack.errors import UsageError
from l4pack.units import given_size, human_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from l4pack.evaluate.talk import Conversation


def chat(
    source: SourceOption,
    against: AgainstOption = None,
    companions: CompanionsOption = None,
    lora: LoraOption = None,
    prompt: PromptOption = None,
    image: ImageOption = None,
    tokens: TokensOption = 32,
    compute: ComputeOption = "auto",
    max_ram: MaxRamOption = None,
    max_vram: MaxVramOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Let a model say a few words, the likeliest each time, streamed as everything here: whether it talks at all.

    With `--against`, the original answers the same beside it, in colour from where the two part. The first token reads the
    whole model, every other what it is routed to, so this shows that an artifact works; a server is for talking.

    `--lora` is merged into the original: what --against names, else the source.

    With `--image`, the first prompt is about an image, which goes through the model's own processor and its vision tower.

    Example: `l4pack chat demo --prompt "Why is the sky blue?" -n 16`
    """
    from l4pack.checkpoint.open import open_source
    from l4pack.evaluate.generate import Asking
    from l4pack.evaluate.talk import converse
    from l4pack.stream.visitor import Progress
    from l4pack.work.signals import stop_signals

    limits = [given_size(limit) for limit in (max_ram, max_vram)]
    asking = Asking(tokens, compute, *limits)
    original = opened_original(against, companions, lora) if against else None
    artifact = open_source(source, companions=None if against else companions, lora=() if against else lora or ())
    total = tokens * sum(one.weight_bytes for one in (artifact, original) if one is not None)
    messages: list[dict[str, Any]] = []
    for said in _said(prompt):
        messages.append({"role": "user", "content": said if messages else _with_images(said, image or [])})
        with console.progress("answering", total) as bar, stop_signals() as stop:
            found = converse(artifact, original, messages, asking, Progress.of(bar.shown, stop))
        messages.append({"role": "assistant", "content": found.answer.text})
        if as_json:
            console.show_json({"prompt": said, **found.record()})
        else:
            console.show(*_view(found))


def _with_images(said: str, images: list[Path]) -> str | list[dict[str, str]]:
    """What is said first, after the images it is about."""
    parts = [{"type": "image", "path": str(path)} for path in images]
    return [*parts, {"type": "text", "text": said}] if parts else said


def _said(prompt: str | None) -> Iterator[str]:
    """The prompt that was given; else what is typed, line by line, or all that a pipe brings."""
    if prompt is not None or not sys.stdin.isatty():
        text = sys.stdin.read() if prompt is None else prompt
        if not text.strip():
            raise UsageError("nothing is said to the model", hint="give --prompt TEXT")
        yield text
        return
    console.talk("[dim]say something; an empty line ends it[/dim]")
    while line := input("> ").strip():
        yield line


def _view(found: Conversation) -> list[RenderableType]:
    """Both answers, from the first difference on in colour."""
    at, answers = found.first_difference, (found.answer, found.original)
    texts = [None if one is None else one.text + ("" if one.ended else " …") for one in answers]
    shown = both(texts[0] or "", texts[1])
    if found.original is not None:
        count = min(len(found.answer.tokens), len(found.original.tokens))
        same = f"the same {count} tokens" if at is None else f"the same for {at} tokens, then they part"
        shown.append(Text(same, "green" if at is None else "yellow"))
    return [*shown, Text(human_seconds(found.seconds), "dim")]
