"""Every matrix, whole and in pieces, is what safetensors reads of the file, whatever layout it lies in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from l4pack.checkpoint.matrices import matrices_of
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import open_folder
from l4pack.errors import SourceError
from l4pack.quant.layout import Layout

SOURCES = [("scout", "fused", "bfloat16"), ("maverick", "unfused", "bfloat16"), ("text", "fused", "float16"),
           ("text", "unfused", "float32")]  # fmt: skip


@pytest.fixture(params=SOURCES, ids="-".join)
def opened(request, checkpoint):
    kind, layout, dtype = request.param
    folder = checkpoint(kind, layout=layout, dtype=dtype)
    return open_folder(folder), load_file(folder / "model.safetensors")


def expected(linear, tensors):
    tensor = tensors[linear.tensor]
    if linear.layout is Layout.IN_OUT:
        tensor = tensor[linear.expert][:, linear.column : linear.column + linear.out_features].T
    return tensor.contiguous().view(torch.uint8).numpy()


def as_bytes(block):
    return np.ascontiguousarray(block.out_in).view(np.uint8)


def grouped(source, linears):
    groups = {}
    for linear in linears:
        groups.setdefault(source.together(linear), []).append(linear)
    return list(groups.values())


@pytest.mark.parametrize("rows", [slice(None), slice(0, 16), slice(16, 48)])
def test_matrices_read_together(opened, rows):
    checkpoint, tensors = opened
    with Reader(checkpoint.entries, checkpoint.store.path) as reader:
        source = matrices_of(checkpoint, reader)
        for group in grouped(source, checkpoint.layout.linears):
            for linear, block in zip(group, source.slab(group, rows).blocks(), strict=True):
                assert np.array_equal(as_bytes(block), expected(linear, tensors)[rows]), linear.module
                assert block.dtype == checkpoint.entries[linear.tensor].dtype


def test_one_of_two_that_lie_side_by_side(opened):
    checkpoint, tensors = opened
    with Reader(checkpoint.entries, checkpoint.store.path) as reader:
        source = matrices_of(checkpoint, reader)
        for linear in checkpoint.layout.linears:
            (block,) = source.slab([linear]).blocks()
            assert np.array_equal(as_bytes(block), expected(linear, tensors)), linear.module


def test_gate_and_up_are_one_read(opened):
    checkpoint, _ = opened
    source = matrices_of(checkpoint)
    fused = any(linear.layout is Layout.IN_OUT for linear in checkpoint.layout.linears)
    sizes = {len(group) for group in grouped(source, checkpoint.layout.linears)}
    assert sizes == ({1, 2} if fused else {1})


def test_costs_are_those_of_the_file(opened):
    checkpoint, _ = opened
    source = matrices_of(checkpoint)
    read = sum(source.nbytes(linear) for linear in checkpoint.layout.linears)
    tensors = {linear.tensor for linear in checkpoint.layout.linears}
    assert read == sum(checkpoint.entries[name].nbytes for name in tensors)
    for linear in checkpoint.layout.linears:
        entry = checkpoint.entries[linear.tensor]
        assert source.nbytes(linear, rows=2) * linear.out_features == 2 * source.nbytes(linear)
        file, start = source.begins(linear)
        one = entry.nbytes // (entry.shape[0] if linear.layout is Layout.IN_OUT else 1)
        index = linear.expert if linear.layout is Layout.IN_OUT else 0
        assert (file, start) == (entry.file, entry.start + index * one)


def test_a_missing_tensor(opened):
    checkpoint, _ = opened
    linear = checkpoint.layout.linears[-1]
    entries = {name: entry for name, entry in checkpoint.entries.items() if name != linear.tensor}
    with Reader(entries, checkpoint.store.path) as reader:
        source = matrices_of(replace(checkpoint, entries=entries), reader)
        with pytest.raises(SourceError, match="is missing from"):
            source.slab([linear])
