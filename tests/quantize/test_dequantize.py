"""Artifacts as checkpoints again: transformers loads them, and each weight is compressed-tensors' own."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import file_digests
from fp8_sources import compressed_fp8, fbgemm_fp8
from models import unfuse
from upstream import decompressed, load, weights

from l4pack.dequantize import run as module


def check_against_upstream(artifact, out):
    """Every matrix is the decompressor's, rounded once; everything else keeps its bytes."""
    found, dense, held = unfuse(weights(out)), decompressed(artifact, exact=True), weights(artifact)
    assert dense
    for name, tensor in found.items():
        matrix = name.removesuffix(".weight")
        wanted = dense[matrix].to(torch.bfloat16) if matrix in dense else held[name]
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted), name
    assert set(dense) <= {name.removesuffix(".weight") for name in found}


@pytest.mark.parametrize(
    ("recipe", "kind"), [("int4-rtn", "maverick"), ("fp8-block", "scout"), ("nvfp4", "scout"), ("mxfp4", "scout")]
)
def test_weights_are_those_of_the_decompressor(recipe, kind, artifact, tmp_path, l4pack):
    made, out = artifact(recipe, kind), tmp_path / "out"
    planned = json.loads(l4pack("dequantize", made, "--out", out, "--dry-run", "--json").out)
    assert not out.exists()
    ended = l4pack("dequantize", made, "--out", out, "--json")
    assert ended.code == 0, ended.err
    done = json.loads(ended.out)
    assert planned["artifact_bytes"] == done["artifact_bytes"] == sum(path.stat().st_size for path in out.rglob("*"))
    assert not done["already_done"]
    check_against_upstream(made, out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    load(out, kind)
    assert json.loads(l4pack("dequantize", made, "--out", out, "--json").out)["already_done"]


@pytest.mark.parametrize("make", [compressed_fp8, fbgemm_fp8])
def test_a_release_is_its_products_rounded_once(make, checkpoint, tmp_path, l4pack):
    make(checkpoint("scout"), tmp_path / "fp8", plain=tmp_path / "plain")
    assert l4pack("dequantize", tmp_path / "fp8", "--out", tmp_path / "out").code == 0
    found, wanted = unfuse(weights(tmp_path / "out")), unfuse(weights(tmp_path / "plain"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name].to(torch.bfloat16)) for name, tensor in found.items())


def test_a_stopped_run_goes_on_to_the_same_bytes(artifact, tmp_path, l4pack, monkeypatch):
    made = artifact("int4-rtn", "maverick")
    assert l4pack("dequantize", made, "--out", tmp_path / "whole", "--shard-size", "300KB").code == 0
    whole, left, fuse = file_digests(tmp_path / "whole"), [5], module._fuse

    def dies(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "the disk is gone")
        fuse(*arguments)

    monkeypatch.setattr(module, "_fuse", dies)
    again = ("dequantize", made, "--out", tmp_path / "out", "--shard-size", "300KB")
    assert l4pack(*again).code == 1
    assert not (tmp_path / "out").exists()
    left[0] = 10_000
    assert l4pack(*again).code == 0
    assert 10_000 - left[0] < 2 * 2 * 8  # expert slices of two layers
    assert file_digests(tmp_path / "out") == whole
    assert not (tmp_path / "out.partial").exists()


def test_what_is_not_quantized_is_not_dequantized(checkpoint, tmp_path, l4pack):
    ended = l4pack("dequantize", checkpoint("scout"), "--out", tmp_path / "out")
    assert ended.code == 2
    assert "is not quantized" in ended.err
