"""vLLM's own loader reads what we write exactly, and the tool that runs it refuses what vLLM would misread.

vLLM lives in an interpreter of its own (tools/vllm/make_vllm_venv.sh); where there is none, these tests are skipped by name.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mixes import draw_mix, matrix_layers, rounding
from vllm_artifacts import (
    GROUP_FP8,
    TENSOR_FP8,
    Tensors,
    edit_tensors,
    fp8_scheme,
    fuse,
    int_scheme,
    model_config,
    write_artifact,
    write_dequantized,
    write_source,
)

from l4pack.checkpoint.open import open_source
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan

ROOT = Path(__file__).resolve().parents[2]
LOAD = ROOT / "tools" / "vllm" / "vllm_load.py"
KV_BLOCKS = ROOT / "tools" / "vllm" / "vllm_kv_blocks.py"
BATCH = Path(__file__).parents[1] / "support" / "vllm_batch.py"

MODELS = {
    "scout": model_config(),
    "scout-deep": model_config(layers=4),
    "maverick": model_config(interleave=2, layers=4, head_dim=128),
    "text": model_config(multimodal=False),
}
EXPERTS, SHARED, MLP, EVERYTHING = r"\.experts\.", "shared_expert", "feed_forward", ""
GOOD = {
    "scout-int4": ("scout", {MLP: int_scheme()}),
    "scout-int4-attention": ("scout", {EVERYTHING: int_scheme()}),
    "scout-int4-channel": ("scout", {MLP: int_scheme(strategy="channel", group_size=None)}),
    "scout-int4-asymmetric": ("scout", {MLP: int_scheme(symmetric=False)}),
    "scout-int8": ("scout", {MLP: int_scheme(8)}),
    "scout-int8-channel": ("scout", {MLP: int_scheme(8, "channel", None)}),
    "scout-fp8": ("scout", {EVERYTHING: fp8_scheme()}),
    "scout-fp8-static": ("scout", {EVERYTHING: fp8_scheme("tensor", TENSOR_FP8)}),
    "scout-fp8-block": ("scout", {MLP: fp8_scheme("block", GROUP_FP8)}),
    "scout-int4-int8": ("scout", {EXPERTS: int_scheme(), SHARED: int_scheme(8)}),
    "scout-int4-fp8": ("scout", {EXPERTS: int_scheme(), SHARED: fp8_scheme()}),
    "scout-experts-only": ("scout", {EXPERTS: int_scheme()}),
    "maverick-int4": ("maverick", {MLP: int_scheme()}),
    "maverick-fp8": ("maverick", {EVERYTHING: fp8_scheme()}),
    "maverick-int4-fp8": ("maverick", {EXPERTS: int_scheme(), SHARED: fp8_scheme()}),
    "maverick-one-layer": ("maverick", {r"layers\.1\.feed_forward": fp8_scheme()}),
    "text-int4": ("text", {MLP: int_scheme()}),
    "text-fp8": ("text", {EVERYTHING: fp8_scheme()}),
}
FP4 = {
    "scout-nvfp4": ("scout", "nvfp4"),
    "maverick-nvfp4": ("maverick", "nvfp4"),
    "maverick-mxfp4": ("maverick", "mxfp4"),
    "text-mxfp4": ("text", "mxfp4"),
}
SOLVED = "nvfp4-w4a4"  # its global scales of inputs come from a calibration
SOLVED_FP8 = "fp8-gptq"
MIXES = [(model, seed) for model in ("scout-deep", "maverick", "text") for seed in range(4)]


def without(suffix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(suffix)}


def flat_channel_scales(tensors: Tensors) -> Tensors:
    return {n: t.squeeze(-1) if n.endswith("weight_scale") else t for n, t in tensors.items()}


def fused_packed_experts(tensors: Tensors) -> Tensors:
    packed = {n.replace("weight_packed", "weight"): t for n, t in tensors.items() if n.endswith("weight_packed")}
    experts = {n: t for n, t in fuse(packed).items() if ".experts." in n}
    plain = {n: t for n, t in tensors.items() if ".experts." not in n}
    return plain | {f"{name}.weight_packed": tensor for name, tensor in experts.items()}


def one_value_changed(tensors: Tensors) -> Tensors:
    name = "language_model.model.layers.1.feed_forward.experts.3.down_proj.weight_packed"
    changed = tensors[name].clone()
    changed[7, 11] ^= 1
    return tensors | {name: changed}


def swapped_gate_and_up(tensors: Tensors) -> Tensors:
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return {
        next((n.replace(old, new) for old, new in swap.items() if f".experts.2.{old}." in n), n): t
        for n, t in tensors.items()
    }


def with_unknown_tensor(tensors: Tensors) -> Tensors:
    return tensors | {"language_model.model.layers.0.self_attn.q_proj.bias": torch.zeros(256)}


def unchanged(tensors: Tensors) -> Tensors:
    return tensors


INT4, FP8 = {MLP: int_scheme()}, {MLP: fp8_scheme()}
BAD_FP4 = {
    "nvfp4-without-input-scale": (SOLVED, without("experts.2.up_proj.input_global_scale"), "w13_input_global_scale"),
    "nvfp4-without-global-scale": (
        "scout-nvfp4",
        without("experts.1.down_proj.weight_global_scale"),
        "w2_weight_global",
    ),
    "mxfp4-without-scale": ("text-mxfp4", without("experts.3.gate_proj.weight_scale"), "w13_weight_scale"),
    "mxfp4-without-codes": ("text-mxfp4", without("shared_expert.down_proj.weight_packed"), "down_proj.weight_packed"),
}
BAD = {
    "asymmetric-attention": ({EVERYTHING: int_scheme(symmetric=False)}, unchanged, "differs", "q_proj"),
    "block-attention": ({EVERYTHING: fp8_scheme("block", GROUP_FP8)}, unchanged, "load", "k_proj"),
    "fp8-weight-only-experts": ({MLP: fp8_scheme("channel", None)}, unchanged, "build", "config.json"),
    "fused-packed-experts": (INT4, fused_packed_experts, "load", "experts"),
    "flat-fp8-scale": (FP8, flat_channel_scales, "load", "weight_scale"),
    "no-expert-scale": (INT4, without("experts.1.up_proj.weight_scale"), "unwritten", "w13_weight_scale"),
    "no-shared-scale": (FP8, without("shared_expert.down_proj.weight_scale"), "unwritten", "down_proj.weight_scale"),
    "no-packed-expert": (INT4, without("experts.0.down_proj.weight_packed"), "unwritten", "w2_weight_packed"),
    "no-weight-shape": (INT4, without("weight_shape"), "unwritten", "weight_shape"),
    "no-norm": (INT4, without("language_model.model.layers.0.input_layernorm.weight"), "unwritten", "input_layernorm"),
    "group-no-kernel-has": ({MLP: int_scheme(group_size=16)}, unchanged, "build", "config.json"),
    "unknown-tensor": (INT4, with_unknown_tensor, "load", "q_proj.bias"),
    "swapped-gate-and-up": (INT4, swapped_gate_and_up, "differs", "experts.2."),
}


def run(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def vllm_python() -> str:
    default = ROOT / ".venv-vllm" / "bin" / "python"
    named = os.environ.get("L4PACK_VLLM_PYTHON")
    if named is None and not default.is_file():
        pytest.skip("optional: needs vLLM's sources in .venv-vllm, make it with tools/vllm/make_vllm_venv.sh")
    return named or str(default)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: on a busy machine, threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: write_source(root / name, config) for name, config in MODELS.items()}


@pytest.fixture(scope="module")
def artifacts(
    sources: dict[str, Path], artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    write_fp4(sources, artifact(SOLVED, "maverick"), root)
    shutil.copytree(artifact(SOLVED_FP8, "maverick"), root / SOLVED_FP8)
    write_dequantized(root / SOLVED_FP8, root / f"{SOLVED_FP8}-values")
    for name, (model, schemes) in GOOD.items():
        write_artifact(sources[model], root / name, schemes)
        write_dequantized(root / name, root / f"{name}-values")
    for name, (schemes, change, _, _) in BAD.items():
        write_artifact(sources["scout"], root / name, schemes)
        edit_tensors(root / name, change)
    for model, seed in MIXES:
        source = open_source(str(sources[model]))
        made = run_plan(
            make_plan(source, draw_mix(seed, matrix_layers(source.layout))), root / f"{model}-mix-{seed}"
        ).out
        write_dequantized(made, root / f"{made.name}-values")
    write_artifact(sources["scout"], root / "one-value-changed", INT4)
    edit_tensors(root / "one-value-changed", one_value_changed)
    return root


def write_fp4(sources: dict[str, Path], solved: Path, root: Path) -> None:
    """Artifacts of four-bit floats as l4pack makes them, their values, and damaged ones."""
    shutil.copytree(solved, root / SOLVED)
    for name, (model, recipe) in FP4.items():
        run_plan(make_plan(open_source(str(sources[model])), rounding(recipe)), root / name)
    for name in (*FP4, SOLVED):
        write_dequantized(root / name, root / f"{name}-values")
    for name, (good, change, _) in BAD_FP4.items():
        shutil.copytree(root / good, root / name)
        edit_tensors(root / name, change)


@pytest.fixture(scope="module")
def answers(vllm_python: str, sources: dict[str, Path], artifacts: Path) -> dict[str, Any]:
    jobs: dict[str, dict[str, Any]] = {}
    for name, (model, _) in GOOD.items():
        jobs[name] = {"artifact": artifacts / name, "against": sources[model], "exact": False}
        jobs[f"{name}-values"] = {"artifact": artifacts / name, "against": artifacts / f"{name}-values", "exact": True}
    for name in BAD:
        jobs[name] = {"artifact": artifacts / name, "against": sources["scout"], "exact": False}
    for name in (*FP4, SOLVED, SOLVED_FP8):
        jobs[name] = {"artifact": artifacts / name, "against": artifacts / f"{name}-values", "exact": True}
    for name in BAD_FP4:
        jobs[name] = {"artifact": artifacts / name, "against": None, "exact": False}
    for model, seed in MIXES:
        made = artifacts / f"{model}-mix-{seed}"
        jobs[made.name] = {"artifact": made, "against": artifacts / f"{made.name}-values", "exact": True}
    values = artifacts / "scout-int4-values"
    jobs["one-value-changed"] = {"artifact": artifacts / "one-value-changed", "against": values, "exact": True}
    request = {
        "command_line": [str(artifacts / "scout-int4"), "--against", str(sources["scout"])],
        "checks": list(jobs.values()),
        "specs_of": sources["maverick"],
    }
    done = run(vllm_python, str(BATCH), stdin=json.dumps(request, default=str))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer | {"reports": dict(zip(jobs, answer["reports"], strict=True))}


@pytest.mark.parametrize("name", GOOD)
def test_loads_to_the_very_values_the_artifact_stands_for(answers: dict[str, Any], name: str) -> None:
    report = answers["reports"][f"{name}-values"]
    assert report["ok"], report["findings"]
    assert all(entry["exact"] for entry in report["classes"].values())
    text_only = GOOD[name][0] == "text"
    assert report["architecture"] == ("Llama4ForCausalLM" if text_only else "Llama4ForConditionalGeneration")
    kinds = set(report["classes"])
    assert {"self_attn.q_proj", "feed_forward.experts.gate_proj", "feed_forward.router", "lm_head"} <= kinds
    assert ("vision_model.layernorm_pre" in kinds) is not text_only


@pytest.mark.parametrize("name", [*FP4, SOLVED, SOLVED_FP8])
def test_floats_load_to_the_very_values(answers: dict[str, Any], name: str) -> None:
    report = answers["reports"][name]
    assert report["ok"], report["findings"]
    assert all(entry["exact"] for entry in report["classes"].values())
    bits = 8 if name == SOLVED_FP8 else 4
    assert {entry["num_bits"] for kind, entry in report["classes"].items() if "experts" in kind} == {bits}


@pytest.mark.parametrize("name", BAD_FP4)
def test_four_bit_floats_with_a_tensor_missing_are_refused(answers: dict[str, Any], name: str) -> None:
    findings = answers["reports"][name]["findings"]
    assert {finding["rule"] for finding in findings} == {"unwritten"}
    assert BAD_FP4[name][-1] in findings[0]["where"]


@pytest.mark.parametrize(("model", "seed"), MIXES)
def test_mixes_by_role_and_layer_load_to_the_very_values(answers: dict[str, Any], model: str, seed: int) -> None:
    report = answers["reports"][f"{model}-mix-{seed}"]
    assert report["ok"], report["findings"]
    assert all(entry["exact"] for entry in report["classes"].values())
    assert {entry["num_bits"] for entry in report["classes"].values()} - {None}


@pytest.mark.parametrize("name", GOOD)
def test_stays_near_the_original_and_keeps_the_rest_as_it_was(answers: dict[str, Any], name: str) -> None:
    report = answers["reports"][name]
    assert report["ok"], report["findings"]
    schemes = GOOD[name][1]
    bits = {entry["num_bits"] for entry in report["classes"].values()}
    assert bits - {None} == {scheme.weights.num_bits for scheme in schemes.values()}
    for entry in report["classes"].values():
        assert entry["exact"] is (entry["num_bits"] is None)
        # Normal weights, rounded: amax/7.5 steps of 128 or 256 values, amax/127.5 steps, or three mantissa bits.
        assert entry["max_rms_error"] < {None: 1e-9, 4: 0.14, 8: 0.03}[entry["num_bits"]]


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_vllm_would_misread(answers: dict[str, Any], name: str) -> None:
    report = answers["reports"][name]
    _, _, rule, where = BAD[name]
    assert not report["ok"]
    assert {finding["rule"] for finding in report["findings"]} == {rule}
    assert where in report["findings"][0]["where"]


def test_one_changed_bit_in_one_expert_is_found_by_name(answers: dict[str, Any]) -> None:
    findings = answers["reports"]["one-value-changed"]["findings"]
    assert [(f["rule"], f["where"]) for f in findings] == [
        ("differs", "language_model.model.layers.1.feed_forward.experts.3.down_proj.weight")
    ]


def test_planner_is_fed_what_the_real_layers_declare(answers: dict[str, Any]) -> None:
    assert answers["specs_agree"]


def test_command_line_says_ok_in_one_line_and_returns_0(answers: dict[str, Any]) -> None:
    assert answers["status"] == 0
    assert answers["printed"].count("\n") == 1
    assert answers["printed"].startswith("ok ")
    assert "filled 71 parameters from 133 tensors" in answers["printed"]


def test_command_line_names_the_missing_tensor_and_exits_1(vllm_python: str, artifacts: Path) -> None:
    done = run(vllm_python, str(LOAD), str(artifacts / "no-norm"), "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert [finding["where"] for finding in report["findings"]] == [
        "language_model.model.layers.0.input_layernorm.weight"
    ]


def test_planner_command_counts_blocks_as_the_formula_does(vllm_python: str, tmp_path: Path) -> None:
    config = model_config(layers=48, head_dim=128)
    config["text_config"] |= {
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 10_485_760,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--context", "131072", "--kv-dtype", "fp8", "--tp", "8", "--kv-memory", str(2**30), "--json"]
    done = run(vllm_python, str(KV_BLOCKS), str(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    page = 16 * 1 * (128 + 128)  # tokens x KV heads of one rank x (key + value) x one byte
    chunked = (8192 + 2 * 8192) // 16
    on, off = report["hybrid_on"], report["hybrid_off"]
    assert on["request_bytes"] == 12 * page * (131072 // 16 + 3 * chunked)
    assert off["request_bytes"] == 48 * page * (131072 // 16)
    assert [(group["kind"], group["layers"], group["blocks"]) for group in on["groups"]] == [
        *[("ChunkedLocalAttentionSpec", 12, chunked)] * 3,
        ("FullAttentionSpec", 12, 131072 // 16),
    ]
    assert on["num_blocks"] == 2**30 // (12 * page)
    assert on["max_concurrency"] == on["num_blocks"] / on["request_blocks"]
    assert off["fits"] is False
