"""Tiny Llama 4 checkpoints, and quantized artifacts made from them with compressed-tensors alone.

Three folders of one model: `write_source` the BF16 original with fused experts, `write_artifact` its quantized form, and
`write_dequantized` a BF16 source again, holding exactly the values the artifact stands for. The last reads only the
artifact's bytes and config.json, through compressed-tensors' decompressors, so it serves any writer's artifact.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
PREFIX = "language_model."
ALWAYS_IGNORED = ["re:.*lm_head", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]
UNQUANTIZED_ATTENTION = "re:.*self_attn.*"

TOKEN_FP8 = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True, observer=None)
GROUP_FP8 = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=128, dynamic=True, observer=None)
TENSOR_FP8 = QuantizationArgs(num_bits=8, type="float", strategy="tensor")


def int_scheme(
    num_bits: int = 4, strategy: str = "group", group_size: int | None = 128, symmetric: bool = True
) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=num_bits, type="int", strategy=strategy, group_size=group_size, symmetric=symmetric
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")


def fp8_scheme(strategy: str = "channel", activations: QuantizationArgs | None = TOKEN_FP8) -> QuantizationScheme:
    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    weights = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **block)
    return QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=activations, format="float-quantized"
    )


def text_config(*, interleave: int, layers: int, head_dim: int, hidden: int = 256) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_chunk_size": 128,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "floor_scale": 8192,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "interleave_moe_layer_step": interleave,
        "intermediate_size": 256,
        "intermediate_size_mlp": 512,
        "max_position_embeddings": 1024,
        "model_type": "llama4_text",
        "moe_layers": list(range(interleave - 1, layers, interleave)),
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)],
        "num_attention_heads": 4,
        "num_experts_per_tok": 1,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "vocab_size": 512,
    }


def vision_config() -> dict[str, Any]:
    return {
        "hidden_act": "gelu",
        "hidden_size": 64,
        "image_size": 28,
        "intermediate_size": 256,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-5,
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 1,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 64,
    }


def model_config(
    *, interleave: int = 1, layers: int = 2, head_dim: int = 64, multimodal: bool = True
) -> dict[str, Any]:
    text = text_config(interleave=interleave, layers=layers, head_dim=head_dim)
    if not multimodal:
        return {"architectures": ["Llama4ForCausalLM"], "dtype": "bfloat16", **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 500,
        "dtype": "bfloat16",
        "eoi_token_index": 501,
        "image_token_index": 502,
        "model_type": "llama4",
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": vision_config(),
    }


def write_source(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write a random BF16 checkpoint as Llama 4 is released: experts fused, `[expert, in, out]`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(torch.bfloat16)

    return _write(folder, config, {name: random(*shape) for name, shape in _shapes(config).items()})


def write_artifact(source: Path, folder: Path, schemes: Mapping[str, QuantizationScheme]) -> Path:
    """Quantize `source` by round-to-nearest. `schemes` maps a regular expression of module names to a scheme."""
    config = json.loads((source / "config.json").read_text())
    tensors: Tensors = {}
    for name, tensor in unfuse(load_file(source / "model.safetensors")).items():
        module = name.removesuffix(".weight")
        scheme = next((s for pattern, s in schemes.items() if _is_linear(name) and re.search(pattern, module)), None)
        if scheme is None:
            tensors[name] = tensor
        else:
            tensors |= {f"{module}.{suffix}": value for suffix, value in compress(tensor, scheme).items()}
    config["quantization_config"] = quantization_config(schemes)
    return _write(folder, config, tensors)


def write_dequantized(artifact: Path, folder: Path) -> Path:
    """Write the BF16 source, experts fused, whose every weight is what `artifact` dequantizes to."""
    config = json.loads((artifact / "config.json").read_text())
    quantization = config.pop("quantization_config")
    groups = [QuantizationScheme.model_validate(group) for group in quantization["config_groups"].values()]
    by_module: dict[str, Tensors] = {}
    for name, tensor in load_file(artifact / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        by_module.setdefault(module, {})[suffix] = tensor
    plain: Tensors = {}
    for module, parts in by_module.items():
        if "weight_scale" in parts:
            parts = {"weight": decompress(parts, _group_of(module, groups)).to(torch.bfloat16)}
        plain |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    return _write(folder, config, fuse(plain))


def compress(weight: torch.Tensor, scheme: QuantizationScheme) -> Tensors:
    args = scheme.weights
    assert args is not None
    scale, zero_point = _qparams(weight.float(), args)
    state = {
        "weight": weight,
        "weight_scale": scale.to(torch.bfloat16),
        "weight_zero_point": zero_point.float().round().to(torch.int8),
    }
    compressed = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    activations = scheme.input_activations
    if activations is not None and not activations.dynamic:
        compressed["input_scale"] = torch.tensor([0.01])
    return {suffix: tensor.contiguous() for suffix, tensor in compressed.items()}


def decompress(parts: Tensors, scheme: QuantizationScheme) -> torch.Tensor:
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]


def quantization_config(schemes: Mapping[str, QuantizationScheme]) -> dict[str, Any]:
    formats = {str(scheme.format) for scheme in schemes.values()}
    attention = any(re.search(pattern, "self_attn.q_proj") for pattern in schemes)
    groups = {}
    for index, (pattern, scheme) in enumerate(schemes.items()):
        group = scheme.model_dump(mode="json")
        groups[f"group_{index}"] = group | {"targets": ["Linear"] if pattern == "" else [f"re:.*{pattern}.*"]}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ALWAYS_IGNORED + ([] if attention else [UNQUANTIZED_ATTENTION]),
        "config_groups": groups,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def unfuse(tensors: Tensors) -> Tensors:
    """Experts as one `[out, in]` matrix each, under the names every runtime reads."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith("experts"):
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(2, dim=-1) if last == "gate_up_proj" else [matrix]
            projections = ["gate_proj", "up_proj"] if last == "gate_up_proj" else ["down_proj"]
            for projection, part in zip(projections, parts, strict=True):
                result[f"{prefix}.{expert}.{projection}.weight"] = part.T.contiguous()
    return result


