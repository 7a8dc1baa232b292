"""GGUF headers that anybody may have written: right ones are read as the gguf library reads them, others are refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import quick_plan
from exporting import MIX, with_merge
from gguf import GGML_QUANT_SIZES, TENSOR_NAMES, GGMLQuantizationType, GGUFReader

from l4pack.checkpoint.open import open_source
from l4pack.containers import gguf as written
from l4pack.containers.gguf_header import TYPES, Many, read_gguf, read_model
from l4pack.containers.gguf_model import expected_shapes, placed, text_config
from l4pack.errors import SourceError
from l4pack.export.gguf import Gguf
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.quantize.run import run_plan


@pytest.fixture(scope="module", params=["scout", "maverick"])
def folder(request, checkpoint, tmp_path_factory):
    place = tmp_path_factory.mktemp("header")
    source = with_merge(checkpoint(request.param, use_qk_norm=True), place / "source")
    artifact = run_plan(quick_plan(source, MIX), place / "artifact").out
    return run_export(plan_export(open_source(str(artifact)), Gguf(), split=300_000), place / "out").out


@pytest.fixture(scope="module")
def raw(folder):
    """The bytes of a small file with keys, tensors and a tokenizer: the first part."""
    return min(folder.glob("[!m]*.gguf")).read_bytes()


def test_types_are_those_of_ggml():
    known = {kind.value: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert dict(TYPES) == known


def test_a_file_is_read_as_the_library_reads_it(folder):
    for path in folder.glob("*.gguf"):
        ours, theirs = read_gguf(path), GGUFReader(path)
        assert [(one.name, one.dtype, one.shape, one.start, one.nbytes) for one in ours.tensors] == [
            (one.name, one.tensor_type.name, tuple(map(int, one.shape[::-1])), one.data_offset, one.n_bytes)
            for one in theirs.tensors
        ]
        for key, value in ours.values.items():
            wanted = theirs.fields[key].contents()
            assert value == (Many(len(wanted)) if isinstance(value, Many) else wanted), key


def test_every_name_has_the_role_it_was_written_for(folder):
    names = {(role, TENSOR_NAMES[kind].format(bid=3)) for (role, _), kind in written._OF_TEXT.items()}
    for role, name in names:
        tensor = read_model(min(folder.glob("[!m]*.gguf"))).tensors[0]
        found = placed(type(tensor)(f"{name}.weight", "F32", (1,), "", 0, 0))
        assert found == (role, 3 if name.startswith("blk") else None)


def test_an_export_has_what_its_keys_ask_for(folder):
    file = read_model(min(folder.glob("[!m]*.gguf")))
    shapes = {tensor.name: tensor.shape for tensor in file.tensors if tensor.name != "rope_freqs.weight"}
    assert shapes == expected_shapes(text_config(file))


def changed(raw, place, data):
    return raw[:place] + data + raw[place + len(data) :]


DAMAGE = {
    "empty": lambda raw: b"",
    "magic alone": lambda raw: raw[:4],
    "another format": lambda raw: b"PK\3\4" + raw[4:],
    "version 1": lambda raw: changed(raw, 4, struct.pack("<I", 1)),
    "big-endian": lambda raw: changed(raw, 4, struct.pack(">I", 3)),
    "2^60 tensors": lambda raw: changed(raw, 8, struct.pack("<Q", 2**60)),
    "2^60 keys": lambda raw: changed(raw, 16, struct.pack("<Q", 2**60)),
    "a key of 2^63 bytes": lambda raw: changed(raw, 24, struct.pack("<Q", 2**63)),
    "a value of an unknown type": lambda raw: raw[:16] + struct.pack("<QQ1sI", 1, 1, b"k", 99),
    "an array of arrays": lambda raw: raw[:16] + struct.pack("<QQ1sIIQ", 1, 1, b"k", 9, 9, 2**40),
    "2^60 texts": lambda raw: raw[:16] + struct.pack("<QQ1sIIQ", 1, 1, b"k", 9, 8, 2**60) + bytes(4096),
    "2^61 numbers": lambda raw: raw[:16] + struct.pack("<QQ1sIIQ", 1, 1, b"k", 9, 10, 2**61) + bytes(4096),
    "a key twice": lambda raw: raw[:8] + struct.pack("<QQ", 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"k", 0, 1),
    "an alignment of 0": lambda raw: (
        raw[:8] + struct.pack("<QQQ17sII", 0, 1, 17, b"general.alignment", 4, 0)
    ),
    "a huge shape": lambda raw: raw[:8] + struct.pack("<QQQ1sIQQIQ", 1, 0, 1, b"t", 2, 2**40, 2**40, 0, 0),
    "no elements": lambda raw: raw[:8] + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 0, 0, 0),
    "99 dimensions": lambda raw: raw[:8] + struct.pack("<QQQ1sI", 1, 0, 1, b"t", 99),
    "no such type": lambda raw: raw[:8] + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 32, 5, 0) + bytes(400),
    "half a block": lambda raw: raw[:8] + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 48, 2, 0) + bytes(400),
    "an offset beyond": lambda raw: raw[:8] + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 32, 0, 2**62),
    "a name of no text": lambda raw: raw[:8] + struct.pack("<QQQ2sIQIQ", 1, 0, 2, b"\xff\xfe", 1, 32, 0, 0),
    "an escape in a name": lambda raw: raw[:8] + struct.pack("<QQQ2sIQIQ", 1, 0, 2, b"\x1b[", 1, 32, 0, 0),
    "cut short": lambda raw: raw[:-64],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_can_not_be_true_is_refused(raw, tmp_path, name, l4pack):
    path = tmp_path / "foreign.gguf"
    path.write_bytes(DAMAGE[name](raw))
    for command in (("verify", path), ("budget", path, "--device", "h100")):
        ended = l4pack(*command)
        assert ended.code == 4, (name, command, ended.err)
        assert ended.err.startswith("error: foreign.gguf: ")
        assert "hint:" in ended.err


def test_whatever_is_changed_ends_in_an_answer_or_a_refusal(raw, tmp_path):
    """Bytes changed, cut and repeated at random: a SourceError or a header within the file, in little time."""
    rng, path = np.random.default_rng(11), tmp_path / "fuzzed.gguf"
    head = min(len(raw), 20_000)
    started, refused = time.process_time(), 0
    for _ in range(300):
        data = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(0, head) if rng.random() < 0.5 else rng.integers(0, 400))
            data[place : place + 8] = rng.choice([b"\xff" * 8, bytes(8), rng.bytes(8), rng.bytes(1)])
        if rng.random() < 0.2:
            del data[int(rng.integers(0, len(data))) :]
        path.write_bytes(data)
        try:
            file = read_gguf(path)
            assert all(one.start + one.nbytes <= len(data) for one in file.tensors)
            text_config(file), [placed(one) for one in file.tensors]
        except SourceError:
            refused += 1
    assert refused > 150
    assert time.process_time() - started < 60


def test_a_bomb_takes_neither_time_nor_memory(tmp_path):
    """A file of empty texts, sparse and 40 GB large."""
    path = tmp_path / "bomb.gguf"
    with path.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2_000_000))
        stream.truncate(40 * 10**9)
    code = (
        "import re, sys, time; from pathlib import Path; from l4pack.containers.gguf_header import read_gguf\n"
        "read_gguf(Path(sys.argv[1]))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1], time.process_time())"
    )
    ended = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    peak, seconds = map(float, ended.stdout.split())
    assert peak < 200_000
    assert seconds < 20


def with_keys(path, source, change):
    """A copy of a file with other keys, by the library's own writer."""
    from gguf import GGUFWriter

    reader = GGUFReader(source)
    writer = GGUFWriter(path, "llama4")
    for key, field in reader.fields.items():
        if key.startswith("llama4."):
            writer.add_key_value(key, change(key, field.contents()), field.types[0])
    if extra := change("", None):
        writer.add_uint32(*extra)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, checkpoint):
    """A model in one file."""
    place = tmp_path_factory.mktemp("whole")
    artifact = run_plan(quick_plan(checkpoint("text"), MIX), place / "artifact").out
    return next(run_export(plan_export(open_source(str(artifact)), Gguf()), place / "out").out.glob("*.gguf"))


