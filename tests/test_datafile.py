"""Data files from outside: plain, bounded in time and depth, and refused in one line."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
import yaml

from l4pack.datafile import parse_yaml, read_json, read_yaml
from l4pack.errors import RecipeError, UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("-3", -3), ("1_000", 1000), ("010", 10), ("1.5", 1.5), (".5", 0.5), ("1e-3", 0.001), ("-.inf", float("-inf")),
        ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("0x10", "0x10"), ("true", True), ("a", "a"), ("~", None), ("1-2", "1-2"),
    ],
)  # fmt: skip
def test_numbers_are_what_they_look_like(text, value):
    assert parse_yaml(f"key: {text}") == {"key": value}


LONG = {
    "base 60": "a: " + "1:" * 300_000 + "1", "tagged base 60": "a: !!int " + "1:" * 300_000 + "1",
    "tagged float": "a: !!float " + "1:" * 300_000 + "1", "digits": "a: " + "9" * 900_000, "lists": "[" * 100_000,
    "underscores": "a: " + "1_" * 300_000 + "1", "keys": "\n".join(f"k{number}: 1" for number in range(6_000)),
}  # fmt: skip


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_no_yaml_takes_long(tmp_path, text):
    path = tmp_path / "long.yaml"
    path.write_text(text)
    started = time.process_time()
    with suppress(RecipeError):
        assert isinstance(read_yaml(path), dict)
    assert time.process_time() - started < 10


def test_yaml_lets_no_error_of_its_own_tags_through():
    for text in ("!!bool maybe", "!!timestamp q", "!!float 1:2:3", "!!int x", "? [a]\n: 1", "!!binary 1", "!!set 3"):
        with pytest.raises((yaml.YAMLError, ValueError)):
            parse_yaml(text)


BAD_JSON = {
    "not JSON": b"{", "a list": b"[1]", "nested": b'{"a":' + b"[" * 200_000, "not a number": b'{"a": NaN}',
    "digits": b'{"a": ' + b"9" * 90_000 + b"}", "bytes": b"\xff\xfe\x00", "empty": b"", "large": b'{"a": "' + b"x" * 300_000 + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("raw", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_no_bounded_object_is_refused_in_one_line(tmp_path, raw):
    path = tmp_path / "record.json"
    path.write_bytes(raw)
    with pytest.raises(UsageError) as caught:
        read_json(path, 250_000, "make it again")
    assert "record.json" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint == "make it again"


def test_json_that_is_not_there_says_so(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_json(tmp_path / "absent.json", 10, "")
