"""What is typed of a cluster, and can't be, is said in a line; no cluster is needed for that."""

from __future__ import annotations

import sys

import pytest

from l4pack.cluster.options import ClusterOptions
from l4pack.errors import UsageError


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("maverick", shards=3)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--ray", "127.0.0.1:1"], 5, "no Ray cluster answers at 127.0.0.1:1: Connection refused"),
        (["--ray", "somewhere"], 2, "--ray somewhere is no address"),
        (["--ray", "auto", "--gpus-per-worker", 1], 2, "--gpus-per-worker is for devices"),
        (["--gpus-per-worker", 1], 2, "--gpus-per-worker goes with --ray"),
    ],
)
def test_what_was_typed_is_refused_in_a_line(l4pack, source, tmp_path, options, code, message):
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "o", "--compute", "cpu", *options)
    assert ended.code == code
    error, hint = ended.err.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")
    assert not (tmp_path / "o.partial").exists()


def test_no_cluster_answers_an_evaluation_or_a_measurement(l4pack, artifact, source, tmp_path):
    nobody = ("--ray", "127.0.0.1:1", "--compute", "cpu")
    evaluated = l4pack("evaluate", artifact("int4-rtn"), "--against", source, "--work", tmp_path / "work", *nobody)
    measured = l4pack("measure", source, "--out", tmp_path / "out.json", *nobody)
    for ended in (evaluated, measured):
        assert ended.code == 5
        assert ended.err.startswith("error: no Ray cluster answers at 127.0.0.1:1: Connection refused")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gpus", [0, -1, 1.5])
def test_a_worker_takes_whole_devices_or_a_share_of_one(gpus):
    with pytest.raises(UsageError, match="is no share of a device"):
        ClusterOptions.of("auto", gpus, accelerated=True)


def test_without_ray_it_is_said_how_to_get_it(l4pack, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--out", tmp_path / "o", "--ray", "auto")
    assert (ended.code, ended.err.splitlines()[0]) == (2, "error: --ray needs Ray: pip install 'l4pack[ray]'")
