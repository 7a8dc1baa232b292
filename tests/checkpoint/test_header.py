"""safetensors headers: what the library itself writes is read, and every lie is refused before it is believed."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from l4pack.checkpoint.header import DTYPE_BITS, parse_header, read_header
from l4pack.checkpoint.reader import NUMPY_TYPES, Reader
from l4pack.errors import SourceError

MIXED = {
    "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "f16": torch.ones(3, 1, dtype=torch.float16),
    "f32": torch.full((2, 2, 2), 0.5),
    "i64": torch.tensor([7, 8]),
    "i32": torch.tensor([[1, -2]], dtype=torch.int32),
    "fp8": torch.ones(4, 4).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
}


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(MIXED, path, {"format": "pt"})
    entries = read_header(path, path.name)
    assert {name: entry.shape for name, entry in entries.items()} == {n: tuple(t.shape) for n, t in MIXED.items()}
    raw = path.read_bytes()
    for name, tensor in MIXED.items():
        entry = entries[name]
        assert raw[entry.start : entry.start + entry.nbytes] == tensor.flatten().view(torch.uint8).numpy().tobytes()


def test_the_reader_gives_the_same_numbers(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(MIXED, path)
    with Reader(read_header(path, path.name), lambda _: path) as reader:
        assert np.array_equal(reader.tensor("f32"), MIXED["f32"].numpy())
        assert np.array_equal(reader.tensor("bf16"), MIXED["bf16"].view(torch.uint16).numpy())
        assert np.array_equal(reader.matrix("f32", 1), MIXED["f32"][1].numpy())
        assert np.array_equal(reader.matrix("bf16", None, slice(1, 2)), MIXED["bf16"][1:].view(torch.uint16).numpy())
        assert np.array_equal(reader.columns("f32", 1, [slice(1, 2)]), MIXED["f32"][1, :, 1:].numpy())
        assert reader.span("i64", 8, 8).tobytes() == (8).to_bytes(8, "little")


def test_every_dtype_has_a_numpy_type_of_its_width():
    assert set(DTYPE_BITS) == set(NUMPY_TYPES)
    assert all(8 * np.dtype(NUMPY_TYPES[name]).itemsize == bits for name, bits in DTYPE_BITS.items())


def entry(start: int, end: int, dtype: object = "F32", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


LIES = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlaps another tensor"),
    "same place": ({"a": entry(0, 8), "b": entry(0, 8)}, 16, "overlaps another tensor"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "leaves a gap"),
    "late start": ({"a": entry(4, 8)}, 8, "leaves a gap"),
    "past the end": ({"a": entry(0, 16)}, 8, "truncated"),
    "file too long": ({"a": entry(0, 8)}, 9, "longer than its header says"),
    "backwards": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8, "needs 8"),
    "negative": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, "describes tensor a wrongly"),
    "wrong dtype for the bytes": ({"a": entry(0, 8, "BF16", [2])}, 8, "gives tensor a 8 bytes; BF16"),
    "unknown dtype": ({"a": entry(0, 8, "F31", [2])}, 8, "unknown dtype 'F31'"),
    "dtype is a number": ({"a": entry(0, 8, 5)}, 8, "describes tensor a wrongly"),
    "negative shape": ({"a": entry(0, 8, "F32", [-1, -2])}, 8, "impossible shape"),
    "huge shape": ({"a": entry(0, 8, "F32", [2**62, 2**62])}, 8, "impossible shape"),
    "many dimensions": ({"a": entry(0, 8, "F32", [1] * 9)}, 8, "impossible shape"),
    "fraction in shape": ({"a": entry(0, 8, "F32", [2.0])}, 8, "impossible shape"),
    "truth in shape": ({"a": entry(0, 4, "F32", [True])}, 4, "impossible shape"),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
        8,
        "describes tensor a wrongly",
    ),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "describes tensor a wrongly"),
    "not an object": ({"a": [0, 8]}, 8, "describes tensor a wrongly"),
    "nothing described": ({}, 8, "longer than its header says"),
}


@pytest.mark.parametrize(("header", "data_bytes", "message"), LIES.values(), ids=LIES)
def test_lies_are_refused_here_and_by_the_library(tmp_path, header, data_bytes, message):
    raw = json.dumps(header).encode()
    with pytest.raises(SourceError, match=message) as caught:
        parse_header(raw, data_bytes, "shard")
    assert caught.value.message.startswith("shard ")
    assert caught.value.hint
    path = tmp_path / "shard"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data_bytes))
    with pytest.raises(SafetensorError), safe_open(path, "np"):
        pass


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "not an object"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}', "appears twice"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not valid JSON"),
    ],
    ids=["empty", "half", "list", "deep lists", "deep objects", "bytes", "names twice", "keys twice", "endless number"],
)
def test_text_that_is_no_header(raw, message):
    with pytest.raises(SourceError, match=message):
        parse_header(raw, 0, "shard")


TENSOR = '"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}'
STRANGE = {
    "a byte order mark": "\ufeff{" + TENSOR + "}",
    "UTF-16": ("{" + TENSOR + "}").encode("utf-16"),
    "UTF-16 without a mark": ("{" + TENSOR + "}").encode("utf-16-le"),
    "UTF-32": ("{" + TENSOR + "}").encode("utf-32"),
    "Latin-1": b'{"\xe9": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
    "a trailing NUL": "{" + TENSOR + "}\0",
    "metadata of numbers": '{"__metadata__": {"a": 1}, ' + TENSOR + "}",
    "metadata nested": '{"__metadata__": {"a": {"b": "c"}}, ' + TENSOR + "}",
    "metadata as a list": '{"__metadata__": [], ' + TENSOR + "}",
    "metadata as a text": '{"__metadata__": "x", ' + TENSOR + "}",
    "metadata of nothing": '{"__metadata__": {"a": null}, ' + TENSOR + "}",
    "half a character in metadata": '{"__metadata__": {"a": "\\udc00"}, ' + TENSOR + "}",
    "half a character in a name": '{"\\ud800": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
    "minus zero": '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [-0, 2]}}',
    "not a number beside": '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], "x": NaN}}',
    "an endless number beside": '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], "x": 1e999}}',
    "deep lists beside": '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], "x": ' + "[" * 200 + "]" * 200 + "}}",
    "a control character": '{"a\x01": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
}  # fmt: skip


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_what_the_library_refuses_is_refused(tmp_path, text):
    raw = text if isinstance(text, bytes) else text.encode()
    path = tmp_path / "shard"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"ab")
    with pytest.raises(SafetensorError), safe_open(path, "np"):
        pass
    with pytest.raises(SourceError):
        read_header(path, "shard")


@pytest.mark.parametrize("metadata", ["null", "{}", '{"format": "pt", "\\ud83d\\ude00": "\u00e9"}'])
def test_metadata_the_library_takes_is_taken(tmp_path, metadata):
    raw = ('{"__metadata__": ' + metadata + ", " + TENSOR + "}").encode()
    path = tmp_path / "shard"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"ab")
    with safe_open(path, "np"):
        assert read_header(path, "shard")["a"].nbytes == 2


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 9])
def test_a_length_is_bounded_before_it_is_believed(tmp_path, length):
    path = tmp_path / "shard"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(SourceError, match=f"claims a header of {length:,} bytes in a file of 10"):
        read_header(path, "shard")


def test_a_huge_header_in_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "shard"
    with path.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(1 << 40)
    with pytest.raises(SourceError, match="claims a header of 200,000,000 bytes"):
        read_header(path, "shard")


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x01\x02\x03\x04\x05\x06\x07"])
def test_files_shorter_than_a_length(tmp_path, content):
    path = tmp_path / "shard"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="claims a header"):
        read_header(path, "shard")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SourceError, match="shard: No such file"):
        read_header(Path(tmp_path / "nothing"), "shard")


@given(st.binary(max_size=200), st.integers(0, 64))
def test_any_bytes_are_read_or_refused_and_nothing_else(raw, data_bytes):
    try:
        entries = parse_header(raw, data_bytes, "shard")
    except SourceError:
        return
    assert sum(found.nbytes for found in entries.values()) == data_bytes


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3))
FIELDS = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(["F32", "U8"]) | JSON, "shape": JSON, "data_offsets": JSON}
)


@given(st.dictionaries(st.text(max_size=3), FIELDS | JSON, max_size=4), st.integers(0, 64))
def test_any_object_is_read_or_refused_and_nothing_else(header, data_bytes):
    with suppress(SourceError):
        assert len(parse_header(json.dumps(header).encode(), data_bytes, "shard")) <= len(header)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), FIELDS | JSON, max_size=3), st.integers(0, 8))
def test_no_object_that_the_library_refuses_is_read(tmp_path_factory, header, data_bytes):
    raw = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data_bytes))
    try:
        with safe_open(path, "np"):
            return
    except SafetensorError:
        with pytest.raises(SourceError):
            read_header(path, "shard")
