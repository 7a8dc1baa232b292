"""KV cache bytes against vLLM's own planner (numbers in golden/, made by vllm_kv_golden.py) and against plain counting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.kv import kv_cache, token_bytes
from l4pack.budget.load import Load, Setting, resolve
from l4pack.budget.runtimes import load_runtime
from l4pack.budget.subject import Subject, from_config
from l4pack.model.config import known_config, parse_config
from l4pack.units import GIB

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vllm-kv-0.33.0.json").read_text())
VLLM = load_runtime("vllm")
SCOUT = from_config("llama-4-scout", known_config("llama-4-scout"))


def setting_of(subject: Subject, load: Load, device: str = "8xh100", runtime: str = "vllm") -> Setting:
    return resolve(subject, find_host(device, load_devices()), load_runtime(runtime), load)


def with_pattern(flags: list[int]) -> Subject:
    raw = json.loads(json.dumps(known_config("llama-4-scout").raw))
    raw["text_config"] |= {"no_rope_layers": flags, "num_hidden_layers": len(flags)}
    return Subject("pattern", parse_config(raw), ())


def label(case: dict[str, Any]) -> str:
    return f"{case['pattern']}-{case['context']}-{case['kv_dtype']}-tp{case['tp']}-{case['batched_tokens']}"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=label)
@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "full"])
def test_vllms_planner_agrees_to_the_block(case: dict[str, Any], hybrid: bool) -> None:
    subject = with_pattern(case["no_rope_layers"])
    text = subject.config.text
    load = Load(
        case["context"], 1, case["kv_dtype"], tp=case["tp"], hybrid=hybrid, batched_tokens=case["batched_tokens"]
    )
    setting = setting_of(subject, load)
    expected = case["hybrid_on" if hybrid else "hybrid_off"]

    def needed(context: int) -> int:
        return kv_cache(text, replace(setting, context=context), VLLM, range(text.num_hidden_layers)).total(1)

    cache = kv_cache(text, setting, VLLM, range(text.num_hidden_layers))
    assert cache.bytes_per_request == expected["request_bytes"]
    assert cache.held_bytes == expected["bytes_per_block"]
    largest = expected["max_context"]
    if largest:
        assert needed(largest) <= GOLDEN["kv_memory"]
    if largest < case["context"]:
        assert needed(largest + 1) > GOLDEN["kv_memory"]


def test_the_need_in_vllms_own_error_message() -> None:
    """vllm-project/vllm#16118: a context of 1048576 over TP 8 with the launch version's full KV needs 24.00 GiB."""
    setting = setting_of(SCOUT, Load(1_048_576), runtime="vllm-0.8")
    cache = kv_cache(SCOUT.config.text, setting, load_runtime("vllm-0.8"), range(48))
    assert cache.bytes_per_request == 24 * GIB


@pytest.mark.parametrize(("tp", "heads"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_heads_are_split_over_gpus(tp: int, heads: int) -> None:
    setting = setting_of(SCOUT, Load(tp=tp))
    assert token_bytes(SCOUT.config.text, setting) == 2 * heads * 128 * 2


def test_heads_are_repeated_once_there_are_more_gpus_than_heads() -> None:
    setting = setting_of(SCOUT, Load(tp=8))
    assert token_bytes(SCOUT.config.text, replace(setting, tp=40)) == 2 * 1 * 128 * 2


def test_pipeline_stages_keep_their_own_layers() -> None:
    """Blocks are one size on all stages' tables, but a stage stores only its layers: the stages add up to the whole."""
    one = setting_of(SCOUT, Load(100_000, tp=1, pp=1))
    two = replace(one, pp=2)
    stages = [kv_cache(SCOUT.config.text, two, VLLM, layers) for layers in (range(24), range(24, 48))]
    full_blocks, window_blocks = -(-100_000 // 16), -(-(8192 + 3 * 8192) // 16)
    per_layer = token_bytes(SCOUT.config.text, one) * 16
    assert sum(stage.bytes_per_request for stage in stages) == 12 * per_layer * (full_blocks + 3 * window_blocks)


@pytest.mark.parametrize(
    ("runtime", "layers"),
    [("meta", 48), ("sglang", 12 + 0.8 * 36)],
)
def test_other_runtimes_by_plain_counting(runtime: str, layers: float) -> None:
    setting = setting_of(SCOUT, Load(65_536, sequences=3, tp=4), runtime=runtime)
    cache = kv_cache(SCOUT.config.text, setting, load_runtime(runtime), range(48))
    assert cache.total(3) == pytest.approx(3 * 65_536 * layers * 2 * 2 * 128 * 2, abs=3)


def test_transformers_forgets_chunks_and_copies_one_layer() -> None:
    setting = setting_of(SCOUT, Load(65_536, pp=1), runtime="transformers")
    cache = kv_cache(SCOUT.config.text, setting, load_runtime("transformers"), range(48))
    assert cache.total(1) == (12 * 65_536 + 36 * 8192 + 65_536) * 2 * 8 * 128 * 2
