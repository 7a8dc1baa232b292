"""The slow way: a whole model loaded by transformers, run on everything at once. What streaming is held against."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompressedTensorsConfig, Llama4ForCausalLM, Llama4ForConditionalGeneration


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower with two threads, much slower on a busy machine. Import it to use it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path, *, quantized: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A model in float32; a quantized one dequantized by compressed-tensors in `dtype` first."""
    text_only = '"llama4_text"' in (folder / "config.json").read_text().split('"text_config"')[0]
    kind = Llama4ForCausalLM if text_only else Llama4ForConditionalGeneration
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = kind.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model if dtype is torch.float32 else _widened(model)


def _widened(model: Any) -> Any:
    """To float32 without touching complex buffers."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


@torch.no_grad()
def logits(model: Any, sequences: Sequence[Sequence[int]], **inputs: Any) -> list[Tensor]:
    """float32 [length, vocabulary] of each sequence, run alone."""
    return [model(input_ids=torch.tensor([list(ids)]), **inputs).logits[0].float() for ids in sequences]


def log_probabilities(rows: Tensor) -> Tensor:
    """float64 log-softmax."""
    return rows.double().log_softmax(-1)
