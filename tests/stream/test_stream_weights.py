"""Artifacts of any maker are read as compressed-tensors decompresses them; inputs are rounded as runtimes round them."""

from __future__ import annotations

import json
import math

import numpy as np
import oracle
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from models import unfuse
from safetensors.torch import load_file, save_file

from l4pack.checkpoint.source import open_folder
from l4pack.errors import L4packError
from l4pack.quant.grid import E2M1, E4M3, INT8
from l4pack.quant.scheme import Scheme
from l4pack.stream.activations import RoundedInputs
from l4pack.stream.weights import Weights

CPU = torch.device("cpu")
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
MXFP4 = {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
NVFP4 = {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
TOKEN8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
CASES = {
    "int4": ("pack-quantized", INT4, None),
    "int4-asymmetric": ("pack-quantized", {**INT4, "symmetric": False}, None),
    "int4-channel": ("pack-quantized", {**INT4, "strategy": "channel", "group_size": None}, None),
    "int8-packed": ("pack-quantized", {**INT4, "num_bits": 8}, None),
    "fp8": ("float-quantized", FP8, TOKEN8),
    "fp8-block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [64, 32]}, None),
    "fp8-tensor": ("float-quantized", {**FP8, "strategy": "tensor"}, None),
    "mxfp4": ("mxfp4-pack-quantized", MXFP4, None),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4, None),
    "nvfp4-w4a4": ("nvfp4-pack-quantized", NVFP4, {**NVFP4, "dynamic": "local"}),
    "int8": ("int-quantized", {**FP8, "type": "int"}, {**TOKEN8, "type": "int"}),
}  # fmt: skip


def write_foreign(source, folder, form, weights, inputs, extra=None):
    """An artifact by compressed-tensors' own compressor: every MLP matrix quantized, attention kept."""
    folder.mkdir()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights),
                                input_activations=QuantizationArgs(**inputs) if inputs else None, format=form)  # fmt: skip
    state, expected = {}, {}
    for name, tensor in unfuse(load_file(source / "model.safetensors")).items():
        module = name.removesuffix(".weight")
        if "feed_forward" not in name or "router" in name:
            state[name] = tensor
            continue
        compressed = {"weight": tensor, **_qparams(tensor, scheme.weights)}
        compressed = BaseCompressor.get_value_from_registry(form).compress(compressed, scheme)
        for suffix, value in compressed.items():
            state[f"{module}.{suffix}"] = value.contiguous()
        wide = {key: value.float() if value.dtype is torch.bfloat16 else value for key, value in compressed.items()}
        expected[module] = BaseCompressor.get_value_from_registry(form).decompress(wide, scheme)["weight"]
        state |= {f"{module}.{suffix}": value.clone() for suffix, value in (extra or {}).items()}
    save_file(state, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    ignore = ["re:.*self_attn.*", "re:.*router", "re:.*lm_head"]
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": form, "ignore": ignore,
                                     "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def _qparams(weight, args):
    out_features, in_features = weight.shape
    rows, columns = {"group": (1, args.group_size), "tensor_group": (1, args.group_size), "channel": (1, in_features), "tensor": (out_features, in_features),
                     "block": tuple(args.block_structure or (1, 1))}[str(args.strategy)]  # fmt: skip
    tiles = weight.reshape(out_features // rows, rows, in_features // columns, columns)
    low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    if args.strategy == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    over = generate_gparam(weight.amin(), weight.amax()) if args.strategy == "tensor_group" else None
    scale, zero_point = calculate_qparams(low, high, args, global_scale=over)
    globally = {} if over is None else {"weight_global_scale": over}
    return {"weight_scale": scale, "weight_zero_point": zero_point, **globally}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_compressed_tensors(checkpoint, tmp_path, case):
    form, args, inputs = CASES[case]
    extra = {"input_global_scale": torch.tensor([300.0])} if case == "nvfp4-w4a4" else None
    expected = write_foreign(checkpoint("text"), tmp_path / "made", form, args, inputs, extra)
    with Weights(open_folder(tmp_path / "made"), CPU, torch.float32) as weights:
        found = weights.linears(expected)
    for module, linear in found.items():
        wanted = expected[module].float() if inputs else expected[module].to(torch.bfloat16).float()
        weight = linear.weight.bfloat16().float() if args is NVFP4 else linear.weight  # as compressed-tensors rounds it
        assert torch.equal(weight, wanted), module
        assert (linear.activations is not None) == (inputs is not None)


def test_bytes_of_matrices(checkpoint, tmp_path):
    write_foreign(checkpoint("text"), tmp_path / "made", *CASES["int4"])
    module = "model.layers.0.feed_forward.experts.1.gate_proj"
    with Weights(open_folder(tmp_path / "made"), CPU, torch.float32) as weights:
        assert weights.nbytes([module]) == 128 * 128 // 2 + 128 * 4 * 2 + 16
    with Weights(open_folder(checkpoint("text")), CPU, torch.float32) as weights:
        assert weights.nbytes([module]) == 128 * 128 * 2


def _change(folder, name, change):
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(state, config, name)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def _narrow(state, config, name):
    state[f"{name}.weight_packed"] = state[f"{name}.weight_packed"][:, :-1].contiguous()


def _no_zero_point(state, config, name):
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False


def _ignored(state, config, name):
    config["quantization_config"]["ignore"].append("re:.*feed_forward.*")


def _other_method(state, config, name):
    config["quantization_config"]["quant_method"] = "gptq"


def _nonsense(state, config, name):
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = "many"


def _wrong_scale(state, config, name):
    state[f"{name}.weight_scale"] = state[f"{name}.weight_scale"][:-1].contiguous()


def _unknown_inputs(state, config, name):
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {**TOKEN8, "num_bits": 4, "type": "int"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_narrow, "values have shape"), (_wrong_scale, "weight_scale have shape"),
        (_no_zero_point, "asymmetric but has no weight_zero_point"), (_ignored, "gives it no scheme"),
        (_other_method, "quant_method is 'gptq'"), (_nonsense, "quantization_config"),
        (_unknown_inputs, "4-bit int activations by token are not simulated"),
    ],
)  # fmt: skip
def test_artifacts_that_contradict_themselves(checkpoint, tmp_path, change, message):
    write_foreign(checkpoint("text"), tmp_path / "made", *CASES["int4"])
    module = "model.layers.0.feed_forward.experts.1.gate_proj"
    _change(tmp_path / "made", module, change)
    with (
        pytest.raises(L4packError, match=message) as caught,
        Weights(open_folder(tmp_path / "made"), CPU, torch.float32) as weights,
    ):
        weights.linears([module])
    assert caught.value.hint


