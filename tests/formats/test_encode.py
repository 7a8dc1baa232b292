"""Encoding and decoding are inverse for every format, and compressed-tensors makes the same weights of the tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from l4pack.artifact.quantized import own_format
from l4pack.checkpoint.header import tensor_bytes
from l4pack.checkpoint.reader import NUMPY_TYPES
from l4pack.errors import L4packError
from l4pack.formats.configuration import Activations, read_inputs, read_scheme
from l4pack.formats.known import FORMATS, format_of
from l4pack.formats.weights import weights_of
from l4pack.quant.floats import widen
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import absmax, quantize_block
from l4pack.quant.scales import global_scale
from l4pack.quant.scheme import Scheme, Strategy

GROUPED = (Strategy.GROUP, Strategy.TENSOR_GROUP)
SCALES = ["source", "bfloat16", "float16"]
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@st.composite
def matrices(draw, form):
    """A scheme that the format takes, and a float32 matrix [out, in] that it divides."""
    accepts = form.accepts
    strategy = draw(st.sampled_from(accepts.strategies))
    scheme = Scheme(
        num_bits=draw(st.sampled_from(accepts.num_bits)),
        type=accepts.type,
        strategy=strategy,
        group_size=draw(st.sampled_from(accepts.group_sizes)) if strategy in GROUPED else None,
        block_structure=draw(st.sampled_from(accepts.block_structures)) if strategy is Strategy.BLOCK else None,
        symmetric=draw(st.sampled_from(accepts.symmetric)),
        **_scales(draw, accepts),
    )
    out_features, steps = draw(st.integers(1, 140)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return scheme, random.normal(
        0, 0.05, (out_features, steps * scheme.column_multiple() * (1 if scheme.grouped else 64))
    ).astype(np.float32)


def _scales(draw, accepts):
    if accepts.scale_dtype is not None:
        return {"scale_dtype": accepts.scale_dtype, "observer": "mse"}
    return {} if 4 in accepts.num_bits and accepts.type == "float" else {"scale_dtype": draw(st.sampled_from(SCALES))}


def quantized(weight, scheme, over=None):
    if scheme.globally_scaled:
        over = over or global_scale(absmax(weight, Layout.OUT_IN, "F32"))
        return quantize_block(weight, Layout.OUT_IN, "F32", scheme, global_scale=over)
    amax = absmax(weight, Layout.OUT_IN, "F32") if scheme.strategy is Strategy.TENSOR else None
    return quantize_block(weight, Layout.OUT_IN, "F32", scheme, amax=amax)


def same(ours, theirs):
    return (ours is None and theirs is None) or np.array_equal(ours, theirs)


@formats
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decoding_undoes_encoding(form, data):
    scheme, weight = data.draw(matrices(form))
    made = quantized(weight, scheme)
    arrays = form.encode(made, *weight.shape)
    stored = form.stored(scheme, *weight.shape, "F32")
    assert {tensor.suffix: (tensor.shape, NUMPY_TYPES[tensor.dtype]) for tensor in stored} == {
        suffix: (array.shape, array.dtype) for suffix, array in arrays.items()
    }
    assert sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in stored) == sum(a.nbytes for a in arrays.values())
    assert format_of({tensor.suffix: tensor.dtype for tensor in stored}) is form
    told = form.told_by({suffix: array.shape for suffix, array in arrays.items()}, *weight.shape)
    assert told is not None
    told = told.model_copy(update={"scale_dtype": scheme.scale_dtype})
    assert form.stored(told, *weight.shape, "F32") == stored
    back = form.decode(arrays, scheme, *weight.shape, "here")
    assert same(back.values, made.values)
    assert same(back.scale, made.scale)
    assert same(back.zero_point, made.zero_point)
    assert same(back.global_scale, made.global_scale)


@pytest.mark.parametrize("form", [form for form in FORMATS.values() if not form.exported], ids=lambda form: form.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_compressed_tensors_decompresses_to_the_same_weights(form, data):
    scheme, weight = data.draw(matrices(form))
    arrays = form.encode(quantized(weight, scheme), *weight.shape)
    group = form.configuration(scheme, Activations.NONE, ["Linear"])
    theirs = QuantizationScheme.model_validate(group)
    assert own_format(theirs, form.name) == (form, read_scheme(group["weights"]))
    state = {
        suffix: torch.from_numpy(widen(array) if suffix == "weight_scale" and not scheme.coded_scales else array)
        for suffix, array in arrays.items()
    }
    if scheme.scale_dtype == "float8_e4m3fn":
        state["weight_scale"] = state["weight_scale"].view(torch.float8_e4m3fn)
    if "weight" in state:
        state["weight"] = state["weight"].view(torch.float8_e4m3fn)
    found = BaseCompressor.get_value_from_registry(form.name).decompress(state, theirs)["weight"]
    np.testing.assert_array_equal(weights_of(arrays, form, scheme, *weight.shape, "here"), found.float().numpy())


@formats
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_slices_of_rows_lie_where_the_pieces_say(form, data):
    scheme, weight = data.draw(matrices(form).filter(lambda drawn: drawn[0].strategy is not Strategy.TENSOR))
    whole, rows = form.encode(quantized(weight, scheme), *weight.shape), form.rows_in_one(scheme)
    step = scheme.row_multiple() * data.draw(st.integers(1, 5))
    over = float(whole["weight_global_scale"][0]) if scheme.globally_scaled else None
    for start in range(0, len(weight), step):
        part = quantized(weight[start : start + step], scheme, over)
        for suffix, array in form.encode(part, *weight.shape).items():
            first = start // rows[suffix] if rows[suffix] else 0
            assert same(array, whole[suffix][first : first + len(array)])


@formats
def test_a_configuration_is_read_back(form):
    for strategy in form.accepts.strategies:
        sizes = {
            "group_size": form.accepts.group_sizes[0] if strategy in GROUPED else None,
            "block_structure": form.accepts.block_structures[0] if strategy is Strategy.BLOCK else None,
            **({} if form.accepts.scale_dtype is None else {"scale_dtype": form.accepts.scale_dtype}),
        }
        scheme = Scheme(num_bits=form.accepts.num_bits[0], type=form.accepts.type, strategy=strategy, **sizes)
        for activations in form.accepts.activations:
            group = form.configuration(scheme, activations, ["Linear"])
            assert read_scheme(group["weights"]) == scheme
            assert read_inputs(group["input_activations"]) == activations


@formats
def test_tensors_that_are_missing_or_of_another_shape(form):
    strategy = form.accepts.strategies[0]
    scheme = Scheme(
        num_bits=form.accepts.num_bits[-1],
        type=form.accepts.type,
        strategy=strategy,
        group_size=form.accepts.group_sizes[0] if strategy in GROUPED else None,
        symmetric=form.accepts.symmetric[-1],
    )
    arrays = form.encode(quantized(np.ones((64, 64), np.float32), scheme), 64, 64)
    for piece in form.pieces:
        if piece.holds not in ("values", "scale", "global_scale", "zero_point"):
            continue
        for change in ({}, {piece.suffix: arrays[piece.suffix][:-1]}):
            left = {suffix: array for suffix, array in arrays.items() if suffix != piece.suffix} | change
            with pytest.raises(L4packError, match="have shape" if change else f"has no {piece.suffix}"):
                form.decode(left, scheme, 64, 64, "here")
