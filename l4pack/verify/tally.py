"""How much a verification looked at, and what each of its pieces found."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from l4pack.verify.findings import Findings

SAMPLE_SEED = 0  # of the choice of matrices that are compared with a source


@dataclass
class Tally:
    """What has been looked at."""

    tensors: int = 0
    bytes: int = 0
    matrices: int = 0
    digests: int = 0
    kept_compared: int = 0
    kept_rounded: int = 0  # numbers of a float32 source that are not the same in 16 bits
    matrices_compared: int = 0
    weights_compared: int = 0
    within_half_step: int = 0
    recomputed: int = 0
    largest_error_ratio: float = 0.0

    def add(self, other: Tally) -> None:
        """Add another tally."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            setattr(self, item.name, max(mine, theirs) if item.name == "largest_error_ratio" else mine + theirs)


@dataclass
class UnitResult:
    """What one unit of work found."""

    found: Findings = field(default_factory=Findings)
    tally: Tally = field(default_factory=Tally)
    fingerprints: dict[str, bytes] = field(default_factory=dict)  # module -> digest
    sources: dict[str, bytes] = field(default_factory=dict)  # module -> digest of the source's weights
