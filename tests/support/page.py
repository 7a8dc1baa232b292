"""A page as a reader of its markup sees it."""

from __future__ import annotations

from html.parser import HTMLParser

from whole_model import one_thread  # noqa: F401

VOID = {"meta"}


class Page(HTMLParser):
    """Tags and attributes, and whether every tag that was opened was closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
