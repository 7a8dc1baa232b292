"""What models say, as commands show it: the artifact's words beside the original's, and what having them say it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

from l4pack.units import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from l4pack.timing.jobs import Talk

_PARTED = "yellow"


def sample_talk(tokens: int) -> Talk:
    """What a sample of so many tokens an answer is, for a plan."""
    from l4pack.evaluate.sample import PROMPT_TOKENS, PROMPTS
    from l4pack.timing.jobs import Talk

    return Talk(len(PROMPTS), PROMPT_TOKENS, tokens)


def sample_line(planned: Mapping[str, Any] | None) -> list[RenderableType]:
    """A line of a plan; nothing where no sample is taken."""
    if planned is None:
        return []
    asked = f"{planned['tokens']} tokens of an answer to each of {planned['prompts']} prompts"
    return [f"sample    {asked} by every model: reads at most {human_bytes(planned['read_bytes'])} (--sample-tokens)"]


def sample_view(record: Mapping[str, Any]) -> list[RenderableType]:
    """The sample of an evaluation's record, for people; nothing where it has none."""
    from l4pack.evaluate.sample import turns

    lines: list[RenderableType] = []
    for turn in turns(record):
        lines.append(Text.assemble("\n", (_shown(turn.prompt), "bold")))
        original = None if turn.original is None else turn.same + turn.original
        lines += both(turn.same + turn.artifact, original)
    return lines


def both(artifact: str, original: str | None) -> list[RenderableType]:
    """What the artifact says and what the original does, in colour from where they part."""
    from l4pack.evaluate.sample import parting

    if original is None:
        return [Text(_shown(artifact))]
    same = parting(artifact, original)
    return [
        Text.assemble((f"{who}  ", "dim"), _shown(text[:same]), (_shown(text[same:]), _PARTED))
        for who, text in (("artifact", artifact), ("original", original))
    ]


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
