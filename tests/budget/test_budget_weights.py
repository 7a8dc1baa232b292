"""Weight bytes: of the plan, of the file that is written, and of each GPU, against transformers' own parallel plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fnmatch import translate
from pathlib import Path

import pytest
from transformers import Llama4Config as TransformersConfig
from transformers import Llama4TextConfig, Llama4VisionConfig

from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load, resolve
from l4pack.budget.named import open_subject
from l4pack.budget.runtimes import load_runtime
from l4pack.budget.subject import Subject, from_config
from l4pack.budget.weights import stage_layers, weights_by_role
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.errors import SourceError, UsageError
from l4pack.model.config import KNOWN_MODELS, known_config
from l4pack.model.tensors import Role, catalogue
from l4pack.plan.plan import make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe, recipe_names

DEVICES = load_devices()


def per_gpu(subject: Subject, load: Load, runtime: str = "vllm", device: str = "8xh100") -> list[dict[Role, int]]:
    profile = load_runtime(runtime)
    return weights_by_role(subject, resolve(subject, find_host(device, DEVICES), profile, load), profile)


def fitting(model: str) -> list[str]:
    """Recipes whose rules match something in the model."""
    return [
        name
        for name in recipe_names()
        if (load_recipe(name).promise or None) is None or model in str(load_recipe(name).promise)
    ]


@pytest.mark.parametrize(
    ("model", "recipe"), [(model, recipe) for model in KNOWN_MODELS for recipe in fitting(model)], ids=str
)
def test_bytes_of_every_shipped_recipe_are_the_plans(model: str, recipe: str) -> None:
    planned = make_plan(open_source(model), load_recipe(recipe))
    assert open_subject(model, recipe).weight_bytes == planned.weight_bytes


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8", "fp8-block", "meta-int4"])
def test_bytes_are_those_that_quantizing_writes(recipe: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("maverick")
    out = run_plan(make_plan(open_folder(source), load_recipe(recipe)), tmp_path / "Llama-4-tiny").out
    written = open_subject(str(out))
    assert written.weight_bytes == sum(entry.nbytes for entry in open_folder(out).entries.values())
    assert written.weight_bytes == open_subject(str(source), recipe).weight_bytes
    assert per_gpu(written, Load(tp=2)) == per_gpu(open_subject(str(source), recipe), Load(tp=2))
    assert written.quantized


@pytest.mark.parametrize("model", KNOWN_MODELS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_splits_are_those_of_transformers_parallel_plan(model: str, tp: int) -> None:
    """Every matrix transformers splits is split, every tensor it keeps whole is whole; vLLM also splits vocabulary and fc1/fc2."""
    config = known_config(model)
    expected: dict[Role, int] = {}
    for spec in catalogue(config).tensors:
        share = 1 if not split_by_transformers(spec.name) and not split_by_vllm(spec.name) else tp
        expected[spec.role] = expected.get(spec.role, 0) + 2 * spec.numel // share
    assert per_gpu(from_config(model, config), Load(tp=tp)) == [expected]


def split_by_transformers(name: str) -> bool:
    plans = {
        "language_model.model.": Llama4TextConfig.base_model_tp_plan,
        "vision_model.": Llama4VisionConfig.base_model_tp_plan,
        "": TransformersConfig.base_model_tp_plan,
    }
    for prefix, plan in plans.items():
        rest = name.removeprefix(prefix)
        for pattern, style in (plan or {}).items():
            module = re.compile(translate(pattern.replace("layers.*", "layers.[0-9]*")))
            if name.startswith(prefix) and module.fullmatch(rest.removesuffix(".weight").removesuffix(".bias")):
                return not (style == "rowwise" and name.endswith(".bias"))
    return False


def split_by_vllm(name: str) -> bool:
    vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    inner = re.search(r"vision_model\.model\..*(fc1\.(weight|bias)|fc2\.weight|[qkv]_proj\.bias)$", name) is not None
    return vocabulary or inner or re.search(r"vision_model\.model\..*[qkvo]_proj\.weight$", name) is not None


@pytest.mark.parametrize("recipe", ["int4", "fp8", "fp8-block", "meta-int4", "meta-fp8"])
def test_what_vllm_holds_at_tp_1_is_the_file_with_scales_recast(recipe: str) -> None:
    subject = open_subject("llama-4-scout", recipe)
    recast = 0
    for tensor in subject.tensors:
        elements = 1
        for size in tensor.shape:
            elements *= size
        if tensor.name.endswith("weight_scale"):
            stored = {"BF16": 2, "F32": 4}[tensor.dtype]
            recast += elements * ((4 if "fp8" in recipe else 2) - stored)
    assert sum(per_gpu(subject, Load(tp=1))[0].values()) == subject.weight_bytes + recast


@pytest.mark.parametrize("recipe", ["int4", "fp8", "fp8-block"])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_nothing_is_lost_between_gpus_and_no_gpu_holds_more(recipe: str, tp: int) -> None:
    subject = open_subject("llama-4-scout", recipe)
    one, split = sum(per_gpu(subject, Load(tp=1))[0].values()), sum(per_gpu(subject, Load(tp=tp))[0].values())
    assert one / tp <= split < one / tp * 1.01


def test_kv_projections_are_repeated_beyond_the_heads(checkpoint: Callable[..., Path]) -> None:
    subject = open_subject(str(checkpoint("scout")))  # 4 query heads, 2 KV heads
    attention = [per_gpu(subject, Load(tp=tp))[0][Role.ATTENTION] for tp in (1, 2, 4)]
    queries, keys = 2 * 4 * 2 * 128 * 128, 2 * 4 * 2 * 64 * 128  # q and o, k and v, of 4 layers in BF16
    assert attention == [queries + keys, (queries + keys) // 2, queries // 4 + keys // 2]


def test_expert_parallelism_gives_whole_experts(checkpoint: Callable[..., Path]) -> None:
    subject = open_subject(str(checkpoint("scout", num_local_experts=6)))
    held = per_gpu(subject, Load(tp=4, expert_parallel=True))[0][Role.ROUTED_EXPERT]
    assert held == 2 * 4 * 2 * 3 * 128 * 128  # 2 of 6 experts, 4 layers, BF16, 3 matrices


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [(48, 1, [48]), (48, 4, [12] * 4), (48, 5, [9, 10, 10, 10, 9]), (50, 4, [12, 13, 13, 12]), (7, 7, [1] * 7)],
)
def test_stages_are_cut_as_vllm_cuts_them(layers: int, stages: int, sizes: list[int]) -> None:
    """`get_pp_indices` of vLLM 0.33 gave these sizes."""
    cut = stage_layers(layers, stages)
    assert [len(part) for part in cut] == sizes
    assert [layer for part in cut for layer in part] == list(range(layers))


def test_stages_hold_embedding_first_head_last_and_vision_everywhere() -> None:
    first, middle, last = per_gpu(from_config("llama-4-scout", known_config("llama-4-scout")), Load(tp=1, pp=3))
    assert Role.EMBEDDING in first
    assert Role.LM_HEAD not in first
    assert Role.EMBEDDING not in middle
    assert Role.LM_HEAD not in middle
    assert Role.LM_HEAD in last
    assert Role.EMBEDDING not in last
    assert first[Role.VISION] == middle[Role.VISION] == last[Role.VISION]


def test_transformers_unpacks_an_artifact_to_bf16() -> None:
    held = per_gpu(open_subject("llama-4-scout", "int4"), Load(pp=1), "transformers")[0]
    assert sum(held.values()) == 217_283_587_072  # the BF16 checkpoint, as the Hub counts it


def test_a_group_that_does_not_divide_is_refused(checkpoint: Callable[..., Path]) -> None:
    subject = open_subject(str(checkpoint("scout", intermediate_size=384)), "int4-rtn")
    with pytest.raises(UsageError, match="down_proj has 3 to split 2 ways"):
        per_gpu(subject, Load(tp=2))


def test_a_recipe_on_an_artifact_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = run_plan(make_plan(open_folder(checkpoint("scout")), load_recipe("fp8")), tmp_path / "Llama-4-tiny").out
    with pytest.raises(SourceError, match="quantized already"):
        open_subject(str(out), "fp8")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text())))
    with pytest.raises(SourceError, match="describes a quantized model"):
        open_subject(str(tmp_path / "config.json"))
