"""Tensors in pieces of several files, read part by part: the same numbers as of one array, whatever is asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.pieces import Piece, Pieces
from l4pack.checkpoint.reader import Reader, boxes
from l4pack.errors import SourceError

SHAPES = [(7,), (5, 6), (3, 5, 8)]


@pytest.mark.parametrize("shape", [*SHAPES, (4, 1, 3), (1, 6)])
def test_boxes_are_the_numbers_between(shape):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.size):
        for stop in range(start, numbers.size + 1):
            found = [numbers[tuple(slice(*ends) for ends in box)].ravel() for box in boxes(shape, start, stop)]
            assert np.concatenate([[], *found]).tolist() == list(range(start, stop))


def stored(folder, name, array, order, gap=0):
    """Write an array with its axes in another order, and say at which strides it lies."""
    path = folder / name
    turned = np.ascontiguousarray(array.transpose(order))
    path.write_bytes(b"\xff" * gap + turned.tobytes())
    return gap, tuple(step // array.itemsize for step in turned.transpose(np.argsort(order)).strides)


@pytest.fixture(params=[((0, 1, 2), (0, 1, 2)), ((2, 1, 0), (1, 0, 2)), ((0, 2, 1), (2, 0, 1))], ids=str)
def split(request, tmp_path):
    """A tensor [3, 5, 8] in two files along its last axis, each in an order of its own."""
    numbers = np.random.default_rng(0).integers(0, 1 << 16, (3, 5, 8)).astype(np.uint16)
    pieces = []
    for file, (start, stop), order in zip("ab", [(0, 3), (3, 8)], request.param, strict=True):
        place, strides = stored(tmp_path, file, numbers[..., start:stop], order, gap=6)
        pieces.append(Piece(f"in {file}", file, place, (0, 0, start), (3, 5, stop - start), strides))
    entry = TensorEntry("t", "a", "BF16", (3, 5, 8), 6, numbers.nbytes, Pieces(tuple(pieces), 2))
    with Reader({"t": entry}, lambda file: tmp_path / file) as reader:
        yield numbers, entry, reader


def test_what_is_asked_for_is_what_one_array_holds(split):
    numbers, entry, reader = split
    assert np.array_equal(reader.tensor("t"), numbers)
    assert np.array_equal(reader.matrix("t", 1), numbers[1])
    assert np.array_equal(reader.matrix("t", 2, slice(1, 4)), numbers[2, 1:4])
    picked = reader.columns("t", 0, [slice(2, 4), slice(7, 8)])
    assert np.array_equal(picked, numbers[0][:, [2, 3, 7]])
    assert entry.stored == {"a": 3 * 5 * 3 * 2, "b": 3 * 5 * 5 * 2}


def test_bytes_of_it_from_any_byte_on(split):
    numbers, entry, reader = split
    raw = numbers.tobytes()
    for start in range(0, entry.nbytes, 3):
        for nbytes in (0, 1, 2, 7, 50, entry.nbytes - start):
            nbytes = min(nbytes, entry.nbytes - start)
            assert reader.span("t", start, nbytes).tobytes() == raw[start : start + nbytes]


def test_larger_than_what_is_read_aside(split, monkeypatch):
    monkeypatch.setattr("l4pack.checkpoint.reader._SCRATCH", 8)
    test_what_is_asked_for_is_what_one_array_holds(split)


def test_a_file_that_ends_too_soon_is_named(split, tmp_path):
    *_, reader = split
    (tmp_path / "b").write_bytes(b"short")
    with pytest.raises(SourceError, match="b ends inside in b"):
        reader.tensor("t")


def test_pieces_are_part_of_what_a_source_is(split):
    _, entry, _ = split
    assert "'b'" in entry.identity
    assert entry.identity.startswith("TensorEntry(name='t', file='a'")
