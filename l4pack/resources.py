"""Where the shipped data files are: inside the wheel, or beside the package in a checkout or editable install."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("l4pack")))
_DATA = (".yaml", ".json")


def data_folder(kind: str) -> Path:
    """The folder of the data files in `recipes`, `formats` or `sensitivities`."""
    inside = _PACKAGE / kind
    return inside if any(path.suffix in _DATA for path in inside.glob("*")) else _PACKAGE.parent / kind


def data_text(*parts: str) -> str:
    """The text of a data file inside the package."""
    return _PACKAGE.joinpath(*parts).read_text(encoding="utf-8")
