"""A state is believed only as far as it is whole, this job's, and its data is as it was."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from pydantic import Field

from l4pack.errors import UsageError
from l4pack.work.files import read_own
from l4pack.work.identity import Identity
from l4pack.work.seal import Span, seal, unbroken
from l4pack.work.state import Found, StateFile

JOB = Identity({"--seed": 0, "source: model.safetensors": "12:34"})
SPANS = [Span("a.hidden", 0, 3000), Span("b.hidden", 1000, 2000)]


class Counted(Found):
    """What the jobs of these tests find."""

    layers: int = Field(ge=1)
    records: list[dict[str, float]] = Field(default=[])


@pytest.fixture
def kept(tmp_path: Path) -> StateFile[Counted]:
    """A state that vouches for two spans."""
    for name in ("a.hidden", "b.hidden"):
        (tmp_path / name).write_bytes(os.urandom(3000))
    state = StateFile(tmp_path / "state.json", JOB, Counted)
    state.write(Counted(layers=2, records=[{"error": 0.25}]), seal(tmp_path, SPANS))
    return state


def again(kept: StateFile[Counted], job: Identity = JOB) -> StateFile[Counted]:
    return StateFile(kept.path, job, Counted)


def test_what_was_written_is_read(kept):
    state = again(kept)
    assert state.read() == Counted(layers=2, records=[{"error": 0.25}])
    assert state.unbroken(SPANS)
    assert state.unbroken(SPANS[1:])
    assert not state.unbroken([*SPANS, Span("a.hidden", 0, 2999)])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[1500] ^= 4
    path.write_bytes(raw)


DAMAGES = {
    "removed": Path.unlink,
    "halved": lambda path: os.truncate(path, 1500),
    "zeroed": lambda path: path.write_bytes(bytes(3000)),
    "flipped": _flip,
    "a link": lambda path: (path.rename(path.with_name("c")), path.symlink_to("c")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("file", ["a.hidden", "b.hidden"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_data_that_is_not_as_it_was(kept, file, damage):
    damage(kept.path.with_name(file))
    state = again(kept)
    assert state.read() is not None
    assert not state.unbroken(SPANS)


def test_swapped_files(kept):
    a, b, c = (kept.path.with_name(name) for name in ("a.hidden", "b.hidden", "c"))
    a.rename(c), b.rename(a), c.rename(b)
    assert not again(kept).unbroken(SPANS)


def test_bytes_that_nobody_vouches_for_may_change(kept):
    path = kept.path.with_name("b.hidden")
    raw = path.read_bytes()
    path.write_bytes(bytes(1000) + raw[1000:] + b"more")
    state = again(kept)
    state.read()
    assert state.unbroken(SPANS)


def _edited(change) -> object:
    """The state changed by someone who also mends its digest."""

    def edit(path: Path) -> None:
        from l4pack.work.state import _digest

        value = json.loads(path.read_bytes())["state"]
        change(value)
        path.write_text(json.dumps({"sha256": _digest(value), "state": value}))

    return edit


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "not JSON": lambda path: path.write_text("no"),
    "a list": lambda path: path.write_text("[1]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "long number": lambda path: path.write_text(f'{{"sha256": {"9" * 10_000}}}'),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "of today's predecessor": lambda path: path.write_text('{"job": "x", "layers": 1, "records": [{}]}'),
    "a figure changed": lambda path: path.write_text(path.read_text().replace("0.25", "0.26")),
    "another version": _edited(lambda value: value.update(schema_version=3)),
    "wrong type": _edited(lambda value: value["found"].update(layers="2")),
    "out of range": _edited(lambda value: value["found"].update(layers=0)),
    "unknown key": _edited(lambda value: value["found"].update(more=1)),
    "no seals": _edited(lambda value: value.pop("seals")),
    "a seal's place": _edited(lambda value: value["seals"][0].update(start=-1)),
    "a link": lambda path: (path.rename(path.with_name("c")), path.symlink_to("c")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_state_that_is_not_whole_says_nothing(kept, damage):
    damage(kept.path)
    state = again(kept)
    assert state.read() is None
    assert not state.unbroken(SPANS)


def test_another_job_is_refused_with_what_changed_and_the_earlier_command(kept, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/l4pack", "evaluate", "a folder", "--seed", "0"])
    kept.write(Counted(layers=1), [])
    with pytest.raises(UsageError) as refused:
        again(kept, Identity({"--seed": 1, "source: model.safetensors": "12:35"})).read()
    assert refused.value.message == (
        f"{kept.path.parent} was begun as another job: --seed was 0 and is 1; "
        "source: model.safetensors was 12:34 and is 12:35"
    )
    assert "l4pack evaluate 'a folder' --seed 0" in refused.value.hint
    assert "--restart" in refused.value.hint


def test_many_changes_are_counted_and_no_command_is_made_up(kept):
    with pytest.raises(UsageError) as refused:
        again(kept, Identity({f"part {number}": number for number in range(20)})).read()
    assert refused.value.message.endswith("; and 19 more")
    assert refused.value.hint == "repeat the earlier command; or add --restart to begin again"


def test_a_removed_state_vouches_for_nothing(kept):
    kept.remove()
    assert not kept.unbroken(SPANS)
    assert again(kept).read() is None
    kept.remove()


def test_only_whole_spans_are_sealed(kept):
    with pytest.raises(OSError, match="ends early"):
        seal(kept.path.parent, [Span("a.hidden", 0, 3001)])
    assert unbroken(kept.path.parent, [], [])


def test_only_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "x").write_bytes(b"1234")
    assert read_own(tmp_path / "x", 4) == b"1234"
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_own(tmp_path / "x", 3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not the job's"):
        read_own(tmp_path / "pipe", 4)
