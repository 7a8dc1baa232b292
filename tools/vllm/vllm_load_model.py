"""Build vLLM's Llama 4 model for a checkpoint folder and run its own `load_weights`, watching what it writes.

Every parameter is filled with a value no checkpoint holds ("poison") before loading. What is still poison afterwards was
not loaded, whatever the loader says it loaded.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

FLOAT8_NAN = 0x7F
WORD = 8  # bytes that are compared at once
KV_SCALES = (".k_scale", ".v_scale")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and where."""

    rule: str
    where: str
    message: str


@dataclass
class Loaded:
    """A model after loading, and what was found on the way. `model` is None when it could not be built."""

    model: nn.Module | None = None
    tensors_read: int = 0
    kv_scales: int = 0
    findings: list[Finding] = field(default_factory=list)

    def find(self, rule: str, where: str, message: str) -> None:
        """Record one finding."""
        self.findings.append(Finding(rule, where, message))


def load(folder: Path) -> Loaded:
    """Run vLLM's loader on `folder` (config.json, safetensors); its errors become findings.

    Needs `start_single_rank` first.
    """
    result = Loaded()
    try:
        config = _vllm_config(folder)
        model = _build(config)
    except Exception as error:
        result.find("build", "config.json", _describe(error))
        return result
    result.model = model
    poison(model)
    written = _load_weights(model, config, result)
    if written is not None:
        _check_written(model, written, result)
    return result


def poison(model: nn.Module) -> None:
    """Fill every parameter with NaN (floats), 0x7f (FP8, its NaN) or a pattern of its own (integers)."""
    for name, parameter in model.named_parameters():
        data = parameter.data
        if data.is_floating_point() and data.element_size() == 1:
            data.view(torch.uint8).fill_(FLOAT8_NAN)
        elif data.is_floating_point():
            data.fill_(float("nan"))
        else:
            data.copy_(_pattern(name, data))


def unwritten(name: str, data: torch.Tensor) -> int:
    """Count the elements of a parameter that are still poison."""
    if data.is_floating_point() and data.element_size() == 1:
        return int((data.view(torch.uint8) == FLOAT8_NAN).sum())
    if data.is_floating_point():
        return int(data.isnan().sum())
    if data.element_size() == 1:  # every byte is a legal pair of FP4 codes, or a scale: eight at once are no chance
        return WORD * int((_words(data) == _words(_pattern(name, data))).sum())
    same = int((data == _pattern(name, data)).sum())
    # Any 32-bit word is a legal run of packed weights, so a chance hit in a large tensor is not a fault.
    return same if same > data.numel() // 2**24 else 0


def _pattern(name: str, data: torch.Tensor) -> torch.Tensor:
    generator, limits = torch.Generator().manual_seed(zlib.crc32(name.encode())), torch.iinfo(data.dtype)
    return torch.randint(limits.min, limits.max, data.shape, generator=generator, dtype=data.dtype)


def _words(data: torch.Tensor) -> torch.Tensor:
    """Bytes, eight together."""
    return data.reshape(-1)[: data.numel() // WORD * WORD].view(torch.int64)


def _vllm_config(folder: Path) -> Any:
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig

    model_config = ModelConfig(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
    )
    return VllmConfig(
        model_config=model_config,
        device_config=DeviceConfig("cpu"),
        load_config=LoadConfig(load_format="safetensors", use_tqdm_on_load=False),  # never a pickle
    )


def start_single_rank() -> None:
    """Set up the process groups vLLM's layers ask for: one rank, no network."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")


def _build(config: Any) -> nn.Module:
    from vllm.model_executor.model_loader.utils import initialize_model

    previous = torch.get_default_dtype()
    torch.set_default_dtype(config.model_config.dtype)
    try:
        model: nn.Module = initialize_model(config, model_config=config.model_config)
        return model
    finally:
        torch.set_default_dtype(previous)


def _load_weights(model: Any, config: Any, result: Loaded) -> set[str] | None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(config.load_config)
    names: list[str] = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in loader.get_all_weights(config.model_config, model):
            names.append(name)
            yield name, tensor

    try:
        with set_current_vllm_config(config):
            written: set[str] = model.load_weights(watched())
    except Exception as error:
        result.find("load", names[-1] if names else "model.safetensors", _describe(error))
        return None
    result.tensors_read = len(names)
    _check_kv_scales(names, written, result)
    return written


def _check_kv_scales(names: list[str], written: set[str], result: Loaded) -> None:
    """A KV cache scale nobody has a place for is dropped without a word; everything else is an error in vLLM."""
    offered = [name for name in names if name.endswith(KV_SCALES)]
    result.kv_scales = sum(name.endswith(KV_SCALES) for name in written)
    if len(offered) != result.kv_scales:
        result.find("ignored", offered[0], f"{len(offered)} KV cache scales in the files, {result.kv_scales} loaded")


def _check_written(model: nn.Module, written: set[str], result: Loaded) -> None:
    optional = _kv_cache_parameters(model)
    for name, parameter in model.named_parameters():
        if name in optional and name not in written:
            continue
        missing = unwritten(name, parameter.data)
        if missing or name not in written:
            total = parameter.numel()
            result.find("unwritten", name, f"{missing or total} of {total} values did not come from the checkpoint")


def _kv_cache_parameters(model: nn.Module) -> set[str]:
    """Scales vLLM defaults when a checkpoint has none."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
        for parameter, _ in module.named_parameters()
    }


def _describe(error: Exception) -> str:
    """One line: what vLLM raised."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
