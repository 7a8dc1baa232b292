"""Artifacts as transformers loads them, and what compressed-tensors makes of their matrices."""

from __future__ import annotations

import json

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

from l4pack.artifact.patterns import matches

TOKENS = torch.tensor([[256, *range(40), 7, 65, 130, 255, 9]])


def model_class(kind):
    return Llama4ForCausalLM if kind == "text" else Llama4ForConditionalGeneration


def load(folder, kind, **options):
    model, info = model_class(kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    wrong = {name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]}
    if "quantization_config" in options:  # transformers names fixed activation scales that it has no use for
        wrong = {name for name in wrong if not name.endswith(".input_scale")}
    wrong = {name for name in wrong if not name.endswith(".input_global_scale")}  # what vLLM asks for, see formats
    assert not wrong
    return model.eval()


def weights(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def schema(folder):
    """The artifact's stanza as compressed-tensors reads it."""
    return QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])


def decompressed(folder, *, exact=False):
    """The artifact's weights by compressed-tensors' decompressor: module name to float32 [out, in].

    Products are rounded to the scale's dtype, as runtimes do; `exact` leaves them as they are.
    """
    groups = schema(folder).config_groups.values()
    parts = {}
    for name, tensor in weights(folder).items():
        module, _, suffix = name.rpartition(".")
        parts.setdefault(module, {})[suffix] = tensor
    dense = {}
    for module, state in parts.items():
        if "weight_scale" in state:
            if exact:
                state["weight_scale"] = state["weight_scale"].float()
            scheme = next(group for group in groups if _aims_at(group.targets, module))
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            dense[module] = compressor.decompress(dict(state), scheme)["weight"].float()
    return dense


def _aims_at(targets, module):
    return "Linear" in targets or any(matches(target, module) for target in targets)


@torch.no_grad()
def reference(source, kind, dense):
    """The source's model, fused and unquantized, with some matrices replaced."""
    model = load(source, kind)
    parameters = dict(model.named_parameters())
    left = dict(dense)
    for name, parameter in parameters.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert in range(len(parameter)):
                halves = parameter[expert].chunk(2, dim=-1)
                for half, projection in zip(halves, ("gate_proj", "up_proj"), strict=True):
                    half.copy_(left.pop(f"{prefix}.{expert}.{projection}", half.T).T)
        elif last == "down_proj":
            for expert in range(len(parameter)):
                matrix = parameter[expert]
                matrix.copy_(left.pop(f"{prefix}.{expert}.down_proj", matrix.T).T)
        elif last == "weight" and prefix in left:
            parameter.copy_(left.pop(prefix))
    assert not left
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits
