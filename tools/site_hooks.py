"""Hooks of mkdocs: pages of the site that are no page of docs/, and links that lead to them or to what is not in the site."""

from __future__ import annotations

import json
import posixpath
import re
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
OUTSIDE = {
    "README.md": "about/readme.md",
    "CHANGELOG.md": "about/changelog.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "LICENSE-NOTICE.md": "about/licence.md",
    "benchmarks/RESULTS.md": "about/results.md",
}
"""Files of the repository that are pages of the site, and what they are called there."""

NOTEBOOK, NOTEBOOK_PAGE = "notebooks/quantize-demo.ipynb", "notebooks/quantize-demo.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that live outside docs/, and the notebook as one."""
    files.append(File.generated(config, NOTEBOOK_PAGE, content=_notebook()))
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead links from the repository's paths to the site's."""
    del config, files
    return LINK.sub(partial(_led, page.file.src_uri), markdown)


def _notebook() -> str:
    """The notebook's cells as a page, and where to have it."""
    cells = json.loads((ROOT / DOCS / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    parts = [
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts, strict=True)
    ]
    title, *rest = parts
    return "\n\n".join([title, f"[The notebook]({posixpath.basename(NOTEBOOK)}), to run it.", *rest])


def _led(page: str, link: re.Match[str]) -> str:
    """A link as the site has it; one that leads to a file of the repository that is no page keeps its words alone."""
    image, words, target, anchor = link.groups(default="")
    source = next((path for path, name in OUTSIDE.items() if name == page), DOCS + page)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    where = OUTSIDE.get(path) or (path.removeprefix(DOCS) if path.startswith(DOCS) else None)
    if where is None:
        return words
    return f"{image}[{words}]({posixpath.relpath(where, posixpath.dirname(page) or '.')}{anchor})"
