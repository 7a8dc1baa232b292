"""A checkpoint of transformers' split as Meta releases one: `consolidated.NN.pth` and `params.json`.

Written from llama-models alone, with torch: its modules say which axis of a weight is parallel, its load hooks what the
files call it and how it is stacked. Nothing of l4pack is used.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

BESIDE = ("tokenizer", "special", "chat_template", "generation", "preprocessor", "processor", "LICENSE")


def params_of(config):
    """What Meta's ModelArgs take, of a transformers configuration."""
    text, vision = config.get("text_config", config), config.get("vision_config")
    flags = text.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(text["num_hidden_layers"])]
    interval = flags.index(0) + 1 if 0 in flags else None
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or text.get("rope_theta") or 500000.0
    rope = rope if rope.get("rope_type", "default") != "default" else None
    params = {
        "dim": text["hidden_size"], "n_layers": text["num_hidden_layers"], "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"], "head_dim": text["head_dim"], "vocab_size": -1,
        "ffn_dim_multiplier": 1.2, "multiple_of": 2048, "ffn_exp": 4.0, "norm_eps": text.get("rms_norm_eps", 1e-5),
        "rope_theta": theta, "use_scaled_rope": rope is not None,
        "nope_layer_interval": interval, "use_qk_norm": text.get("use_qk_norm", True),
        "attention_chunk_size": text.get("attention_chunk_size", 8192),
        "moe_args": {"num_experts": text["num_local_experts"], "capacity_factor": 1.0, "top_k": 1,
                     "interleave_moe_layer_step": text.get("interleave_moe_layer_step", 1)},
    }  # fmt: skip
    if rope is not None:
        params |= {"rope_scaling_factor": rope["factor"], "rope_high_freq_factor": rope["high_freq_factor"]}
    if vision is not None:
        side = {"height": vision["image_size"], "width": vision["image_size"]}
        patch = {"height": vision["patch_size"], "width": vision["patch_size"]}
        params["vision_args"] = {
            "image_size": side, "patch_size": patch, "dim": vision["hidden_size"], "n_layers": vision["num_hidden_layers"],
            "n_heads": vision["num_attention_heads"], "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "output_dim": vision["vision_output_dim"], "pixel_shuffle_ratio": vision["pixel_shuffle_ratio"],
        }  # fmt: skip
    return params


