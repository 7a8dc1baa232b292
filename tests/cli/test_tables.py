"""On a narrow terminal no table cuts a name or a number: every word of a wide one is whole in a narrow one."""

from __future__ import annotations

import io
import shutil

import pytest
from rich.console import Console
from rich.table import Table
from whole_model import one_thread  # noqa: F401

from l4pack.cli import console

NARROW = (60, 80)
TEXT = ("--samples", 2, "--sequence-length", 96)
SOLVED = ("--calibration-samples", 1, "--sequence-length", 48)


@pytest.fixture
def shown(l4pack, monkeypatch):
    """What a command shows on stdout, before it is as wide as anything."""

    def run(*command, codes=(0,)):
        items = []
        with monkeypatch.context() as patch:
            patch.setattr(console, "show", lambda *more: items.extend(more))
            ended = l4pack(*command)
        assert ended.code in codes, ended.err
        return items

    return run


def printed(items, width):
    stream = io.StringIO()
    terminal = Console(file=stream, width=width, highlight=False)
    for item in items:
        terminal.print(item)
    return stream.getvalue()


def tables_of(items):
    return [item for item in items if isinstance(item, Table)]


def check(items, most=1):
    tables = tables_of(items)
    assert len(tables) >= most
    heading = {word for table in tables for word in str(table.columns[0].header).split()}  # not above rows of their own
    words = set(printed(tables, 1000).split()) - heading
    for width in NARROW:
        narrow = printed(tables, width)
        assert "…" not in narrow
        assert max(map(len, narrow.splitlines())) <= width
        assert words <= set(narrow.split()), words - set(narrow.split())


def test_what_reads_headers(shown, checkpoint, artifact):
    source, made = checkpoint("maverick"), artifact("int4-rtn", "maverick")
    for command in (
        ("inspect", source), ("plan", source, "--recipe", "int4"), ("recipes",), ("formats",),
        ("verify", made, "--headers-only"), ("licence", made), ("devices",),
        ("fit", "llama-4-scout", "--max-bytes", "70GB"),
        ("budget", "llama-4-maverick", "--recipe", "int4", "--device", "8xh100"),
        ("budget", "llama-4-scout", "--matrix", "--device", "h100"),
    ):  # fmt: skip
        check(shown(*command, codes=(0, 1, 3, 7)))


def test_what_measures(shown, checkpoint, artifact, tmp_path):
    source = checkpoint("scout")
    made = [shutil.copytree(artifact(name), tmp_path / f"Llama-4-Scout-17B-16E-{name}") for name in ("int4-rtn", "fp8")]
    check(shown("evaluate", made[0], "--against", source, *TEXT), 2)
    check(shown("compare", *made, "--against", source, *TEXT), 3)
    check(shown("coverage", source, *SOLVED, codes=(0, 6)))
    check(shown("measure", source, *TEXT, "--options", "int4-g128-rtn", "--out", tmp_path / "sensitivity.json"), 2)
    check(shown("build", source, "--recipe", "int4-rtn", "--skip-evaluate", "--out", tmp_path / "out", codes=(0, 1, 7)))


def test_where_words_don_t_fit_each_row_has_lines_of_its_own():
    table = console.table("Artifact", ">Bytes", ">KL, mean")
    table.add_row("Llama-4-Scout-17B-16E-Instruct-W4A16-g128-mixed", "64.87 GB", "0.01033 ± 0.00062")
    assert [line.rstrip() for line in printed([table], 60).splitlines()] == [
        "Llama-4-Scout-17B-16E-Instruct-W4A16-g128-mixed",
        "  Bytes     64.87 GB",
        "  KL, mean  0.01033 ± 0.00062",
    ]
