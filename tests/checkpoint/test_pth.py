"""Files of torch.save, read without unpickling: what torch wrote is found to the bit, and what it never writes is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from l4pack.checkpoint.pickled import Opaque, described
from l4pack.checkpoint.pth import parse_pth, read_pth
from l4pack.errors import SourceError


def numbers(path, tensor):
    """A tensor's numbers by mapping the whole file, in another way than the reader's."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)[tensor.start :]
    raw = raw[: len(raw) // 2 * 2].view(np.uint16)
    return np.lib.stride_tricks.as_strided(raw, tensor.shape, [2 * step for step in tensor.strides])


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("ordered", [False, True])
def test_what_torch_wrote_is_found(tmp_path, protocol, ordered):
    whole = torch.randn(6, 10).bfloat16()
    state = {
        "a": whole,
        "turned": whole.T,
        "some": whole[2:4, 3:9],
        "own": torch.nn.Parameter(torch.randn(3).bfloat16()),
    }
    path = tmp_path / "x.pth"
    torch.save(OrderedDict(state) if ordered else state, path, pickle_protocol=protocol)
    header = read_pth(path, "x.pth")
    assert header.others == ()
    for name, tensor in state.items():
        assert header.tensors[name].dtype == "BF16"
        assert np.array_equal(
            numbers(path, header.tensors[name]), tensor.detach().view(torch.int16).numpy().view(np.uint16)
        )


def test_a_module_s_state_and_what_is_beside_weights(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({**torch.nn.Linear(4, 2).state_dict(), "x._extra_state": io.BytesIO(b"\x80\xff"), "none": None}, path)
    header = read_pth(path, "x.pth")
    assert header.tensors.keys() == {"weight", "bias"}
    assert header.others == ("x._extra_state", "none")
    torch.save(torch.nn.Linear(4, 2).state_dict(), path)
    assert read_pth(path, "x.pth").tensors.keys() == {"weight", "bias"}


def test_dtypes_that_are_no_weights_are_named(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(4).to(torch.float8_e4m3fn), "i": torch.zeros(2, dtype=torch.int8)}, path)
    assert {name: one.dtype for name, one in read_pth(path, "x").tensors.items()} == {"w": "F8_E4M3", "i": "I8"}


def test_parts_of_a_file_far_away_are_enough(tmp_path):
    """The places that torch.save gives to storages are known from the directory alone."""
    path = tmp_path / "x.pth"
    torch.save({f"w{n}": torch.randn(n + 1).bfloat16() for n in range(40)}, path)
    raw, asked = path.read_bytes(), []

    def read(start, nbytes):
        asked.append(nbytes)
        return raw[start : start + nbytes]

    assert parse_pth(read, len(raw), "x", trusting=True) == read_pth(path, "x")
    assert len(asked) <= 5


class Calls:
    def __init__(self, function, *arguments):
        self.value = function, arguments

    def __reduce__(self):
        return self.value


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "value", [Calls(os.system, "touch /tmp/never"), Calls(eval, "1"), torch.nn.Linear(1, 1), range(3)]
)
def test_a_pickle_that_calls_is_refused_and_never_run(tmp_path, value, protocol, monkeypatch):
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("it was run"))
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(2), "x": value}, path, pickle_protocol=protocol)
    with pytest.raises(SourceError, match=r"asks to call|which no dictionary of tensors needs"):
        read_pth(path, "x.pth")


def directory(members):
    """A zip file of members by name, each with its bytes, as torch.save would place them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


PICKLED = {
    "nothing": (b"", "can't be read"),
    "no end": (b"\x80\x02}", "can't be read"),
    "a list": (b"\x80\x02].", "holds no dictionary"),
    "names that are numbers": (b"\x80\x02}K\x01K\x02s.", "can't be read"),
    "more than the stack": (b"\x80\x02}sss.", "can't be read"),
    "a memory never put": (b"\x80\x02h\x07.", "can't be read"),
    "a text longer than the file": (b"\x80\x02}X\xff\xff\xff\x7fab", "can't be read"),
    "an instruction for classes": (b"\x80\x02}(ios\nsystem\n.", "which no dictionary of tensors needs"),
    "a storage of no type": (b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04tQ.", "can't be read"),
    "a name that is another's": (b"\x80\x02cposix\nsystem\n.", "asks to call posix.system"),
    "a call of a storage": (b"\x80\x02ctorch\nBFloat16Storage\n)R.", "can't be read"),
    "extension codes": (b"\x80\x02\x82\x01.", "which no dictionary of tensors needs"),
    "a buffer from elsewhere": (b"\x80\x05\x97.", "which no dictionary of tensors needs"),
}


@pytest.mark.parametrize(("raw", "message"), PICKLED.values(), ids=PICKLED)
def test_a_pickle_that_is_none_of_tensors(raw, message):
    with pytest.raises(SourceError, match=message):
        described(raw, "x.pth")


def test_nested_memories_cost_nothing():
    """Tuples of tuples that a hash or a copy would walk through 2 ** 400 times."""
    deep = b"\x80\x02}X\x01\x00\x00\x00a)q\x01" + b"h\x01\x86q\x01" * 400 + b"s."
    assert isinstance(described(deep, "x")["a"], Opaque)


def test_a_pickle_without_an_end_in_sight(monkeypatch):
    monkeypatch.setattr("l4pack.checkpoint.pickled._MAX_INSTRUCTIONS", 100)
    with pytest.raises(SourceError, match="does not end"):
        described(b"\x80\x02" + b"}" * 200 + b".", "x")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.arange(32.0), "v": torch.arange(8.0)}, path)
    return path


def central(raw, name):
    """Where the directory has a member."""
    place = raw.rindex(b"PK\1\2", 0, raw.rindex(name.encode()))
    assert raw[place + 46 : place + 46 + len(name)] == name.encode()
    return place


def at(offset, form, value, name="x/data/0"):
    """Change a number of a member's entry in the directory."""

    def change(raw):
        place = central(raw, name) + offset
        return raw[:place] + struct.pack(form, value) + raw[place + struct.calcsize(form) :]

    return change