def shard(tensors, rank, world):
    """The state that rank `rank` of `world` has, as trained: fused, stacked and 2-D as llama-models' hooks expect."""

    def column(weight):  # ColumnParallelLinear: outputs are parallel
        return weight.chunk(world, 0)[rank]

    def row(weight):  # RowParallelLinear: inputs are parallel
        return weight.chunk(world, 1)[rank]

    def copy(value):
        return value

    state = {}
    text = "language_model." if any(name.startswith("language_model.") for name in tensors) else ""
    get = {name.removeprefix(text): value for name, value in tensors.items()}
    state["tok_embeddings.weight"] = column(get["model.embed_tokens.weight"])
    state["output.weight"] = column(get["lm_head.weight"])
    state["norm.weight"] = get["model.norm.weight"]
    for layer in range(1 + max(int(name.split(".")[2]) for name in get if name.startswith("model.layers."))):
        hf, meta = f"model.layers.{layer}.", f"layers.{layer}."
        stacked = [column(get[f"{hf}self_attn.{one}_proj.weight"]) for one in "qkv"]
        state[f"{meta}attention.wqkv.weight"] = torch.cat(stacked)
        state[f"{meta}attention.wqkv.layer_norm_weight"] = get[f"{hf}input_layernorm.weight"]
        state[f"{meta}attention.wo.weight"] = row(get[f"{hf}self_attn.o_proj.weight"])
        state[f"{meta}attention.wo._extra_state"] = io.BytesIO(b"\x80\xffof training")
        mlp, norm = f"{hf}feed_forward.", get[f"{hf}post_attention_layernorm.weight"]
        if f"{mlp}router.weight" not in get:
            gate_up = [column(get[f"{mlp}{one}_proj.weight"]) for one in ("gate", "up")]
            state[f"{meta}feed_forward.mlp.fc1_weight"] = torch.cat(gate_up)
            state[f"{meta}feed_forward.mlp.fc2_weight"] = row(get[f"{mlp}down_proj.weight"])
            state[f"{meta}feed_forward.mlp.layer_norm_weight"] = norm
            continue
        gate, up = get[f"{mlp}experts.gate_up_proj"].chunk(2, -1)  # [E, D, F] each
        down = get[f"{mlp}experts.down_proj"]  # [E, F, D]
        experts, width = gate.shape[:2]
        for name, value in (("moe_w_in_eD_F", gate), ("moe_w_swiglu_eD_F", up)):
            state[f"{meta}feed_forward.experts.{name}"] = value.chunk(world, 2)[rank].reshape(experts * width, -1)
        state[f"{meta}feed_forward.experts.moe_w_out_eF_D"] = down.chunk(world, 1)[rank].reshape(-1, down.shape[2])
        state[f"{meta}feed_forward.router_DE"] = get[f"{mlp}router.weight"].T.contiguous()
        state[f"{meta}feed_forward.norm.weight"] = norm
        state[f"{meta}feed_forward.global_gate_stats_3E"] = torch.zeros(3, experts)
        for name, own, split in (("w_in_shared_FD", "gate", column), ("w_swiglu_FD", "up", column),
                                 ("w_out_shared_DF", "down", row)):  # fmt: skip
            weight = get[f"{mlp}shared_expert.{own}_proj.weight"]
            state[f"{meta}feed_forward.{name}.weight"] = split(weight)
    state["rope.freqs"] = torch.ones(4)
    if "vision_model.class_embedding" in tensors:
        state |= vision(tensors, column, row, copy)
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def vision(tensors, column, row, copy):
    tower = "vision_embeddings.vision_encoder."
    state = {
        f"{tower}class_embedding": tensors["vision_model.class_embedding"],
        f"{tower}positional_embedding_vlm": tensors["vision_model.positional_embedding_vlm"],
        f"{tower}conv1._linear.weight": column(tensors["vision_model.patch_embedding.linear.weight"]),
        "vision_embeddings.vision_adapter.mlp.c_fc.weight": column(
            tensors["vision_model.vision_adapter.mlp.fc1.weight"]
        ),
        "vision_embeddings.vision_adapter.mlp.c_proj.weight": row(
            tensors["vision_model.vision_adapter.mlp.fc2.weight"]
        ),
        "vision_projection.weight": column(tensors["multi_modal_projector.linear_1.weight"]),
    }
    for kind in ("weight", "bias"):
        state[f"{tower}ln_pre.{kind}"] = tensors[f"vision_model.layernorm_pre.{kind}"]
        state[f"{tower}ln_post.{kind}"] = tensors[f"vision_model.layernorm_post.{kind}"]
    modules = {
        "self_attn.q_proj": ("attn.wq", column, column), "self_attn.k_proj": ("attn.wk", column, column),
        "self_attn.v_proj": ("attn.wv", column, column), "self_attn.o_proj": ("attn.wo", row, copy),
        "mlp.fc1": ("mlp.c_fc", column, column), "mlp.fc2": ("mlp.c_proj", row, copy),
        "input_layernorm": ("ln_1", copy, copy), "post_attention_layernorm": ("ln_2", copy, copy),
    }  # fmt: skip
    layers = {int(name.split(".")[3]) for name in tensors if name.startswith("vision_model.model.layers.")}
    for layer in layers:
        for own, (name, weight, bias) in modules.items():
            block, hf = f"{tower}transformer.resblocks.{layer}.{name}", f"vision_model.model.layers.{layer}.{own}"
            state[f"{block}.weight"] = weight(tensors[f"{hf}.weight"])
            state[f"{block}.bias"] = bias(tensors[f"{hf}.bias"])
    return state


def write_release(source: Path, folder: Path, world: int, change=lambda rank, state: state, *, companions=True) -> Path:
    """Split the checkpoint in `source` into `world` files in `folder`; `change` may spoil a shard's state first."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for path in sorted(source.glob("*.safetensors")) for name, value in load_file(path).items()}
    for rank in range(world):
        torch.save(change(rank, shard(tensors, rank, world)), folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(params_of(json.loads((source / "config.json").read_text()))))
    for path in source.iterdir() if companions else ():
        if path.name.startswith(BESIDE):
            shutil.copy(path, folder / path.name)
    return folder
