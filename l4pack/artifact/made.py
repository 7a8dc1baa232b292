"""How long an artifact took to make: kept beside it by `build`, for nothing in an artifact depends on the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4pack.artifact.contents import recorded_digest
from l4pack.datafile import small_object

KEY = "made"


def build_state(out: Path) -> Path:
    """Where `build` keeps what is done of the chain that makes `out`."""
    return out.with_name(f"{out.name}.build.json")


def made_record(out: Path, seconds: float) -> dict[str, Any]:
    """That quantizing the artifact that lies in `out` now took so many seconds."""
    return {KEY: {"contents": recorded_digest(out), "seconds": seconds}}


def made_seconds(out: Path) -> float | None:
    """The seconds that quantizing this artifact took; None where no `build` made it in one go."""
    match small_object(build_state(out)).get(KEY):
        case {"contents": str(contents), "seconds": float(seconds)} if contents == recorded_digest(out):
            return seconds
    return None
