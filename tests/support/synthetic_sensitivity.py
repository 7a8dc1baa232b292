"""Measurements that nobody measured: losses that fall with bits, differ by role and layer, and carry noise if asked to."""

from __future__ import annotations

import numpy as np

from l4pack.measure.identity import model_fingerprint
from l4pack.measure.record import ChangeRecord, ModelId, Sensitivity
from l4pack.recipe import RecipeScheme

INT = {"format": "pack-quantized", "strategy": "group"}
FP8 = {"format": "float-quantized", "num_bits": 8, "type": "float"}
OPTIONS = {
    "int4": {**INT, "num_bits": 4, "group_size": 128, "observer": "mse", "method": "gptq"},
    "int4-g32": {**INT, "num_bits": 4, "group_size": 32, "observer": "mse", "method": "gptq"},
    "int4-rtn": {**INT, "num_bits": 4, "group_size": 128},
    "int4-asym": {**INT, "num_bits": 4, "group_size": 128, "symmetric": False},
    "int8": {**INT, "num_bits": 8, "group_size": 128},
    "fp8": {**FP8, "strategy": "channel", "activations": "dynamic_token"},
    "fp8-block": {**FP8, "strategy": "block", "block_structure": [128, 128], "activations": "dynamic_group"},
    "fp8-plain": {**FP8, "strategy": "channel"},
}
ROUNDED = {
    "int4-g32-rtn": {**INT, "num_bits": 4, "group_size": 32},
    "int4-g64-rtn": {**INT, "num_bits": 4, "group_size": 64},
    "int8-g32": {**INT, "num_bits": 8, "group_size": 32},
    "mxfp4-rtn": {"format": "mxfp4-pack-quantized", "num_bits": 4, "type": "float", "group_size": 32},
    "q4_k-rtn": {"format": "ggml-q4_k", "num_bits": 4, "scale_dtype": "q4_k"},
}
"""Options of other runtimes' files, which are made in seconds."""
BITS = {
    "int4": 4.3,
    "int4-g32": 4.8,
    "int4-rtn": 4.0,
    "int4-asym": 4.2,
    "int8": 8.1,
    "fp8": 6.5,
    "fp8-block": 6.6,
    "fp8-plain": 6.7,
    "int4-g32-rtn": 4.6,
    "int4-g64-rtn": 4.3,
    "int8-g32": 8.4,
    "mxfp4-rtn": 4.1,
    "q4_k-rtn": 4.9,
}
WEIGHT = {"routed_expert": 1.0, "shared_expert": 0.3, "dense_mlp": 0.5, "attention": 0.4}


def synthetic(checkpoint, seed=0, noise=0.0, options=tuple(OPTIONS), **changes) -> Sensitivity:
    """A record for every unit of a model, the model's own unless `changes` says another fingerprint."""
    random = np.random.default_rng(seed)
    layers = checkpoint.config.text.num_hidden_layers
    found = []
    for layer, role in sorted({(linear.layer, linear.role) for linear in checkpoint.layout.linears}):
        scale = WEIGHT[role.value] * float(np.exp(random.normal(0, 0.7))) * (1 + 2 * (layer in (0, layers - 1)))
        for name in options:
            error = float(4.0 ** -BITS[name])
            kl = 0.4 * scale * error * float(np.exp(random.normal(0, 0.2))) + noise * float(random.normal())
            found.append(
                ChangeRecord(
                    layer=layer, role=role, option=name, error=error, kl=kl, kl_standard_error=noise, measured=True
                )
            )
    own = ModelId(name=checkpoint.name, fingerprint=model_fingerprint(checkpoint), layers=layers)
    return Sensitivity(
        l4pack="0.1.0", model=changes.get("model", own), text={}, calibration={},
        options={name: RecipeScheme.model_validate({**OPTIONS, **ROUNDED}[name]) for name in options}, changes=found,
    )  # fmt: skip