def end64(offset, value):
    def change(raw):
        place = raw.rindex(b"PK\6\6") + offset
        return raw[:place] + struct.pack("<Q", value) + raw[place + 8 :]

    return change


DAMAGED = {
    "cut in the middle": (lambda raw: raw[: len(raw) // 2], "is cut short"),
    "cut by one byte": (lambda raw: raw[:-1], "is cut short|can't be true"),
    "more behind it": (lambda raw: raw + b"x", "is cut short"),
    "compressed, by its word": (at(10, "<H", 8), "compressed or encrypted"),
    "encrypted": (at(8, "<H", 1), "compressed or encrypted"),
    "a bomb by its sizes": (at(24, "<I", 2**31), "compressed or encrypted"),
    "larger than the file": (lambda raw: at(24, "<I", 2**31)(at(20, "<I", 2**31)(raw)), "over what comes after it"),
    "beyond the file": (at(42, "<I", 2**31), "over what comes after it"),
    "on another storage": (at(42, "<I", 0), "over what comes after it|no member where|something else"),
    "no size of 64 bits": (at(24, "<I", 2**32 - 1), "leaves out the size"),
    "one member more": (end64(32, 99), "two different things|has 99 members|can't be true"),
    "a directory elsewhere": (end64(48, 0), "two different things|not where it ends"),
    "a directory larger than all": (end64(40, 2**60), "two different things|not where it ends"),
    "another member's name": (lambda raw: raw.replace(b"x/data/0", b"x/data/9", 1), "something else of"),
    "no storage": (lambda raw: raw.replace(b"x/data/0", b"x/dato/0"), "has no storage"),
    "legacy": (lambda _: pickle.dumps({}, 2), "before torch 1.6"),
    "text": (lambda _: b"hello" * 99, "no file that torch.save wrote"),
    "a pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS|pointer"),
    "empty": (lambda _: b"", "no file that torch.save wrote"),
    "another zip": (lambda _: directory({"a.txt": b"x"}), "without one data.pkl"),
    "two pickles": (lambda _: directory({"a/data.pkl": b"x", "b/data.pkl": b"y"}), "without one data.pkl"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_hostile_file(saved, change, message):
    saved.write_bytes(change(saved.read_bytes()))
    with pytest.raises(SourceError, match=message):
        read_pth(saved, "x.pth")


def test_a_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(50_000_000))
    with pytest.raises(SourceError, match="compressed"):
        read_pth(path, "x.pth")


def test_a_pickle_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(directory({"x/data.pkl": bytes(20_000_000)}))
    with pytest.raises(SourceError, match="20,000,000 bytes, which is implausible"):
        read_pth(path, "x.pth")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.zeros(4).expand(3, 4), "expanded"), (torch.zeros(9).as_strided((3, 3), (2, 1)), "expanded")],
)
def test_numbers_that_lie_on_one_another(tmp_path, tensor, message):
    torch.save({"w": tensor}, tmp_path / "x.pth")
    with pytest.raises(SourceError, match=message):
        read_pth(tmp_path / "x.pth", "x.pth")


def test_a_tensor_beyond_its_storage(saved):
    raw = saved.read_bytes()
    place = raw.index(b"K\x20\x85")  # the length of `w`
    saved.write_bytes(raw[:place] + b"K\x40\x85" + raw[place + 3 :])
    with pytest.raises(SourceError, match="beyond its storage"):
        read_pth(saved, "x.pth")
