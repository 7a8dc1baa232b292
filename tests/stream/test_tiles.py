"""Matrices that stay as they are stored give what whole ones give, whatever the number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import whole_model
from streaming import CPU, assert_close, stream_model, streamed_logits, token_rows

from l4pack.checkpoint.source import open_folder
from l4pack.plan.memory import Computing
from l4pack.quant import cpu
from l4pack.stream.tiles import StoredTiles, TiledLinear
from l4pack.stream.units import Part, layer_units, load_unit
from l4pack.stream.weights import TiledWeight, Weights, stored_itemsize


@pytest.mark.parametrize("layout", ["fused", "unfused"])
def test_streamed_logits_are_transformers(checkpoint, tmp_path, layout, monkeypatch):
    monkeypatch.setattr("l4pack.stream.tiles.TILE_OUTPUTS", 48)  # the last tile of a matrix is a smaller one
    sequences = token_rows()
    wanted = whole_model.logits(whole_model.load(checkpoint("maverick")), sequences)
    assert_close(streamed_logits(checkpoint("maverick", layout=layout), sequences, tmp_path, tiled=True), wanted)


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8", "fp8-block"])
def test_quantized_weights_are_those_of_whole_matrices(artifact, recipe):
    checkpoint = open_folder(artifact(recipe))
    units = [unit for unit in layer_units(checkpoint.config, 1) if unit.part is not Part.ATTENTION]
    with Weights(checkpoint, CPU, torch.float32) as whole, Weights(checkpoint, CPU, torch.float32, tiled=True) as tiled:
        for unit in units:
            wanted, found = load_unit(whole, unit).linears, load_unit(tiled, unit).linears
            for name, linear in found.items():
                assert isinstance(linear, TiledWeight)
                assert torch.equal(linear.weight, wanted[name].weight)
                assert (linear.activations is None) == (wanted[name].activations is None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
def test_threads_change_no_bit(dtype, turned):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(700, 320, generator=generator).to(dtype)
    inputs = torch.randn(3, 11, 320, generator=generator)
    linear = TiledLinear(StoredTiles(matrix.T.contiguous().T if turned else matrix))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(linear(inputs))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0].shape == (3, 11, 700)
    torch.testing.assert_close(found[0].double(), inputs.double() @ matrix.double().T, rtol=1e-5, atol=1e-4)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_bfloat16_is_rounded_as_torch_does():
    patterns = np.random.default_rng(0).integers(0, 1 << 32, (64, 1024), np.uint64).astype(np.uint32)
    patterns[0, :6] = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF, 0x00008000]
    values = patterns.view(np.float32).copy()
    wanted = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    cpu.to_bfloat16(values)
    np.testing.assert_array_equal(values, wanted)


def test_what_is_held_is_what_is_stored(checkpoint, artifact):
    source = open_folder(checkpoint("scout"))
    assert stored_itemsize(source) == stored_itemsize(open_folder(artifact("int4-rtn"))) == 2
    assert stored_itemsize(open_folder(checkpoint("scout", dtype="float32"))) == 4
    text = source.config.text
    whole, tiled = (Computing(text, "cpu", 4, 80, 160, tiles=tiles) for tiles in (0, 2))
    assert tiled.mlp == whole.mlp // 2
    model = stream_model(checkpoint("scout"), tiled=True)
    for unit in layer_units(source.config, 0)[1:]:
        linears = load_unit(model.weights, unit).linears.values()
        assert all(isinstance(linear, TiledWeight) for linear in linears)
    model.weights.close_files()
