"""Damaged and hostile quantized sources: one line, a hint, exit code 4, whatever asks for them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from fp8_sources import compressed_fp8, fbgemm_fp8
from safetensors.torch import load_file, save_file

LAYER = "language_model.model.layers.1.feed_forward.experts"
GATE, FUSED = f"{LAYER}.1.gate_proj", f"{LAYER}.gate_up_proj"


@pytest.fixture(scope="module")
def sources(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return {
        "ct": compressed_fp8(checkpoint("maverick"), folder / "ct"),
        "fbgemm": fbgemm_fp8(checkpoint("maverick"), folder / "fbgemm"),
    }


def scale(value):
    def change(state, name):
        state[name].view(-1)[3] = value

    return change


def drop(state, name):
    del state[name]


def reshape(state, name):
    state[name] = state[name].reshape(1, -1) if state[name].ndim == 2 else state[name].reshape(-1)


def shorten(state, name):
    state[name] = state[name][:-1].clone()


def retype(state, name):
    state[name] = state[name].float().to(torch.int32)


def widen(state, name):
    state[name] = state[name].to(torch.bfloat16)


def nan_code(state, name):
    state[name].view(torch.uint8).view(-1)[7] = 0x7F


VALUES = {"nan": (scale(float("nan")), "NaN or infinite"), "inf": (scale(float("inf")), "NaN or infinite"),
          "zero": (scale(0.0), "zero or negative"), "negative": (scale(-1.0), "zero or negative")}  # fmt: skip
CASES = [
    *(("ct", f"{GATE}.weight_scale", *VALUES[kind]) for kind in VALUES),
    *(("fbgemm", f"{FUSED}_scale", *VALUES[kind]) for kind in ("nan", "zero")),
    ("ct", f"{GATE}.weight", nan_code, "infinite"),
    ("ct", f"{GATE}.weight_scale", drop, "has no weight_scale"),
    ("ct", f"{GATE}.weight_scale", reshape, "has shape [1, 128], its scheme makes it [128, 1]"),
    ("ct", f"{GATE}.weight_scale", shorten, "has shape"),
    ("ct", f"{GATE}.weight_scale", retype, "is I32, should be"),
    ("ct", f"{GATE}.weight", widen, "is BF16, should be F8_E4M3"),
    ("fbgemm", f"{FUSED}_scale", drop, "is F8_E4M3; l4pack reads"),
    ("fbgemm", f"{FUSED}_scale", shorten, "has shape"),
    ("fbgemm", f"{FUSED}_scale", retype, "is I32, should be"),
]


@pytest.mark.parametrize(("kind", "name", "change", "told"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_source_is_refused(kind, name, change, told, sources, tmp_path, l4pack):
    folder = tmp_path / "source"
    shutil.copytree(sources[kind], folder)
    state = load_file(folder / "model.safetensors")
    change(state, name)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for recipe in ("int4-rtn", "fp8") if "scale" in told or change is nan_code else ("int4-rtn",):
        ended = l4pack("quantize", folder, "--recipe", recipe, "--out", tmp_path / recipe)
        assert ended.code == 4, ended.err
        assert told in " ".join(ended.err.split())
        assert "hint" in ended.err.lower() or "→" in ended.err
        assert not (tmp_path / recipe).exists()


def test_artifacts_are_sources_where_that_is_asked_for(artifact, tmp_path, l4pack):
    made = artifact("fp8", "scout")
    refused = l4pack("quantize", made, "--recipe", "int4-rtn", "--out", tmp_path / "out")
    assert refused.code == 4
    assert "--allow-requantize" in refused.err
    asked = ("--recipe", "int4-rtn", "--out", tmp_path / "out", "--allow-requantize")
    assert l4pack("quantize", made, *asked).code == 0
    source = json.loads((tmp_path / "out/l4pack-manifest.json").read_text())["source"]
    assert source["dequantized_from"].startswith("FP8")
    assert l4pack("verify", tmp_path / "out", "--against", made).code == 0


def test_an_artifact_is_no_original_of_what_was_not_made_from_it(artifact, l4pack):
    ended = l4pack("verify", artifact("int4-rtn", "scout"), "--against", artifact("fp8", "scout"))
    assert ended.code == 2
    assert "not an original" in ended.err
