"""LoRA adapters for tests: written by hand in peft's format, on models of any size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "peft_version": "0.21.2", "r": 4,
    "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none", "target_modules": ["q_proj"], "fan_in_fan_out": False,
    "init_lora_weights": True, "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
    "loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16, "inference_mode": True,
}  # fmt: skip
LAYER = "base_model.model.language_model.model.layers.0."


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32 normal numbers of a size that changes weights visibly."""
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(module: str, rows: int, columns: int, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """The two matrices of a module [rows, columns]."""
    first, second = numbers(rank, columns, seed=seed), numbers(rows, rank, seed=seed + 1)
    return {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": second}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter's folder; keywords change its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
