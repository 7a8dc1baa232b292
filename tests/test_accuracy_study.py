"""The study of accuracy: what its record says together, and that the page says what the record does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "benchmarks" / "accuracy.json", ROOT / "docs" / "explanation" / "accuracy.md"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def test_the_error_of_a_ratio_is_that_of_drawing_texts_anew():
    from accuracy_record import ratio

    generator = torch.Generator().manual_seed(1)
    hard = torch.rand(200, generator=generator) + 0.5  # what a sequence does to both
    theirs, ours = hard + 0.2 * torch.rand(200, generator=generator), 0.6 * hard
    value, error = ratio(ours.tolist(), theirs.tolist())
    assert value == pytest.approx(float(ours.sum() / theirs.sum()))
    drawn = torch.randint(200, (4000, 200), generator=generator)
    again = ours[drawn].sum(1) / theirs[drawn].sum(1)
    assert error == pytest.approx(float(again.std()), rel=0.1)
    assert error < 0.3 * float(ours[drawn].mean(1).std() / theirs.mean())  # both err on the same text


def test_a_percentiles_error_is_none_where_all_sequences_are_alike():
    from accuracy_record import percentile_error

    one = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert percentile_error(one.repeat(20), [50] * 20, 0.99) < 1e-12
    assert percentile_error(torch.cat([one * scale for scale in range(1, 21)]), [50] * 20, 0.99) > 0


def test_the_spread_over_seeds_is_told_apart_from_the_texts_error():
    from accuracy_page import Row, _numbers

    cells = [{"kl_mean": value, "kl_standard_error": 0.3} for value in (1.0, 2.0, 3.0)]
    assert _numbers(Row(cells, None), "kl_mean", "kl_standard_error") == ("2e+03", "3e+02", "1e+03")
    assert _numbers(Row(cells[:1], None), "kl_mean", "kl_standard_error")[2] == ""


def test_the_page_has_the_records_tables():
    from accuracy_page import tables
    from accuracy_record import read_record

    record = read_record(RECORD, json.loads(RECORD.read_text())["settings"])
    assert tables(record) in PAGE.read_text(encoding="utf-8")


def test_cells_of_other_settings_are_not_mixed_in():
    from accuracy_record import read_record

    with pytest.raises(SystemExit, match="name another --record"):
        read_record(RECORD, {"sequence_length": 1})
