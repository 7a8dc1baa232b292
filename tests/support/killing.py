"""Calibrated runs that die at a chosen moment, and a text for them."""

from __future__ import annotations

import pytest

from l4pack.checkpoint.journal import Journal

TEXT = " ".join(f"{number * 7919 % 1000:03} is followed by {number * 104729 % 997}" for number in range(300))


class Killed(BaseException):
    """Stands for a kill: nothing in the job expects it."""


def killed_after(monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    """Die at the journal's next record after `records` of them."""
    write, seen = Journal.record, []

    def dying(self, *arguments, **options):
        seen.append(None)
        if len(seen) > records:
            raise Killed
        write(self, *arguments, **options)

    monkeypatch.setattr(Journal, "record", dying)
