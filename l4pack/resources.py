"""Where the shipped data files are: inside the wheel, or beside the package in a checkout or editable install."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("l4pack")))


def data_folder(kind: str) -> Path:
    """The folder of `recipes`, `formats` or `sensitivities`."""
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def data_text(*parts: str) -> str:
    """The text of a data file inside the package."""
    return _PACKAGE.joinpath(*parts).read_text(encoding="utf-8")
