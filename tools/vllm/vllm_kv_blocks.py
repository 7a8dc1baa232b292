"""Ask vLLM's own KV cache planner what one request of a Llama 4 model costs, without a GPU or any weights.

    .venv-vllm/bin/python tools/vllm/vllm_kv_blocks.py CONFIG_DIR --context L [--kv-dtype fp8|bfloat16] [--tp N]
        [--max-num-batched-tokens N] [--[no-]async-scheduling] [--block-size N] [--kv-memory BYTES] [--json]

CONFIG_DIR needs a config.json only. All numbers are of one tensor-parallel rank, with the hybrid KV cache manager on
(vLLM's default: chunked layers keep no more than their chunk and what is in flight) and off (every layer keeps all).
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_environment import VLLM_VERSION, prepare

H100_BATCHED_TOKENS = 8192  # vLLM's default for `vllm serve` on 70 to 160 GiB devices other than A100
H100_SEQUENCES = 1024


@dataclass(frozen=True)
class Setting:
    """What a server is started with, as far as it decides the KV cache."""

    folder: Path
    context: int
    kv_dtype: str
    tensor_parallel: int
    max_num_batched_tokens: int
    async_scheduling: bool
    block_size: int
    kv_memory: int | None


def plan(setting: Setting, hybrid: bool) -> dict[str, Any]:
    """Run the planner for one request of `context` tokens; bytes and counts are those of one rank."""
    from vllm.v1.core import kv_cache_planning as planning
    from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder

    config = _vllm_config(setting, hybrid)
    specs = layer_specs(config, setting)
    groups = planning.get_global_kv_cache_groups(config, [specs])
    builder = get_kv_cache_config_builder(config)
    result = {
        "request_bytes": planning._max_memory_usage_bytes_from_groups(builder, config, groups),
        "bytes_per_block": planning._pool_bytes_per_block_from_builder(builder, config, groups),
        "max_in_flight_tokens": config.max_in_flight_tokens,
        "groups": [_group(config, group) for group in groups],
    }
    result["request_blocks"] = sum(group["blocks"] for group in result["groups"])
    if setting.kv_memory is not None:
        result |= _capacity(config, specs, groups, builder, setting.kv_memory)
    return result


def layer_specs(config: Any, setting: Setting) -> dict[str, Any]:
    """The cache specification each attention layer declares, as `Llama4Attention` and its attention classes do.

    vLLM builds these from real layers, which allocates the model's weights; a test compares the two.
    """
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, get_kv_quant_mode

    text = config.model_config.hf_text_config
    cache_dtype = config.cache_config.cache_dtype
    common = {
        "block_size": config.cache_config.block_size,
        "num_kv_heads": max(1, text.num_key_value_heads // setting.tensor_parallel),
        "head_size": text.head_dim,
        "dtype": kv_cache_dtype_str_to_dtype(cache_dtype, config.model_config),
        "kv_quant_mode": get_kv_quant_mode(cache_dtype),
    }
    multimodal = config.model_config.hf_config is not text
    prefix = "language_model.model.layers" if multimodal else "model.layers"
    chunk = text.attention_chunk_size
    return {
        f"{prefix}.{layer}.self_attn.attn": ChunkedLocalAttentionSpec(**common, attention_chunk_size=chunk)
        if uses_rope and chunk
        else FullAttentionSpec(**common)
        for layer, uses_rope in enumerate(text.no_rope_layers)
    }


def _group(config: Any, group: Any) -> dict[str, Any]:
    spec = group.kv_cache_spec
    return {
        "kind": type(spec).__name__,
        "layers": len(group.layer_names),
        "block_size": spec.block_size,
        "page_bytes": spec.page_size_bytes,  # one block of one layer
        "blocks": -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes),  # of one request, in each layer
    }


def _capacity(config: Any, specs: Any, groups: Any, builder: Any, memory: int) -> dict[str, Any]:
    from vllm.v1.core import kv_cache_planning as planning
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_capacity

    # The block pool holds one block back for itself, and the planner checks requests against the rest.
    usable = memory - planning._pool_bytes_per_block_from_builder(builder, config, groups)
    largest = planning._estimate_max_model_len_from_groups(builder, config, groups, usable)
    result = {"kv_memory": memory, "fits": largest >= config.model_config.max_model_len, "max_context": largest}
    if not result["fits"]:
        return result | {"num_blocks": None, "capacity_tokens": None, "max_concurrency": None}
    configs = planning.get_kv_cache_configs(config, [specs], [memory], groups)
    tokens, concurrency = get_kv_cache_capacity(config, generate_scheduler_kv_cache_config(configs))
    return result | {
        "num_blocks": configs[0].num_blocks,
        "capacity_tokens": tokens,
        "max_concurrency": concurrency,
    }


def _vllm_config(setting: Setting, hybrid: bool) -> Any:
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig

    model_config = ModelConfig(
        model=str(setting.folder),
        tokenizer=str(setting.folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=setting.context,
    )
    scheduler_config = SchedulerConfig(
        max_model_len=setting.context,
        is_encoder_decoder=False,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        max_num_seqs=min(H100_SEQUENCES, setting.max_num_batched_tokens),
        disable_hybrid_kv_cache_manager=not hybrid,
    )
    config = VllmConfig(
        model_config=model_config,
        cache_config=CacheConfig(cache_dtype=setting.kv_dtype, block_size=setting.block_size),
        scheduler_config=scheduler_config,
        device_config=DeviceConfig("cpu"),
    )
    # The CPU platform switches asynchronous scheduling off; on a GPU it is on unless asked otherwise.
    config.scheduler_config.async_scheduling = setting.async_scheduling
    # The engine takes this from the attention backend: FlashAttention's. With one page size for all layers it changes
    # strides, not bytes.
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def report(setting: Setting) -> dict[str, Any]:
    """Plan with the hybrid manager on and off."""
    return {
        "vllm": VLLM_VERSION,
        "context": setting.context,
        "kv_dtype": setting.kv_dtype,
        "tp": setting.tensor_parallel,
        "max_num_batched_tokens": setting.max_num_batched_tokens,
        "async_scheduling": setting.async_scheduling,
        "hybrid_on": plan(setting, hybrid=True),
        "hybrid_off": plan(setting, hybrid=False),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The report for people."""
    text = [
        f"vLLM {result['vllm']}: one request of {result['context']:,} tokens, {result['kv_dtype']} KV, "
        f"TP {result['tp']}, per rank, {result['hybrid_on']['max_in_flight_tokens']:,} tokens in flight"
    ]
    for key, title in [("hybrid_on", "hybrid manager on"), ("hybrid_off", "hybrid manager off")]:
        entry = result[key]
        text.append(f"{title}: {entry['request_bytes']:,} bytes ({entry['request_bytes'] / 2**30:.3f} GiB)")
        text += [
            f"  {group['kind']}: {group['layers']} layers x {group['blocks']:,} blocks of {group['block_size']} tokens"
            f" x {group['page_bytes']:,} bytes"
            for group in entry["groups"]
        ]
        if "kv_memory" in entry:
            concurrency = f"{entry['max_concurrency']:.2f} requests" if entry["fits"] else "does not fit"
            text.append(f"  in {entry['kv_memory']:,} bytes: {concurrency}, largest context {entry['max_context']:,}")
    return text


def main() -> int:
    """Parse, plan, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="CONFIG_DIR")
    parser.add_argument("--context", type=int, required=True, metavar="L")
    parser.add_argument("--kv-dtype", choices=["bfloat16", "fp8"], default="bfloat16")
    parser.add_argument("--tp", dest="tensor_parallel", type=int, choices=[1, 2, 4, 8], default=1)
    parser.add_argument("--max-num-batched-tokens", type=int, default=H100_BATCHED_TOKENS)
    parser.add_argument("--async-scheduling", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--block-size", type=int, default=16, help="tokens in one block (vLLM's default is 16)")
    parser.add_argument("--kv-memory", type=int, metavar="BYTES", help="also: how many such requests fit at once")
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    if not (options["folder"] / "config.json").is_file():
        parser.error(f"{options['folder']} has no config.json")
    prepare()
    result = report(Setting(**options))
    print(json.dumps(result, indent=1) if as_json else "\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
