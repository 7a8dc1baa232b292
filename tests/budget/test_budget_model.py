"""The budget as a whole: properties that must hold for every load, and what others published."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4pack.budget.devices import Host, find_host, load_devices
from l4pack.budget.load import MAX_SEQUENCES, Load
from l4pack.budget.model import Budget, Verdict, assess, budget
from l4pack.budget.named import alternatives, open_subject
from l4pack.budget.runtimes import DATA
from l4pack.budget.solve import changes, limits, max_context, max_sequences
from l4pack.budget.subject import Subject, from_config
from l4pack.datafile import read_yaml
from l4pack.errors import UsageError
from l4pack.recipe import load_recipe, recipe_names
from l4pack.units import GIB

DEVICES = load_devices()
PAGE = (Path(__file__).parents[2] / "docs" / "explanation" / "memory-model.md").read_text()
OPENED: dict[tuple[str, str | None], Subject] = {}
# Those that load a checkpoint; what llama.cpp and MLX load has tests of its own.
RUNTIME_NAMES = sorted(set(read_yaml(DATA / "runtimes.yaml")["runtimes"]) - {"llama.cpp", "mlx"})
RUNTIMES = st.sampled_from(RUNTIME_NAMES)
EASY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def opened(model: str, recipe: str | None = None) -> Subject:
    key = (f"llama-4-{model}", recipe)
    if key not in OPENED:
        OPENED[key] = open_subject(*key)
    return OPENED[key]


def made(model: str, recipe: str | None, device: str, load: Load, runtime: str = "vllm") -> Budget:
    return budget(opened(model, recipe), find_host(device, DEVICES), load, runtime)


def needs(found: Budget) -> tuple[int, int]:
    """Bytes per GPU at both ends."""
    return sum(line.low for line in found.lines), sum(line.high for line in found.lines)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    return Load(
        context=draw(st.integers(1, 10_485_760)),
        sequences=draw(st.integers(1, 300)),
        kv_dtype=draw(st.sampled_from(["bfloat16", "fp8"])),
        hybrid=draw(st.sampled_from([None, True, False])),
        batched_tokens=draw(st.sampled_from([None, 1024, 8192])),
        max_num_seqs=draw(st.sampled_from([None, 300, 1024])),
        images=draw(st.sampled_from([None, 0, 1])),
        expert_parallel=draw(st.booleans()),
    )


@EASY
@given(loads(), RUNTIMES, st.integers(0, 5_000_000), st.integers(0, 300))
def test_more_context_or_sequences_never_need_less(load: Load, runtime: str, tokens: int, more: int) -> None:
    load = replace(load, max_num_seqs=None)
    before = made("scout", "int4", "8xh100", load, runtime)
    longer = made("scout", "int4", "8xh100", replace(load, context=min(load.context + tokens, 10_485_760)), runtime)
    wider = made("scout", "int4", "8xh100", replace(load, sequences=load.sequences + more), runtime)
    for after in (longer, wider):
        assert all(b <= a for b, a in zip(needs(before), needs(after), strict=True))
        assert after.headroom_bytes <= before.headroom_bytes


@EASY
@given(loads(), RUNTIMES)
def test_a_wider_dtype_never_needs_less(load: Load, runtime: str) -> None:
    narrow, wide = (
        made("scout", "int4", "8xh100", replace(load, kv_dtype=dtype), runtime) for dtype in ("fp8", "bfloat16")
    )
    assert all(n < w for n, w in zip(needs(narrow), needs(wide), strict=True))


@EASY
@given(loads(), st.sampled_from(["vllm", "vllm-0.8", "sglang", "meta"]), st.sampled_from([2, 4, 8]))
def test_more_gpus_never_need_more_each_but_for_what_links_them(load: Load, runtime: str, tp: int) -> None:
    one = made("scout", "fp8", "8xh100", replace(load, tp=1), runtime)
    many = made("scout", "fp8", "8xh100", replace(load, tp=tp), runtime)
    assert all(m < o for m, o in zip(needs(many), needs(one), strict=True))
    alone = [line for line in many.lines if line.name != "communication"]
    by_name = {line.name: line for line in one.lines}
    assert {line.name for line in alone} <= set(by_name)
    for line in alone:
        assert line.low <= by_name[line.name].low, line.name
        assert line.high <= by_name[line.name].high, line.name


@EASY
@given(loads(), st.sampled_from(["int4", "fp8"]), RUNTIMES, st.sampled_from(["h100", "2xh100", "8xh200", "b200"]))
def test_the_largest_context_fits_and_one_block_more_does_not(
    load: Load, recipe: str, runtime: str, device: str
) -> None:
    found = made("scout", recipe, device, load, runtime)
    block = found.runtime.block_size
    for high, fits in ((True, lambda tried: tried.fits), (False, lambda tried: tried.headroom_high_bytes >= 0)):
        context = max_context(found, high=high)
        if context:
            assert fits(at(found, context=context))
        if context + block <= 10_485_760:
            assert not fits(at(found, context=context + block))


@EASY
@given(loads(), st.sampled_from(["int4", "fp8"]), RUNTIMES)
def test_the_most_sequences_fit_and_one_more_does_not(load: Load, recipe: str, runtime: str) -> None:
    found = made("scout", recipe, "8xh100", load, runtime)
    count = max_sequences(found)
    if count:
        assert at(found, sequences=count).fits
    if count < (load.max_num_seqs or MAX_SEQUENCES):
        assert not at(found, sequences=count + 1).fits


def at(found: Budget, **values: int) -> Budget:
    return assess(found.subject, found.host, found.runtime, replace(found.setting, **values))


@EASY
@given(loads(), RUNTIMES)
def test_both_ends_are_in_order_and_the_verdict_is_theirs(load: Load, runtime: str) -> None:
    found = made("scout", "int4", "2xh100", load, runtime)
    assert all(0 <= line.low <= line.high for line in found.lines)
    assert found.headroom_bytes <= found.headroom_high_bytes
    expected = Verdict.FITS if found.headroom_bytes >= 0 else Verdict.TOO_LARGE
    assert found.verdict is (Verdict.UNSURE if found.headroom_bytes < 0 <= found.headroom_high_bytes else expected)


@pytest.mark.parametrize(
    ("recipe", "device", "load"),
    [
        ("int4", "h100", Load(131_072, kv_dtype="fp8")),
        ("fp8", "h100", Load(32_768)),
        ("int4", "2xh100", Load(131_072, sequences=64)),
        ("int4", "h100", Load(10_485_760)),
    ],
)
def test_every_change_named_fits_when_it_is_made(recipe: str, device: str, load: Load) -> None:
    found = made("scout", recipe, device, load)
    named = changes(found, load, "vllm", DEVICES, alternatives("llama-4-scout", found.subject))
    assert named
    for change in named:
        subject, host, changed = found.subject, found.host, load
        for option, value in pairs(change.option.split()):
            if option == "--recipe":
                subject = opened("scout", value)
            elif option == "--device":
                host = find_host(value, DEVICES)
            else:
                key = option.removeprefix("--").replace("-", "_")
                changed = replace(changed, **{key: int(value) if value.isdigit() else value})
        again = budget(subject, host, changed)
        assert again.fits, change
        assert again.headroom_bytes == change.headroom_bytes
        assert max_context(again) == change.max_context


def pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    yield from zip(words[::2], words[1::2], strict=True)


def test_the_promises_of_the_shipped_recipes_hold_at_both_ends() -> None:
    promises = [(name, load_recipe(name).promise) for name in recipe_names()]
    kept = [(name, promise) for name, promise in promises if promise]
    assert kept
    for name, promise in kept:
        load = Load(promise.context, promise.sequences, promise.kv_dtype)
        found = budget(opened(promise.model.removeprefix("llama-4-"), name), find_host(promise.device, DEVICES), load)
        assert found.fits, name


def row(claim: str) -> str:
    found = [line for line in PAGE.splitlines() if line.startswith(f"| {claim}")]
    assert len(found) == 1, claim
    return found[0].split("|")[3]


@pytest.mark.parametrize(
    ("claim", "model", "recipe", "device", "load", "runtime", "fits"),
    [
        ("Scout Int4 on one", "scout", "int4-uniform", "h100", Load(16_384), "vllm", True),
        ("Scout FP8 on two", "scout", "fp8", "2xh100", Load(131_072), "vllm", True),
        ("Maverick FP8 on one 8xH100", "maverick", "fp8", "8xh100", Load(131_072), "vllm", True),
        ("vLLM at launch, Scout BF16, 8xH100", "scout", None, "8xh100", Load(1_000_000), "vllm-0.8", True),
        ("vLLM at launch, Scout BF16, 8xH200", "scout", None, "8xh200", Load(3_600_000), "vllm-0.8", True),
        ("vLLM at launch, Maverick FP8, 8xH100", "maverick", "meta-fp8", "8xh100", Load(430_000), "vllm-0.8", True),
        ("vLLM at launch, Maverick FP8, 8xH200", "maverick", "meta-fp8", "8xh200", Load(1_048_576), "vllm-0.8", True),
        ("SGLang docs", "scout", None, "8xh100", Load(1_000_000, utilization=0.824, hybrid=False), "sglang", True),
        ("10 M tokens on one H100", "scout", "int4-uniform", "h100", Load(10_485_760), "vllm", False),
    ],
)
def test_published_contexts(
    claim: str, model: str, recipe: str | None, device: str, load: Load, runtime: str, fits: bool
) -> None:
    """What others served fits here, what nobody can does not, and the page says the numbers that are computed."""
    found = made(model, recipe, device, load, runtime)
    assert found.fits is fits
    largest = limits(found)
    ours = row(claim)
    assert f"{largest.max_context:,}" in ours
    assert set(re.findall(r"\d[\d,]{4,}", ours)) <= {f"{largest.max_context:,}", f"{largest.max_context_high:,}"}


def test_published_sizes() -> None:
    scout, fp8 = opened("scout"), opened("scout", "fp8")
    assert f"{scout.weight_bytes:,}" in row("Scout BF16 checkpoint")
    assert f"{fp8.weight_bytes / GIB:.2f} GiB" in row("Scout FP8 on one")
    assert not made("scout", "fp8", "h100", Load(1)).fits
    assert made("scout", "int4-uniform", "h100", Load(1)).subject.weight_bytes / 1e9 == pytest.approx(64.87, abs=0.01)


def test_the_room_that_vllm_reported() -> None:
    """vllm-project/vllm#16118: 24.00 GiB needed, 9.97 GiB there."""
    found = made("maverick", "meta-fp8", "8xh100", Load(1_048_576), "vllm-0.8")
    kv = sum(line.high for line in found.lines if line.name == "KV cache")
    assert f"{kv / GIB:.2f} GiB" in row("vllm-project/vllm#16118")
    at_430k = made("maverick", "meta-fp8", "8xh100", Load(430_000), "vllm-0.8")
    room = at_430k.headroom_bytes + sum(line.high for line in at_430k.lines if line.name == "KV cache")
    assert room / GIB == pytest.approx(9.97, abs=0.05)
    assert f"{room / GIB:.2f} GiB" in row("the same message")


