"""Containers that an artifact can be exported to, by name."""

from __future__ import annotations

from l4pack.errors import UsageError
from l4pack.export.target import Target


def target_named(name: str) -> Target:
    """The container of that name. Raises UsageError."""
    if name == "gguf":
        from l4pack.export.gguf import Gguf

        return Gguf()
    if name == "mlx":
        from l4pack.export.mlx import Mlx

        return Mlx()
    raise UsageError(f"no container is called '{name}'", hint="--to gguf or --to mlx")
