"""Folders that somebody is writing to."""

from __future__ import annotations

import shutil
from pathlib import Path


def copied(folder: Path, target: Path) -> None:
    """Copy a folder as a kill would leave it now; what another thread is about to put in place may be gone meanwhile."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.tmp"))
