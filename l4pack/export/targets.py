"""The containers there are, by name; what one needs is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4pack.errors import UsageError

if TYPE_CHECKING:
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
