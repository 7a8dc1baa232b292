"""Artifacts as checkpoints again: transformers loads them, and each weight is compressed-tensors' own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import file_digests
from fp8_sources import compressed_fp8, fbgemm_fp8
from models import unfuse
from upstream import decompressed, load, weights


def check_against_upstream(artifact, out):
    """Every matrix is the decompressor's, rounded once; everything else keeps its bytes."""
    found, dense, held = unfuse(weights(out)), decompressed(artifact, exact=True), weights(artifact)
    assert dense
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        wanted = dense[module].to(torch.bfloat16) if module in dense else held[name]
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    assert set(dense) <= {name.removesuffix(".weight") for name in found}


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8-block", "nvfp4", "mxfp4"])
def test_weights_are_those_of_the_decompressor(recipe, artifact, tmp_path, l4pack):
    made, out = artifact(recipe, "maverick"), tmp_path / "out"
    planned = json.loads(l4pack("dequantize", made, "--out", out, "--dry-run", "--json").out)
    assert not out.exists()
    ended = l4pack("dequantize", made, "--out", out, "--json")
    assert ended.code == 0, ended.err
    done = json.loads(ended.out)
    assert planned["artifact_bytes"] == done["artifact_bytes"] == sum(path.stat().st_size for path in out.rglob("*"))
    assert done["peak_rss_bytes"] > 0 and not done["already_done"]
    check_against_upstream(made, out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    load(out, "maverick")
