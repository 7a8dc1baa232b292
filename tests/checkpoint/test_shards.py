"""Laying tensors out in files, and writing them in any order."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from l4pack.checkpoint.header import parse_header
from l4pack.checkpoint.writer import ShardWriter
from l4pack.containers.safetensors_folder import CONTAINER

WIDTHS = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self):
        return WIDTHS[self.dtype] * int(np.prod(self.shape))


def group(number, *dtypes, size=5):
    return [Tensor(f"m{number}.{k}", dtype, (size,)) for k, dtype in enumerate(dtypes)]


GROUPS = st.lists(
    st.tuples(st.lists(st.sampled_from(sorted(WIDTHS)), min_size=1, max_size=3), st.integers(1, 40)),
    min_size=1, max_size=12,
)  # fmt: skip


@given(GROUPS, st.integers(0, 500))
def test_any_layout_is_whole_aligned_and_within_its_limit(drawn, limit):
    groups = [group(number, *dtypes, size=size) for number, (dtypes, size) in enumerate(drawn)]
    shards, places = CONTAINER.lay_out(groups, limit)
    tensors = {tensor.name: tensor for each in groups for tensor in each}
    assert set(places) == set(tensors)
    assert [shard.tensors for shard in shards if not shard.tensors] == []
    for shard in shards:
        length = int.from_bytes(shard.prefix[:8], "little")
        assert len(shard.prefix) == 8 + length
        assert len(shard.prefix) % 8 == 0
        entries = parse_header(shard.prefix[8:], shard.nbytes - len(shard.prefix), shard.file)
        assert set(entries) == set(shard.tensors)
        for name, entry in entries.items():
            assert (entry.start, entry.nbytes, entry.shape) == (
                places[name].start,
                places[name].nbytes,
                tensors[name].shape,
            )
            assert entry.start % WIDTHS[tensors[name].dtype] == 0
        within = sum(entry.nbytes for entry in entries.values())
        assert within <= limit or len({name.partition(".")[0] for name in shard.tensors}) == 1
    for each in groups:
        assert len({places[tensor.name].file for tensor in each}) == 1


def test_files_are_named_and_indexed_as_transformers_does():
    shards, _ = CONTAINER.lay_out([group(1, "F32"), group(2, "F32")], 20)
    assert [shard.file for shard in shards] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads(CONTAINER.index(shards, 40))
    assert index["metadata"]["total_size"] == 40
    assert index["weight_map"] == {"m1.0": shards[0].file, "m2.0": shards[1].file}
    single, _ = CONTAINER.lay_out([group(1, "F32")], 20)
    assert single[0].file == "model.safetensors"
    assert CONTAINER.index(single, 20) is None


def test_pieces_in_any_order_make_the_file(tmp_path):
    tensors = group(1, "U8", "F32", "I64", size=6)
    shards, places = CONTAINER.lay_out([tensors], 10**6)
    data = {t.name: np.arange(t.nbytes, dtype=np.uint8) + k for k, t in enumerate(tensors)}
    writer = ShardWriter(tmp_path, shards, places)
    pieces = [(name, start) for name, raw in data.items() for start in range(0, raw.size, 5)]
    for name, start in reversed(pieces):
        writer.write(name, start, data[name][start : start + 5])
    writer.sync()
    digests = writer.digests(shards[0])
    writer.close()
    assert digests == {name: hashlib.sha256(raw.tobytes()).hexdigest() for name, raw in data.items()}
    assert (tmp_path / shards[0].file).stat().st_size == shards[0].nbytes
    with safe_open(tmp_path / shards[0].file, "np") as stream:
        assert stream.metadata() == {"format": "pt"}
        assert all(stream.get_tensor(name).tobytes() == raw.tobytes() for name, raw in data.items())


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 21), (20, 1), (19, 2)])
def test_no_piece_leaves_its_tensor(tmp_path, offset, size):
    shards, places = CONTAINER.lay_out([group(1, "F32"), group(2, "F32")], 10**6)
    writer = ShardWriter(tmp_path, shards, places)
    with pytest.raises(ValueError, match="of a tensor of 20"):
        writer.write("m1.0", offset, np.zeros(size, np.uint8))
    writer.close()


def test_opening_a_begun_file_keeps_what_it_holds(tmp_path):
    shards, places = CONTAINER.lay_out([group(1, "F32")], 10**6)
    writer = ShardWriter(tmp_path, shards, places)
    writer.write("m1.0", 4, np.full(4, 7, np.uint8))
    writer.close()
    before = (tmp_path / shards[0].file).read_bytes()
    ShardWriter(tmp_path, shards, places).close()
    assert (tmp_path / shards[0].file).read_bytes() == before
    assert b"\x07\x07\x07\x07" in before
