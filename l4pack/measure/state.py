"""What the finished waves of a measurement have found: what a killed run need not find again."""

from __future__ import annotations

from pathlib import Path

from l4pack.datafile import Finite
from l4pack.measure.record import NonNegative
from l4pack.measure.terms import Terms
from l4pack.work.identity import Identity
from l4pack.work.state import Found, StateFile

STATE_NAME = "measured.json"  # beside the state of the wave under way


class _Measured(Found):
    errors: dict[str, NonNegative]
    kl: dict[str, list[Finite]]
    terms: dict[str, Terms]


class State:
    """Relative errors by single change, and terms where gradients are there; KL summed over clusters of tokens by any
    change."""

    def __init__(self, folder: Path, job: Identity) -> None:
        """Read what is there. Raises UsageError naming what changed when it belongs to another job."""
        self._file = StateFile(folder / STATE_NAME, job, _Measured)
        found = self._file.read() or _Measured(errors={}, kl={}, terms={})
        self.errors, self.kl, self.terms = dict(found.errors), dict(found.kl), dict(found.terms)

    def wave_done(self, errors: dict[str, float], kl: dict[str, list[float]], terms: dict[str, Terms]) -> None:
        """Note what came of a wave."""
        self.errors |= errors
        self.kl |= kl
        self.terms |= terms
        self._file.write(_Measured(errors=self.errors, kl=self.kl, terms=self.terms), [])
