"""The formats that results of checks are written in, apart from the writing: the command line lists them."""

from __future__ import annotations

from enum import StrEnum


class ReportFormat(StrEnum):
    """How `l4pack budget check` writes its results."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"
    GITHUB = "github"
    JUNIT = "junit"
