"""`l4pack-export.json`: the record that lies beside an export's files."""

from __future__ import annotations

from pathlib import Path

RECORD_NAME = "l4pack-export.json"
RECORD_VERSION = 1


def export_folder(path: Path) -> Path | None:
    """The folder of an export, from its own name or that of a file in it; None where it is none."""
    folder = path.parent if path.is_file() else path
    return folder if (folder / RECORD_NAME).is_file() else None