KEYS = {
    "a window": ("sliding_window", lambda key, value: value if key else ("llama4.attention.sliding_window", 0)),
    "another width": ("has shape", lambda key, value: 2 * value if key == "llama4.embedding_length" else value),
    "more layers": ("is missing", lambda key, value: value + 1 if key == "llama4.block_count" else value),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_file_that_llama_cpp_would_answer_wrongly_from_is_told(whole, tmp_path, name, l4pack):
    message, change = KEYS[name]
    path = with_keys(tmp_path / "foreign.gguf", whole, change)
    ended = l4pack("verify", path, "--json")
    assert ended.code == 1, ended.err
    found = [f"{one['where']} {one['message']}" for one in json.loads(ended.out)["findings"] if one["level"] == "error"]
    assert any(message in one for one in found)


def test_a_foreign_file_that_is_right_is_said_to_be(whole, tmp_path, l4pack):
    path = with_keys(tmp_path / "foreign.gguf", whole, lambda key, value: value)
    assert l4pack("verify", path).code == 0
    assert l4pack("verify", path, "--strict").code == 1  # it says no licence
    assert l4pack("verify", path, "--against", path).code == 2


def test_a_part_that_is_missing_is_named(folder, tmp_path, l4pack):
    first = min(folder.glob("[!m]*.gguf"))
    (tmp_path / first.name).write_bytes(first.read_bytes())
    ended = l4pack("verify", tmp_path / first.name)
    assert ended.code == 4
    assert "is missing" in ended.err
