"""The documentation as a site: it builds without a warning, every link in it leads somewhere, and reading it fetches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("material", reason="the extra 'docs' builds the site")

ROOT = Path(__file__).parents[1]
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """A page's ids, its links, and what a browser fetches for it."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key == "id":
                self.ids.add(value)
            if (tag, key) == ("a", "href"):
                self.links.append(value)
            if (tag, key) in FETCHED:
                self.fetched.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_of_the_docs_is_in_the_site(site):
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs")
        assert (site / place.with_name("index.html" if place.name == "README.md" else f"{place.stem}.html")).exists()


def test_every_link_leads_to_a_page_and_a_place_on_it(site, pages):
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute: nobody knows where it is shown
            continue
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if not re.match(r"[a-z]+:", target):
                there = (path.parent / target).resolve() if target else path
                there = there / "index.html" if there.is_dir() else there
                assert there.exists(), f"{path.relative_to(site)}: {link}"
                assert not anchor or anchor in pages[there].ids, f"{path.relative_to(site)}: {link}"


def test_nothing_is_fetched_from_elsewhere_when_a_page_is_read(site, pages):
    assert not [(path.name, url) for path, page in pages.items() for url in page.fetched if "//" in url]
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_search_index_lies_beside_the_pages(site):
    assert "Hessian" in (site / "search" / "search_index.js").read_text(encoding="utf-8")
