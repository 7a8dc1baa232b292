"""A wave that a worker of a cluster has left half way is gone on with by another, in a folder of its own."""

from __future__ import annotations

import pytest
import torch
from killing import TEXT, Killed

from l4pack.checkpoint.open import open_source
from l4pack.measure.changes import waves_of
from l4pack.measure.desk import MeasuringDesk, MeasuringJob, WaveTask
from l4pack.measure.prepare import MeasureSettings, prepare_measurement
from l4pack.stream.kept import WalkState
from l4pack.stream.walk import Walk
from l4pack.text.choice import TextChoice

SMALL = {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    (folder / "text.txt").write_text(TEXT)
    settings = MeasureSettings(
        out=folder / "out.json", text=TextChoice(str(folder / "text.txt"), 4, 48), options=("int8-g64",), compute="cpu"
    )
    return prepare_measurement(open_source(str(checkpoint("scout", **SMALL))), settings)


def wave(prepared, folder):
    job = MeasuringJob(prepared, folder)
    return MeasuringDesk(job).run(WaveTask("wave", tuple(prepared.first()[:4]), prepared.singles[-1:]))


def same(found, other):
    known = (found.errors, found.terms, found.kl.keys()) == (other.errors, other.terms, other.kl.keys())
    return known and all(torch.equal(found.kl[key], other.kl[key]) for key in found.kl)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_wave_goes_on_in_another_folder(prepared, tmp_path, monkeypatch, damaged):
    """Where whoever was given up as lost lives on and writes, nothing of that is believed."""
    undisturbed = wave(prepared, tmp_path / "undisturbed")
    finish = WalkState.finish

    def dying(*arguments, **options):
        finish(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WalkState, "finish", dying)
        with pytest.raises(Killed):
            wave(prepared, tmp_path / "waves")
    (before,) = (path for path in (tmp_path / "waves" / "wave").iterdir() if path.is_dir())
    if damaged:
        (before / "original-1.hidden").write_bytes(bytes((before / "original-1.hidden").stat().st_size))
    resumed, begin = [], Walk._begin
    monkeypatch.setattr(Walk, "_begin", lambda self: (resumed.append(self.resumed_layers), begin(self)))
    assert same(wave(prepared, tmp_path / "waves"), undisturbed)
    assert resumed == [0 if damaged else 1]
    assert not before.exists()


def test_waves_are_about_as_long_and_hold_every_change_once(prepared):
    changes = prepared.first()
    for workers, most in ((1, 100), (3, 100), (3, 2), (100, 100)):
        waves = waves_of(changes, workers, most, 2)
        assert [change for some in waves for change in some] == changes
        assert max(map(len, waves)) <= most
        assert len(waves) >= min(workers, len(changes)) // 2
    lengths = [sum(2 - change.layer for change in some) for some in waves_of(changes, 2, 100, 2)]
    assert max(lengths) - min(lengths) <= 2
