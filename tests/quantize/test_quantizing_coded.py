"""Artifacts of FP8 releases and of other artifacts: the numbers of their sources, and FP8 that is not rounded twice."""

from __future__ import annotations

import json

import pytest
import torch
from fp8_sources import compressed_fp8, fbgemm_fp8
from upstream import decompressed, weights


def tensors(folder):
    return json.loads((folder / "l4pack-manifest.json").read_text())["tensors"]


INT4 = """
name: exact
title: int4 with bfloat16 scales
schemes: {int4: {format: pack-quantized, num_bits: 4, strategy: group, group_size: 32, scale_dtype: bfloat16}}
rules:
  - {roles: [routed_expert, shared_expert, dense_mlp], scheme: int4}
  - {roles: all, scheme: keep}
"""


@pytest.fixture(scope="module", params=["channel", "fbgemm"])
def pair(request, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    make = fbgemm_fp8 if request.param == "fbgemm" else compressed_fp8
    return make(checkpoint("maverick"), folder / "fp8", plain=folder / "plain"), folder / "plain"


def test_int4_of_fp8_is_int4_of_its_products(pair, tmp_path, l4pack):
    recipe = tmp_path / "exact.yaml"
    recipe.write_text(INT4)
    for source, name in zip(pair, ("coded", "plain"), strict=True):
        planned = json.loads(l4pack("plan", source, "--recipe", recipe, "--json").out)
        assert l4pack("quantize", source, "--recipe", recipe, "--out", tmp_path / name).code == 0
        written = sum(path.stat().st_size for path in (tmp_path / name).rglob("*"))
        assert planned["artifact_bytes"] == written
    assert tensors(tmp_path / "coded") == tensors(tmp_path / "plain")
    source = json.loads((tmp_path / "coded/l4pack-manifest.json").read_text())["source"]
    assert source["dequantized_from"] == "FP8 (one scale an output channel)"
    assert l4pack("verify", tmp_path / "coded", "--against", pair[0]).code == 0


def test_fp8_keeps_the_codes_of_the_source(pair, tmp_path, l4pack):
    out = tmp_path / "fp8"
    assert l4pack("quantize", pair[0], "--recipe", "fp8", "--out", out).code == 0
    mine, theirs = weights(out), weights(pair[0])
    dense = decompressed(out, exact=True)
    products = weights(pair[1])
    experts = [name for name in dense if ".experts." in name]
    assert experts
    for name in experts:
        if f"{name}.weight" in theirs:
            for suffix in ("weight", "weight_scale"):
                assert torch.equal(
                    mine[f"{name}.{suffix}"].view(torch.uint8), theirs[f"{name}.{suffix}"].view(torch.uint8)
                )
        else:
            prefix, expert, projection = name.rsplit(".", 2)
            fused = products[f"{prefix}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][int(expert)].T
            half = {"gate_proj": slice(0, 128), "up_proj": slice(128, 256)}.get(projection, slice(None))
            assert torch.equal(dense[name], fused[half])
    assert l4pack("verify", out, "--against", pair[0], "--json").code == 0
    file = out / "model.safetensors"
    entry = next(e for n, e in _header(file).items() if ".experts.2.up_proj.weight" in n and e["dtype"] == "F8_E4M3")
    with file.open("r+b") as stream:
        stream.seek(8 + _length(file) + entry["data_offsets"][0])
        stream.write(bytes(64))
    assert l4pack("verify", out, "--against", pair[0]).code == 1


def _length(file):
    return int.from_bytes(file.read_bytes()[:8], "little")


def _header(file):
    return {n: e for n, e in json.loads(file.read_bytes()[8 : 8 + _length(file)]).items() if n != "__metadata__"}
