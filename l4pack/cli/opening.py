"""Opening the original that an artifact is held against, with the adapters that were merged into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l4pack.errors import UsageError

if TYPE_CHECKING:
    from l4pack.checkpoint.source import Checkpoint


def opened_original(against: str | None, companions: str | None, lora: Sequence[str] | None) -> Checkpoint | None:
    """What `--against` names, with `--lora` merged; None without it. Raises SourceError, HubError, UsageError."""
    from l4pack.artifact.as_source import open_original

    if against is None and lora:
        raise UsageError("--lora is merged into the original, and none is named", hint="add --against SOURCE")
    return None if against is None else open_original(against, companions=companions, requantize=True, lora=lora or ())