# Rounded inputs, number by number


def _fp8(value, scale):
    level = oracle.E4M3[oracle.nearest(abs(value) / scale, oracle.E4M3)]
    return math.copysign(level * scale, value)


@pytest.mark.parametrize(("strategy", "group"), [("token", None), ("group", 16), ("tensor", None)])
def test_fp8_inputs_number_by_number(strategy, group):
    values = (
        torch.randn(5, 32, generator=torch.Generator().manual_seed(6)) * torch.tensor([1, 1e-6, 100, 0, 3.0])[:, None]
    )
    found = RoundedInputs(E4M3, strategy, group)(values)
    for row, numbers in enumerate(values.tolist()):
        for column, value in enumerate(numbers):
            peers = {"token": numbers, "tensor": values.flatten().tolist(),
                     "group": numbers[column // 16 * 16 :][:16]}[strategy]  # fmt: skip
            amax = max(map(abs, peers))
            scale = max(amax, 1e-10) / 448 if group else max(amax / 448, 1 / (448 * 512))
            assert found[row, column].item() == pytest.approx(_fp8(value, scale), rel=1e-5, abs=1e-30)


def test_int8_inputs_number_by_number():
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    found = RoundedInputs(INT8, "token")(values)
    for row, numbers in enumerate(values.tolist()):
        scale = float(np.float32(max(map(abs, numbers))) / np.float32(127))
        for column, value in enumerate(numbers):
            assert found[row, column].item() == pytest.approx(round(value / scale) * scale, rel=1e-5)


@pytest.mark.parametrize("over", [500.0, 0.37])
def test_fp4_inputs_number_by_number_and_as_compressed_tensors_rounds_them(over):
    values = (
        torch.randn(5, 32, generator=torch.Generator().manual_seed(6)) * torch.tensor([1, 1e-3, 3, 0, 3.0])[:, None]
    )
    found = RoundedInputs(E2M1, "tensor_group", 16, torch.tensor(over))(values)
    scheme = Scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    wanted = oracle.fp4(values.numpy(), scheme, float(np.float32(over))).dequantized
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    args = QuantizationArgs(**NVFP4, dynamic="local")
    globally = torch.tensor([over])
    scale, zero_point = compute_dynamic_scales_and_zp(values, args, torch.nn.Module(), global_scale=globally)
    theirs = fake_quantize(values, scale, zero_point, args, global_scale=globally)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=0)


def test_a_global_scale_of_inputs_is_read_from_the_artifact(checkpoint, tmp_path):
    form, args, inputs = CASES["nvfp4-w4a4"]
    write_foreign(
        checkpoint("text"), tmp_path / "made", form, args, inputs, {"input_global_scale": torch.tensor([4.0])}
    )
    module = "model.layers.0.feed_forward.experts.1.gate_proj"
    with Weights(open_folder(tmp_path / "made"), CPU, torch.float32) as weights:
        rounded = weights.linears([module])[module].activations
    assert rounded is not None
    assert rounded(torch.full((1, 16), 1e6)).max().item() == 448 * 6 / 4


def test_static_inputs_saturate():
    found = RoundedInputs(E4M3, "tensor", scale=torch.tensor(0.01))(torch.tensor([[0.1, 100.0, -100.0]]))
    assert found.tolist()[0] == pytest.approx([0.1, 4.48, -4.48], rel=0.07)


def test_a_static_scale_is_read_from_the_artifact(checkpoint, tmp_path):
    static = {**TOKEN8, "strategy": "tensor", "dynamic": False}
    write_foreign(checkpoint("text"), tmp_path / "made", "float-quantized", {**FP8, "strategy": "tensor"}, static,
                  extra={"input_scale": torch.tensor([0.25])})  # fmt: skip
    module = "model.layers.0.feed_forward.experts.1.gate_proj"
    with Weights(open_folder(tmp_path / "made"), CPU, torch.float32) as weights:
        rounded = weights.linears([module])[module].activations
    assert rounded is not None
    assert rounded(torch.tensor([[1000.0]])).item() == 448 * 0.25
