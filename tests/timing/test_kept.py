"""The kept measurement: taken once, and again where it is damaged or another machine's."""

from __future__ import annotations

import json
import subprocess

import pytest

from l4pack.errors import L4packError
from l4pack.timing import kept
from l4pack.timing.work import Kind


@pytest.fixture
def taken(monkeypatch, tmp_path):
    """An empty cache, and the programs that were started to measure."""
    monkeypatch.setenv("L4PACK_CACHE", str(tmp_path / "cache"))
    started = []

    def run(command, **_):
        started.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({kind.value: 2.0 for kind in Kind}), "")

    monkeypatch.setattr(kept.subprocess, "run", run)
    monkeypatch.setattr(kept.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return started


def here(folder, take=True):
    return kept.here(folder, "cpu", take=take, say=lambda _: None)


def test_it_is_taken_once(taken, tmp_path):
    assert here(tmp_path, take=False) is None
    first = here(tmp_path)
    assert here(tmp_path / "not" / "there") == first == here(tmp_path, take=False)
    assert first.rates == dict.fromkeys(Kind, 2.0)
    assert "measured on" in first.basis
    assert len(taken) == 1


def test_of_a_busy_machine_nothing_is_kept(taken, tmp_path, monkeypatch):
    """It serves the plan that asked, which says so; a file of an earlier busy hour is not believed."""
    with monkeypatch.context() as patch:
        patch.setattr(kept.os, "getloadavg", lambda: (100.0, 100.0, 100.0))
        assert here(tmp_path).basis.endswith(", others running meanwhile")
    assert here(tmp_path, take=False) is None
    assert here(tmp_path) is not None
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(file.read_text().replace('"busy": false', '"busy": true'))
    assert here(tmp_path, take=False) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("2.0", "-2.0", 1),
        lambda text: text.replace("2.0", "NaN", 1),
        lambda text: text.replace('"cores"', '"kores"', 1),
        lambda text: text.replace('"product"', '"produce"', 1),
        lambda _: "[]",
        lambda _: "\0" * 200_000,
    ],
    ids=["cut short", "negative", "no number", "another machine's", "other kinds", "a list", "no text"],
)
def test_what_is_damaged_is_measured_again(taken, tmp_path, spoil):
    here(tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(spoil(file.read_text()))
    assert here(tmp_path).rates == dict.fromkeys(Kind, 2.0)
    assert len(taken) == 2
    here(tmp_path)
    assert len(taken) == 2


def test_another_number_of_threads_is_another_machine(taken, tmp_path, monkeypatch):
    here(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    here(tmp_path)
    assert len(taken) == 2


def test_a_home_that_can_not_be_written_to_keeps_nothing(taken, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert here(tmp_path) == here(tmp_path)
    assert len(taken) == 2


def test_where_libraries_are_missing_nothing_is_measured(taken, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "find_spec", lambda name: None)
    assert here(tmp_path) is None
    assert not taken


@pytest.mark.parametrize("printed", ["", "{", '{"product": "fast"}', '{"other": 1}'])
def test_a_measurement_that_fails(taken, tmp_path, monkeypatch, printed):
    monkeypatch.setattr(
        kept.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, printed, "")
    )
    with pytest.raises(L4packError, match="could not be measured"):
        here(tmp_path)


def test_a_plan_bears_it(l4pack, tmp_path, monkeypatch, taken):
    monkeypatch.setattr(kept.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", ""))
    ended = l4pack("plan", "llama-4-scout", "--recipe", "int4", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["predicted"] is None
    assert ended.err == "warning: what this machine does could not be measured\n"