def test_ten_million_tokens_on_one_h100() -> None:
    found = made("scout", "int4", "h100", Load(10_485_760))
    assert found.verdict is Verdict.TOO_LARGE
    assert 0 < limits(found).max_context < 100_000


@pytest.mark.parametrize(
    ("device", "load", "message"),
    [
        ("3xh100", Load(tp=3), "tp 3 does not divide 40 attention heads and 8 KV heads"),
        ("8xh100", Load(tp=16), "needs 16 GPUs, 8xh100 has 8"),
        ("h100", Load(context=10_485_761), "beyond the model's 10,485,760"),
        ("h100", Load(context=0), "context 0 is not positive"),
        ("h100", Load(sequences=0), "sequences 0 is not positive"),
        ("h100", Load(sequences=5, max_num_seqs=4), "5 sequences are more than max-num-seqs 4"),
        ("h100", Load(kv_dtype="int4"), "no KV dtype is named 'int4'"),
        ("h100", Load(utilization=1.5), "utilization 1.5"),
        ("h100", Load(context=2048, max_positions=1024), "max-positions 1,024 is less than the context"),
        ("64xh100", Load(tp=1, pp=64), "more than the model's 48 layers"),
    ],
)
def test_loads_a_runtime_would_refuse(device: str, load: Load, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        made("scout", "int4", device, load)
    assert caught.value.hint


def test_devices_by_name_alias_and_number() -> None:
    assert find_host("8xH100-SXM", DEVICES) == Host(DEVICES["h100"], 8)
    assert find_host("h100", DEVICES).name == "h100"
    with pytest.raises(UsageError, match="no device is named 'h1000'") as caught:
        find_host("h1000", DEVICES)
    assert "h100" in caught.value.hint
    for wrong in ("0xh100", "", "h100 x", "5000xh100"):
        with pytest.raises(UsageError):
            find_host(wrong, DEVICES)


def test_every_device_asked_for_is_known_with_a_source() -> None:
    wanted = (
        "h100 h100-pcie h100-nvl h200 b200 b300 a100-40 a100-80 l40s rtx4090 rtx5090 rtx6000-pro mi300x mi325x gaudi3 "
        "h20 gh200 gb200 gb300 gb10 l4 a10g mi355x m4-max-128 m2-ultra-192 m3-ultra-256 m3-ultra-512"
    )
    assert set(wanted.split()) == set(DEVICES)
    assert all(device.source and device.memory_bytes > 20 * GIB for device in DEVICES.values())


def test_your_own_devices(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("devices:\n  Toy: {title: A toy, memory: 8GiB, source: invented, aliases: [t]}\n")
    known = load_devices(file)
    assert find_host("2xt", known) == Host(known["toy"], 2)
    assert known["toy"].memory_bytes == 8 * GIB
    file.write_text("devices:\n  toy: {title: A toy, memory: 0, source: invented}\n")
    with pytest.raises(UsageError, match=r"devices\.toy\.memory: Input should be greater than 0"):
        load_devices(file)


def test_batch_limits_follow_the_device() -> None:
    """`engine/arg_utils.py` of vLLM 0.33: large on 160 GiB and more, middling on H100, small on A100 and below 70 GiB."""
    seen = {name: made("scout", "int4", name, Load(1024)).setting for name in ("b200", "h100", "a100-80", "l40s")}
    assert {name: (one.batched_tokens, one.max_num_seqs) for name, one in seen.items()} == {
        "b200": (16_384, 1024), "h100": (8192, 1024), "a100-80": (2048, 256), "l40s": (2048, 256)
    }  # fmt: skip


def test_kv_scales_in_an_artifact_make_auto_fp8() -> None:
    subject = opened("scout", "int4")
    raw = {**subject.config.raw, "quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}
    scaled = replace(subject, config=subject.config.model_copy(update={"raw": raw}))
    assert budget(scaled, find_host("h100", DEVICES), Load(1024)).setting.kv_dtype == "fp8"
    assert budget(subject, find_host("h100", DEVICES), Load(1024)).setting.kv_dtype == "bfloat16"


def test_sglang_takes_activations_from_what_it_leaves_over() -> None:
    found = made("scout", "int4", "2xh100", Load(8192), "sglang")
    outside = {line.name for line in found.lines if line.outside}
    assert outside == {"activations", "CUDA graphs"}
    stage = found.tightest
    assert stage.planned_bytes + stage.rest_bytes == found.host.device.memory_bytes
    assert found.setting.utilization == pytest.approx(round((79.10 - 10.5) / 79.10, 3) * 0.95 * 0.832, abs=0.002)


@pytest.mark.parametrize("runtime", RUNTIME_NAMES)
def test_a_configuration_that_claims_the_impossible_is_still_answered(runtime: str) -> None:
    text = opened("scout").config.text.model_copy(update={"max_position_embeddings": 10**400})
    config = opened("scout").config.model_copy(update={"text": text})
    found = budget(from_config("absurd", config), find_host("8xh200", DEVICES), Load(), runtime)
    assert limits(found).max_context >= 0
