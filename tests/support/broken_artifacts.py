"""Ways an artifact comes out silently wrong: each function breaks a good artifact folder in place.

`BROKEN` maps a name to the damage, the rules it must be found by (these and no other), and whether finding it takes the
source. The cases come from bug reports against quantizers and runtimes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from damage import (
    DOWN,
    EXPERTS,
    GATE,
    LAYER,
    ROUTER,
    UP,
    Tensors,
    add,
    both,
    config,
    copy_module,
    drop,
    edit_json,
    extra_shard,
    filled,
    first_is,
    fuse_packed,
    group,
    in_bfloat16,
    interleaved,
    kv_scales,
    one_level_up,
    put,
    quantize_plain,
    remove,
    rename_tensors,
    requantize,
    set_group,
    set_ignore,
    stanza,
    swap,
    tensors,
    text_of,
    times,
    transposed_shape,
    truncate,
    wrong_axis,
)


@dataclass(frozen=True)
class Broken:
    damage: Callable[[Path], None]
    rules: frozenset[str]
    source: bool = False
    recipe: str = "int4-rtn"
    places: str = ""  # a part of where one of the findings lies


def case(damage: Callable[[Path], None], *rules: str, **options: Any) -> Broken:
    return Broken(damage, frozenset(rules), **options)


def _vision(state: Tensors) -> Tensors:
    return {name: value for name, value in state.items() if not name.startswith("vision_model.")}


def _transpose(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.T.contiguous()


def _roll_rows(matrix: torch.Tensor) -> torch.Tensor:
    return torch.cat([matrix[:8].roll(1, 0), matrix[8:]])


BROKEN: dict[str, Broken] = {
    # experts: halves, axes, order
    "gate and up cut along the input axis": case(tensors(wrong_axis), "shape", places=GATE),
    "gate and up taken alternately": case(tensors(interleaved), "weights", source=True, places=GATE),
    "down_proj not transposed": case(requantize(DOWN, _transpose), "weights", source=True, places=DOWN),
    "gate and up swapped": case(swap(GATE, UP), "weights", source=True, places=UP),
    "two experts swapped": case(swap(GATE, f"{EXPERTS}3.gate_proj"), "weights", source=True, places=GATE),
    "some output rows rolled": case(requantize(GATE, _roll_rows), "weights", source=True, places=GATE),
    "columns reversed": case(requantize(GATE, lambda m: m.flip(1)), "weights", source=True, places=GATE),
    "one code two levels off": case(put(f"{GATE}.weight_packed", one_level_up), "weights", source=True, places=GATE),
    "scales doubled": case(put(f"{GATE}.weight_scale", lambda s: s * 2), "weights", source=True, places=GATE),
    "an expert stored twice": case(copy_module(GATE, f"{EXPERTS}3.gate_proj"), "duplicate", places="experts.3.gate_proj"),
    "an expert of zeros": case(put(f"{GATE}.weight_packed", filled(-2004318072)), "dead", source=True, places=GATE),
    "experts left out": case(drop(f"{EXPERTS}3."), "missing", places="experts.3.down_proj"),
    "experts left in BF16": case(in_bfloat16(EXPERTS), "ignore", places=GATE),
    "one expert left in BF16": case(in_bfloat16(f"{EXPERTS}2."), "ignore", "mixed", places=GATE),
    "one expert in BF16 and ignored": case(
        both(
            in_bfloat16(f"{EXPERTS}2."),
            stanza(lambda config: config["ignore"].append(r"re:.*layers\.1\..*experts\.2\..*")),
        ),
        "mixed",
        places=EXPERTS.removesuffix("."),
    ),
    "packed experts fused": case(tensors(fuse_packed), "fused", places="experts.gate_up_proj.weight_packed"),
    # router
    "router quantized": case(quantize_plain(f"{ROUTER}.weight"), "ignore", "unexpected", places=ROUTER),
    "router of zeros": case(put(f"{ROUTER}.weight", filled(0.0)), "dead", source=True, places=ROUTER),
    # scales and codes
    "a scale missing": case(drop(f"{DOWN}.weight_scale"), "missing", places=f"{DOWN}.weight_scale"),
    "a scale of zero": case(put(f"{DOWN}.weight_scale", first_is(0.0)), "scale", places=DOWN),
    "a negative scale": case(put(f"{DOWN}.weight_scale", first_is(-0.01)), "scale", places=DOWN),
    "a scale NaN": case(put(f"{DOWN}.weight_scale", first_is(float("nan"))), "scale", places=DOWN),
    "a scale infinite": case(put(f"{DOWN}.weight_scale", first_is(float("inf"))), "scale", places=DOWN),
    "a scale absurd": case(put(f"{DOWN}.weight_scale", first_is(1e6)), "scale", places=DOWN),
    "scales never computed": case(put(f"{DOWN}.weight_scale", filled(1.0)), "scale", places=DOWN),
    "scales vanishing": case(put(f"{DOWN}.weight_scale", filled(1e-30)), "scale", places=DOWN),
    "1-D FP8 scale": case(put(f"{GATE}.weight_scale", lambda s: s[:, 0]), "shape", recipe="fp8", places=GATE),
    "FP8 scale missing": case(drop(f"{GATE}.weight_scale"), "missing", recipe="fp8", places=GATE),
    "FP8 code NaN": case(
        put(f"{GATE}.weight", lambda w: first_is(127)(w.view(torch.uint8)).view(torch.float8_e4m3fn)),
        "not-finite", recipe="fp8", places=GATE,
    ),
    "FP8 expert of zeros": case(put(f"{GATE}.weight", torch.zeros_like), "dead", recipe="fp8", source=True, places=GATE),
    "FP8 rows shuffled": case(
        put(f"{GATE}.weight", lambda w: w.view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn)),
        "weights", recipe="fp8", source=True, places=GATE,
    ),
    "FP8 blocks transposed": case(
        put(f"{GATE}.weight", lambda w: w.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)),
        "weights", recipe="fp8-block", source=True, places=GATE,
    ),
    "zero points packed along the inputs": case(
        put(f"{GATE}.weight_zero_point", lambda z: torch.zeros(128, 1, dtype=z.dtype)), "shape", recipe="asymmetric", places=GATE
    ),
    "zero points of another expert": case(
        put(f"{GATE}.weight_zero_point", lambda z: z ^ 0x33333333), "weights", recipe="asymmetric", source=True, places=GATE
    ),
    "weight_shape missing": case(drop(f"{GATE}.weight_shape"), "missing", places=GATE),
    "weight_shape wrong": case(put(f"{GATE}.weight_shape", transposed_shape), "weight_shape", places=GATE),
    "codes as int64": case(put(f"{GATE}.weight_packed", lambda w: w.long()), "dtype", places=GATE),
    "scales in float64": case(put(f"{GATE}.weight_scale", lambda s: s.double()), "dtype", places=GATE),
    # kept tensors
    "NaN in a norm": case(
        put(f"{LAYER}input_layernorm.weight", first_is(float("nan"))), "not-finite", places="input_layernorm"
    ),
    "a norm as int32": case(put(f"{LAYER}input_layernorm.weight", lambda w: w.int()), "dtype", places="input_layernorm"),
    "a kept tensor changed": case(put("language_model.lm_head.weight", first_is(0.5)), "kept", source=True, places="lm_head"),
    "a kept tensor in another dtype": case(
        put("language_model.lm_head.weight", lambda w: w.float()), "kept", source=True, places="lm_head"
    ),
    "a kept expert not transposed": case(
        put("language_model.model.layers.0.feed_forward.experts.1.down_proj.weight", _transpose),
        "kept", recipe="meta-fp8", source=True, places="layers.0.feed_forward.experts.1.down_proj",
    ),
    "vision tensors dropped": case(tensors(_vision), "missing", places="vision_model."),
    "prefix of another version": case(
        rename_tensors("language_model.model.", "model.language_model."), "naming", places="model.language_model"
    ),
    "a tensor nobody knows": case(
        tensors(lambda state: state.update({f"{LAYER}self_attn.rotary.inv_freq": torch.ones(4)})),
        "unexpected", places="inv_freq",
    ),
    # stanza
    "no stanza": case(lambda folder: edit_json(folder, lambda c: c.pop("quantization_config")), "stanza"),
    "ignore of bare names": case(
        set_ignore("lm_head", "router", "self_attn", "vision_model", "multi_modal_projector"), "ignore", places="q_proj"
    ),
    "ignore omitted": case(set_ignore(), "ignore", places="lm_head"),
    "ignore without the vision tower": case(
        set_ignore("re:.*lm_head", "re:.*router", "re:.*self_attn.*", "re:.*projector.*"), "ignore", places="vision_model"
    ),
    "ignore names the experts": case(
        stanza(lambda config: config["ignore"].append("re:.*experts.*")), "ignore", places=GATE
    ),
    "ignore that is no expression": case(stanza(lambda config: config["ignore"].append("re:(")), "stanza", places="ignore"),
    "suffixes only SGLang ignores": case(
        both(quantize_plain(f"{LAYER}self_attn.o_proj.weight"), stanza(lambda c: c["ignore"].append("self_attn.o_proj"))),
        "ignore", places="o_proj",
    ),
    "targets that miss the down projections": case(
        stanza(lambda c: c["config_groups"]["group_0"].update(targets=["re:.*(gate|up)_proj$"])), "ignore", places=DOWN
    ),
    "status frozen": case(
        stanza(lambda config: config.update(quantization_status="frozen")), "stanza", places="quantization_status"
    ),
    "status missing": case(
        stanza(lambda config: config.pop("quantization_status")), "stanza", places="quantization_status"
    ),
    "sparsity_config filled": case(
        stanza(lambda config: config.update(sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]})),
        "stanza", places="sparsity_config",
    ),
    "wrong group_size": case(set_group(group_size=64), "shape", places=GATE),
    "wrong num_bits": case(set_group(num_bits=8), "shape", places=GATE),
    "a strategy unknown to the schema": case(set_group(strategy="rows"), "stanza", "scheme", places="strategy"),
    "actorder group": case(set_group(actorder="group"), "stanza", places="actorder"),
    "FP8 said of packed integers": case(
        both(
            stanza(lambda c: c["config_groups"]["group_0"].update(format="float-quantized")),
            stanza(lambda c: c.update(format="float-quantized")),
            set_group(num_bits=8, type="float", strategy="channel", group_size=None),
        ),
        "ignore", places=GATE,
    ),
    "formats that disagree": case(stanza(lambda c: c.update(format="float-quantized")), "stanza", places="format"),
    "a format l4pack does not know": case(
        both(
            stanza(lambda c: c["config_groups"]["group_0"].update(format="marlin-24")),
            stanza(lambda c: c.update(format="marlin-24")),
        ),
        "scheme", places="group_0",
    ),
    "another quantization method": case(stanza(lambda c: c.update(quant_method="fbgemm_fp8")), "stanza"),
    # KV cache
    "KV scales never computed": case(kv_scales(1.0), "kv-scale", places="k_scale"),
    "KV scales of zero": case(kv_scales(0.0), "kv-scale", places="v_scale"),
    "KV scales without a scheme": case(
        both(kv_scales(0.02), stanza(lambda c: c.update(kv_cache_scheme=None))), "unexpected", places="k_scale"
    ),
    "KV scales in the vision tower": case(
        both(
            kv_scales(0.02),
            tensors(lambda s: s.update({"vision_model.model.layers.0.self_attn.k_scale": torch.tensor([0.02])})),
        ),
        "unexpected", places="vision_model",
    ),
    "KV scheme vLLM refuses": case(
        both(kv_scales(0.02), stanza(lambda c: c["kv_cache_scheme"].update(dynamic=True))), "stanza", places="dynamic"
    ),
    # config.json
    "vision_config dropped": case(
        both(lambda folder: edit_json(folder, lambda c: c.pop("vision_config")), tensors(_vision),
             drop("multi_modal_projector.")),
        "config", "missing", source=True, places="vision_config",
    ),
    "text_config changed": case(
        lambda folder: edit_json(folder, lambda c: c["text_config"].update(attention_chunk_size=64)),
        "config", source=True, places="attention_chunk_size",
    ),
    "rotary numbers changed": case(
        lambda folder: edit_json(folder, lambda c: c["text_config"]["rope_parameters"].update(factor=8.0)),
        "config", source=True, places="rope_parameters",
    ),
    "dtype changed": case(
        lambda folder: edit_json(folder, lambda c: c.update(dtype="float16")), "config", source=True, places="dtype"
    ),
    "architecture of a text model": case(
        lambda folder: edit_json(folder, lambda c: c.update(architectures=["Llama4ForCausalLM"])),
        "config", places="architectures",
    ),
    # files
    "no tokenizer": case(remove("tokenizer.json"), "companion", places="tokenizer.json"),
    "no tokenizer_config": case(remove("tokenizer_config.json"), "companion", places="tokenizer_config.json"),
    "tokenizer.json is no JSON": case(
        text_of("tokenizer.json", lambda text: text[:-20]), "companion", places="tokenizer.json"
    ),
    "no image processor": case(
        remove("preprocessor_config.json", "processor_config.json"), "companion", places="preprocessor_config.json"
    ),
    "chat template missing": case(remove("chat_template.jinja"), "companion", source=True, places="chat_template.jinja"),
    "chat template altered": case(
        text_of("chat_template.jinja", lambda text: text + "!"), "companion", source=True, places="chat_template.jinja"
    ),
    "licence missing": case(remove("LICENSE"), "companion", source=True, places="LICENSE"),
    "generation_config missing": case(
        remove("generation_config.json"), "companion", source=True, places="generation_config.json"
    ),
    "tokenizer that truncates": case(
        lambda folder: edit_json(folder, lambda t: t.update(truncation={"max_length": 512}), "tokenizer.json"),
        "companion", source=True, places="tokenizer.json",
    ),
    # config.json, key by key
    **{
        f"{'.'.join(keys)} changed": case(config(*keys, value=value), "config", source=True, places=".".join(keys[:2]))
        for keys, value in (
            (("image_token_index",), 299), (("boi_token_index",), 299), (("eoi_token_index",), 299),
            (("text_config", "eos_token_id"), 258), (("text_config", "hidden_act"), "gelu"),
            (("text_config", "attn_scale"), 0.2), (("text_config", "floor_scale"), 8192),
            (("text_config", "rms_norm_eps"), 1e-6), (("text_config", "layer_types"), ["full_attention"] * 4),
            (("text_config", "rope_parameters", "rope_theta"), 10000.0), (("text_config", "use_qk_norm"), False),
            (("vision_config", "hidden_act"), "relu"), (("vision_config", "norm_eps"), 1e-3),
            (("vision_config", "vision_feature_layer"), -2), (("auto_map",), {"AutoModel": "x--y.Z"}),
            (("text_config", "model_type"), "llama4_tex"), (("vision_config", "model_type"), None),
            (("compression_config",), {}), (("torch_dtype",), "float16"), (("text_config", "torch_dtype"), "float16"),
        )
    },
    # what runtimes make of the stanza
    "integer activations": case(
        stanza(lambda c: c["config_groups"]["group_0"]["input_activations"].update(type="int")),
        "stanza", recipe="fp8", places="input_activations.type",
    ),
    "static said of dynamic activations": case(
        stanza(lambda c: c["config_groups"]["group_0"]["input_activations"].update(strategy="tensor")),
        "stanza", "scheme", recipe="fp8", places="input_activations",
    ),
    "dynamic weights": case(set_group(dynamic=True), "stanza", places="weights.dynamic"),
    "outputs quantized": case(
        group(output_activations={"num_bits": 8, "type": "float", "strategy": "tensor"}), "stanza", places="output_activations"
    ),
    "an ignore entry misspelt": case(stanza(lambda c: c["ignore"].append("re:.*self_atn.*")), "ignore", places="ignore"),
    "a target misspelt": case(
        stanza(lambda c: c["config_groups"]["group_0"]["targets"].append("re:.*up_porj$")), "ignore", places="targets"
    ),
    "a pattern that never ends": case(
        stanza(lambda c: c["ignore"].append(r"re:(\w+\.?)+!")), "stanza", places="ignore"
    ),
    # files that change what runs, what is said, or what is read
    "code beside the weights": case(add("modeling_llama4.py"), "strange", places="modeling_llama4.py"),
    "pickled weights beside": case(add("pytorch_model.bin"), "strange", places="pytorch_model.bin"),
    "an adapter beside": case(add("adapter_config.json", "{}"), "strange", places="adapter_config.json"),
    "a second template": case(add("chat_template.json", "{}"), "strange", source=True, places="chat_template.json"),
    "generation_config altered": case(
        lambda folder: edit_json(folder, lambda g: g.update(eos_token_id=258), "generation_config.json"),
        "companion", source=True, places="generation_config.json",
    ),
    "tokenizer_config altered": case(
        lambda folder: edit_json(folder, lambda t: t.update(add_bos_token=False), "tokenizer_config.json"),
        "companion", source=True, places="tokenizer_config.json",
    ),
    "processor altered": case(
        lambda folder: edit_json(folder, lambda p: p.update(size=1), "preprocessor_config.json"),
        "companion", source=True, places="preprocessor_config.json",
    ),
    # token ids
    "a token beyond the embedding": case(
        lambda folder: edit_json(folder, lambda t: t["added_tokens"].append({"id": 384, "content": "<x>"}), "tokenizer.json"),
        "tokenizer", places="tokenizer.json",
    ),
    "a vocabulary beyond the embedding": case(
        lambda folder: edit_json(folder, lambda t: t["model"]["vocab"].update({"zzz": 384}), "tokenizer.json"),
        "tokenizer", places="tokenizer.json",
    ),
    "a special token beyond the embedding": case(
        lambda folder: edit_json(folder, lambda g: g.update(eos_token_id=[257, 384]), "generation_config.json"),
        "tokenizer", places="generation_config.json",
    ),
    # rounded matrices, to the bit
    "scale rows exchanged": case(put(f"{GATE}.weight_scale", lambda s: s.flip(0)), "weights", source=True, places=GATE),
    "one scale doubled": case(put(f"{GATE}.weight_scale", times(2.0)), "weights", source=True, places=GATE),
    "one scale halved": case(put(f"{GATE}.weight_scale", times(0.5)), "weights", source=True, places=GATE),
    "one scale a hair off": case(put(f"{GATE}.weight_scale", times(1.008)), "weights", source=True, places=GATE),
    "one FP8 code a step off": case(
        put(f"{GATE}.weight", lambda w: (w.view(torch.uint8) ^ (torch.arange(128 * 128).view(128, 128) == 700)).view(torch.float8_e4m3fn)),
        "weights", recipe="fp8", source=True, places=GATE,
    ),
    # weight files
    "truncated": case(truncate, "shard", places="model.safetensors"),
    "a shard no index names": case(extra_shard, "index", places="model.safetensors.index.json"),
}  # fmt: skip

INDEX = "model.safetensors.index.json"


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _move(index: dict[str, Any]) -> None:
    names, files = list(index["weight_map"]), sorted(set(index["weight_map"].values()))
    index["weight_map"][names[0]] = next(file for file in files if file != index["weight_map"][names[0]])


def _truncate_second(folder: Path) -> None:
    path = _shards(folder)[1]
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[:-10])


BROKEN_SHARDS: dict[str, Broken] = {
    "total_size wrong": case(
        lambda folder: edit_json(folder, lambda i: i["metadata"].update(total_size=1), INDEX), "index", places=INDEX
    ),
    "a name placed in another shard": case(lambda folder: edit_json(folder, _move, INDEX), "index"),
    "a name not listed": case(lambda folder: edit_json(folder, lambda i: i["weight_map"].popitem(), INDEX), "index"),
    "a name outside the folder": case(
        lambda folder: edit_json(folder, lambda i: i["weight_map"].update(a="../a.safetensors"), INDEX),
        "index",
        places=INDEX,
    ),
    "a shard missing": case(lambda folder: _shards(folder)[1].unlink(), "shard", "index", "missing"),
    "a shard truncated": case(_truncate_second, "shard", places="model-00002"),
    "an unlisted shard": case(extra_shard, "shard", "index", places="left-over"),
    "no index": case(remove(INDEX), "index", places=INDEX),
}
