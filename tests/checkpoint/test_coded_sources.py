"""FP8 releases and artifacts as sources: every matrix is the exact product of code and scale, however it is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fp8_sources import compressed_fp8, fbgemm_fp8
from upstream import weights

from l4pack.artifact.as_source import as_source, open_original
from l4pack.checkpoint.matrices import matrices_of
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.reader import Reader
from l4pack.errors import SourceError

KINDS = {
    "channel": {},
    "channel-f32": {"dtype": torch.float32},
    "block": {"strategy": "block"},
    "tensor": {"strategy": "tensor", "dtype": torch.float32},
    "dense": {"roles": (".experts.", "shared_expert", "feed_forward.gate", "feed_forward.up", "feed_forward.down")},
}


@pytest.fixture(scope="module", params=[*KINDS, "fbgemm", "fbgemm-linears"])
def pair(request, checkpoint, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp("fp8"), request.param
    source, plain = checkpoint("maverick"), folder / "plain"
    if kind.startswith("fbgemm"):
        linears = ("shared_expert", "q_proj") if kind.endswith("linears") else ()
        return fbgemm_fp8(source, folder / "fp8", linears=linears, plain=plain), plain
    return compressed_fp8(source, folder / "fp8", plain=plain, **KINDS[kind]), plain


def test_values_are_the_products(pair):
    fp8, plain = open_original(str(pair[0])), open_source(str(pair[1]))
    wanted = weights(pair[1])
    with Reader(fp8.entries, fp8.store.path) as reader:
        assert fp8.entries.keys() == wanted.keys()
        for name, tensor in wanted.items():
            got = reader.tensor(name)
            assert np.array_equal(got.view(np.uint8), tensor.contiguous().view(torch.uint8).numpy()), name
            place, size = got.nbytes // 3, min(1001, got.nbytes // 2)
            assert np.array_equal(reader.span(name, place, size), got.reshape(-1).view(np.uint8)[place : place + size])
    assert "FP8" in fp8.dequantized
    assert fp8.config.raw == plain.config.raw
    assert fp8.weight_bytes == sum(tensor.nbytes for tensor in weights(pair[0]).values())


def test_rows_are_the_matrix_however_cut(pair):
    fp8 = open_original(str(pair[0]))
    with Reader(fp8.entries, fp8.store.path) as reader:
        source = matrices_of(fp8, reader)
        for linear in [linear for linear in fp8.layout.linears if linear.expert == 3]:
            whole = source.slab([linear]).blocks()[0].out_in
            parts = [source.slab([linear], slice(at, at + 100)).blocks()[0].out_in for at in (0, 100)]
            assert np.array_equal(np.concatenate(parts), whole)


def test_a_plain_checkpoint_is_left_as_it_is(checkpoint):
    opened = open_source(str(checkpoint("scout")))
    assert as_source(opened) is opened


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "made_up"])
def test_other_methods_are_named(method, checkpoint, tmp_path):
    import json

    out = compressed_fp8(checkpoint("scout"), tmp_path / "fp8")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"is quantized already, by (GPTQ|AWQ|bitsandbytes|transformers'|'made_up')"):
        open_original(str(out))