def fuse(tensors: Tensors) -> Tensors:
    """The inverse of `unfuse`."""
    result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    prefixes = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for prefix in sorted(prefixes):
        experts = range(sum(name.startswith(f"{prefix}.experts.") for name in tensors) // 3)

        def stack(projection: str, prefix: str = prefix, experts: range = experts) -> torch.Tensor:
            return torch.stack([tensors[f"{prefix}.experts.{e}.{projection}.weight"].T for e in experts])

        result[f"{prefix}.experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=-1)
        result[f"{prefix}.experts.down_proj"] = stack("down_proj").contiguous()
    return result


def edit_tensors(folder: Path, change: Any) -> None:
    """Replace the folder's tensors by `change(tensors)`: how tests break an artifact."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _qparams(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    if args.strategy == "tensor":
        blocks = weight.reshape(1, -1)
        shape: tuple[int, ...] = (1,)
    elif args.strategy == "block":
        assert args.block_structure is not None
        height, width = args.block_structure
        tiled = weight.reshape(rows // height, height, columns // width, width)
        blocks = tiled.transpose(1, 2).reshape(-1, height * width)
        shape = (rows // height, columns // width)
    else:
        size = columns if args.strategy == "channel" else args.group_size
        assert size is not None
        blocks = weight.reshape(-1, size)
        shape = (rows, columns // size)
    scale, zero_point = calculate_qparams(blocks.amin(dim=1), blocks.amax(dim=1), args)
    return scale.reshape(shape), zero_point.reshape(shape)


def _is_linear(name: str) -> bool:
    return bool(re.search(r"layers\.\d+\.(self_attn|feed_forward)\..*_proj\.weight$", name)) and "vision" not in name


def _group_of(module: str, groups: list[QuantizationScheme]) -> QuantizationScheme:
    for group in groups:
        for target in group.targets:
            if target == "Linear" or (target.startswith("re:") and re.match(target[3:], module)) or target == module:
                return group
    raise LookupError(module)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    multimodal = "vision_config" in config
    text = config["text_config"] if multimodal else config
    prefix = PREFIX if multimodal else ""
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}model.embed_tokens.weight": (vocabulary, hidden),
        f"{prefix}model.norm.weight": (hidden,),
        f"{prefix}lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(text["num_hidden_layers"]):
        shapes |= {f"{prefix}model.layers.{layer}.{k}": v for k, v in _layer_shapes(text, layer).items()}
    return shapes | (_vision_shapes(config["vision_config"], hidden) if multimodal else {})


def _layer_shapes(text: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, experts = text["hidden_size"], text["intermediate_size"], text["num_local_experts"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
    }
    if layer not in text["moe_layers"]:
        return shapes | _mlp_shapes("feed_forward", hidden, text["intermediate_size_mlp"])
    return (
        shapes
        | _mlp_shapes("feed_forward.shared_expert", hidden, inner)
        | {
            "feed_forward.router.weight": (experts, hidden),
            "feed_forward.experts.gate_up_proj": (experts, hidden, 2 * inner),
            "feed_forward.experts.down_proj": (experts, inner, hidden),
        }
    )


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _vision_shapes(vision: dict[str, Any], text_hidden: int) -> dict[str, tuple[int, ...]]:
    size, inner, out = vision["hidden_size"], vision["intermediate_size"], vision["projector_output_dim"]
    patch = vision["patch_size"] ** 2 * vision["num_channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.class_embedding": (size,),
        "vision_model.positional_embedding_vlm": ((vision["image_size"] // vision["patch_size"]) ** 2 + 1, size),
        "vision_model.patch_embedding.linear.weight": (size, patch),
        "vision_model.vision_adapter.mlp.fc1.weight": (vision["projector_input_dim"], inner),
        "vision_model.vision_adapter.mlp.fc2.weight": (out, out),
        "multi_modal_projector.linear_1.weight": (text_hidden, vision["vision_output_dim"]),
    }
    layers = {f"vision_model.model.layers.{layer}." for layer in range(vision["num_hidden_layers"])}
    for norm in ["vision_model.layernorm_pre", "vision_model.layernorm_post"]:
        shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    for prefix in layers:
        for name in ["input_layernorm", "post_attention_layernorm"]:
            shapes |= {f"{prefix}{name}.weight": (size,), f"{prefix}{name}.bias": (size,)}
        for name in "qkvo":
            module = f"{prefix}self_attn.{name}_proj"
            shapes |= {f"{module}.weight": (size, size), f"{module}.bias": (size,)}
        shapes |= {f"{prefix}mlp.fc1.weight": (inner, size), f"{prefix}mlp.fc1.bias": (inner,)}
        shapes |= {f"{prefix}mlp.fc2.weight": (size, inner), f"{prefix}mlp.fc2.bias": (size,)}
    return shapes


def _write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
