"""Every error l4pack raises on purpose, each with a hint and the exit code it ends a command with.

L4packError              1   a check found something, or a job failed
  UsageError             2   the command, recipe or format can't be understood
    RecipeError          2   a recipe or format file is wrong (names the key)
  BudgetError            3   it does not fit the memory or disk given
  SourceError            4   the source checkpoint is damaged, incomplete or not Llama 4
  HubError               5   network or Hub
  ClusterError           5   a cluster of workers can't be reached, or fell apart
  QualityError           6   a quality gate was missed
  LicenceError           7   licence or naming rule broken
  StoppedError          75   stopped safely; the same command goes on
"""

from __future__ import annotations


class L4packError(Exception):
    """Base of all errors shown to people: one line that says what and where, and a hint that says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(L4packError):
    """The command line, or a file the user wrote, can't be understood."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or format file is wrong; the message names the file and the key."""


class BudgetError(L4packError):
    """What was asked does not fit the memory or disk given."""

    exit_code = 3


class SourceError(L4packError):
    """The source checkpoint is damaged, incomplete, or not a Llama 4 checkpoint."""

    exit_code = 4


class HubError(L4packError):
    """The network or the Hub failed."""

    exit_code = 5


class ClusterError(L4packError):
    """A cluster of workers can't be reached, or too little of it is left."""

    exit_code = 5


class QualityError(L4packError):
    """A quality gate was missed."""

    exit_code = 6


class LicenceError(L4packError):
    """A licence duty or a naming rule is not met."""

    exit_code = 7


class StoppedError(L4packError):
    """The job stopped at a safe place; running the same command again goes on from there."""

    exit_code = 75
