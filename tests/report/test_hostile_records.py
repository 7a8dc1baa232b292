"""Records with values of the wrong kind: a card is refused in one line that names the key, never half made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4pack.artifact.calibration_record import RECORD_NAME, read_calibration
from l4pack.cli.console import LINE_LIMIT
from l4pack.errors import UsageError

GOOD = {
    "schema_version": 1, "text": {"source": "a"}, "routed_tokens": {"0": [1, 0]}, "kv_cache": {},
    "matrices": {"a": {"method": "gptq", "loss": 0.1}, "b": {"method": "rtn", "input_amax": 1.0}},
}  # fmt: skip
WRONG = {
    "schema_version": [2, "1", None, 1.5], "text": [[], "a", 3, None], "routed_tokens": [[], {"0": 3}, {"0": ["x"]}, {"0": [-1]},
    {"0": [2**61]}, {"0": [1.5]}, None], "matrices": [[], {"a": []}, {"a": {"method": "magic"}}, {"a": {"method": []}}, "x"],
}  # fmt: skip


def write(folder: Path, value: object) -> Path:
    (folder / RECORD_NAME).write_text(json.dumps(value))
    return folder


def test_a_calibration_record_is_read_as_it_is(tmp_path):
    assert read_calibration(tmp_path) is None
    assert read_calibration(write(tmp_path, GOOD)) == GOOD


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named_by_its_key(tmp_path, key, value):
    with pytest.raises(UsageError, match=f"{RECORD_NAME}: {key}") as caught:
        read_calibration(write(tmp_path, {**GOOD, key: value}))
    assert "\n" not in caught.value.message
    assert "calibrate again" in caught.value.hint


@pytest.mark.parametrize("value", [[], 3, "x", None])
def test_what_is_no_record_is_refused(tmp_path, value):
    with pytest.raises(UsageError, match="does not hold an object"):
        read_calibration(write(tmp_path, value))


def test_the_line_of_an_error_is_bounded(l4pack, tmp_path):
    ended = l4pack("inspect", tmp_path / ("x/" * 200_000))
    assert ended.code == 4
    assert max(map(len, ended.err.splitlines())) <= LINE_LIMIT + len("error: ")
