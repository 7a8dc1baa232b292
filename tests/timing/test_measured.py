"""Measuring a machine: every kind of work has a rate, and jobs say what was predicted beside what they took."""

from __future__ import annotations

import itertools
import json

from l4pack.timing import kernels
from l4pack.timing.work import Kind

LOADED = {Kind.KERNELS, Kind.LIBRARIES}


def test_every_kind_of_work_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SHARE", 0.0)  # one run of each
    monkeypatch.setattr(kernels, "FILE_BYTES", kernels.CHUNK)
    for name, small in (("ROWS", 64), ("WIDTH", 256), ("NARROW", 128)):
        monkeypatch.setattr(kernels, name, small)
    found = kernels.Kernels().measured() | kernels.disk_rates(tmp_path)
    assert found.keys() | LOADED == set(Kind) - {Kind.STEP}  # of GPUs alone
    assert all(rate > 0 for rate in found.values())
    assert not list(tmp_path.iterdir())


def test_a_rate_is_the_middle_of_the_runs():
    times = itertools.accumulate([0, 9, 0, 1, 0, 4, 0, 2, 0, 90])
    assert kernels.rate(8, lambda: None, clock=lambda: next(times), share=15) == 8 / 3


def test_a_job_says_what_was_predicted(l4pack, tmp_path):
    ended = l4pack("quantize", "demo", "--recipe", "int4-rtn", "--out", tmp_path / "out", "--json")
    record = json.loads(ended.out)
    assert record["predicted"]["seconds"] > 0
    assert record["predicted"]["phases"].keys() >= {"starting", "rounding"}
    assert record["seconds"] > 0


def test_a_job_says_so_for_people(l4pack, tmp_path):
    ended = l4pack("quantize", "demo", "--recipe", "int4-rtn", "--out", tmp_path / "out")
    assert "times the" in ended.out
    assert "were predicted" in ended.out
