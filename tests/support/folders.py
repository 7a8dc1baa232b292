"""Folders of files for a test."""

from __future__ import annotations

from pathlib import Path

Files = dict[str, bytes]


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
