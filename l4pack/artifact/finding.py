"""What a check found: the rule, where, and what is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be."""

    rule: str
    where: str
    message: str

    def record(self) -> dict[str, str]:
        """As JSON."""
        return asdict(self)
