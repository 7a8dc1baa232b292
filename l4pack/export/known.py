"""Containers that an artifact can be exported to, by name."""

from __future__ import annotations

from l4pack.errors import UsageError
from l4pack.export.target import Target

CONTAINERS = ("gguf", "mlx")


def target_named(name: str) -> Target:
    """The container of that name. Raises UsageError."""
    if name == "gguf":
        from l4pack.export.gguf import Gguf

        return Gguf()
    if name == "mlx":
        from l4pack.export.mlx import Mlx

        return Mlx()
    raise UsageError(f"no container is called '{name}'", hint="--to gguf or --to mlx")


def containers_named(text: str | None) -> tuple[str, ...]:
    """The containers of a list such as `gguf,mlx`, each once. Raises UsageError for another name, or none."""
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    wrong = next((name for name in names if name not in CONTAINERS), "" if text is not None and not names else None)
    if wrong is not None:
        raise UsageError(f"no container is called '{wrong}'", hint="--export gguf, --export mlx or --export gguf,mlx")
    return names
