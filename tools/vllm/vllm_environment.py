"""Make vLLM's Python sources importable on a machine with no accelerator and none of vLLM's compiled parts.

vLLM's wheel is CUDA only and pulls gigabytes of CUDA packages. What its weight loader and its KV cache planner do is plain
Python and torch, so the sources alone are enough once three things are in place: the platform is said to be a CPU, the
installed version can be looked up, and the packages that only the server or the kernels need are replaced by empty stand-ins.
Call `prepare()` before the first import of anything below `vllm`.
"""

import atexit
import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VLLM_VERSION = "0.33.0"

STAND_INS = (
    "anthropic",
    "cv2",
    "llguidance",
    "lmformatenforcer",
    "mcp",
    "mistral_common",
    "openai_harmony",
    "outlines_core",
    "torchvision",
    "uvloop",
    "xgrammar",
)
"""Packages the loader and the planner import on their way but never call."""


class _AnyAttribute(type):
    """Enumeration members and class constants of a stand-in exist, whatever they are called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Placeholder()


class _Placeholder(metaclass=_AnyAttribute):
    """Stands for any class or function of a package that is not there: can be subclassed and annotated with."""

    def __init_subclass__(cls, **_: Any) -> None:
        return

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> dict[str, str]:
        return {"type": "any"}


class _StandInModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Placeholder,), {"__module__": self.__name__})


class _StandInFinder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in STAND_INS:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, _module: ModuleType) -> None:
        return


def prepare() -> None:
    """Let `import vllm...` succeed in this process."""
    os.environ |= {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CACHE_ROOT": _temporary_folder(),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    logging.disable(logging.ERROR)  # what is missing here is missing on purpose
    _settle_torchvision()
    sys.meta_path.append(_StandInFinder())
    _pretend_installed()
    _inspect_models_in_process()


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="vllm-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _settle_torchvision() -> None:
    """Let transformers remember that there is no torchvision before a stand-in makes it look as if there were."""
    from transformers.utils.import_utils import is_torchvision_available

    if is_torchvision_available():
        raise SystemExit("this environment has torchvision; make a fresh one with tools/vllm/make_vllm_venv.sh")


def _pretend_installed() -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        return f"{VLLM_VERSION}+cpu" if name == "vllm" else real(name)

    importlib.metadata.version = version


def _inspect_models_in_process() -> None:
    """vLLM imports a model class in a fresh interpreter to keep CUDA out of this one; that one lacks the stand-ins."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()


class _NoKernel:
    """Stands for the compiled kernel a layer would run with: the layout of what it loads does not depend on it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def input_quant_key(self) -> None:
        """The kernel quantizes its own input."""
        return


def skip_kernel_selection() -> None:
    """Let quantized layers be built without a kernel.

    Which kernel vLLM takes depends on the machine, and none runs here. Everything a layer checks by itself (group
    sizes, block shapes, Marlin's tile sizes for experts) still runs, and so does what Marlin, the kernel that every GPU
    from Ampere on has for integer weights, says of bits and groups.
    """
    _skip_integers_and_fp8()
    _skip_fp4()


def _skip_integers_and_fp8() -> None:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8,
        compressed_tensors_moe_wna16,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8,
        compressed_tensors_w8a16_fp8,
        compressed_tensors_wNa16,
    )
    from vllm.model_executor.layers.quantization.utils.marlin_utils import MARLIN_SUPPORTED_GROUP_SIZES

    def linear_kernel(config: Any) -> type:
        if config.group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
            raise ValueError(f"Marlin takes groups of {MARLIN_SUPPORTED_GROUP_SIZES}, not of {config.group_size}")
        return _NoKernel

    def expert_backend(weight_key: Any, **_: Any) -> tuple[Any, None]:
        if not MarlinExperts._supports_quant_scheme(weight_key, None):
            raise ValueError(f"Marlin has no kernel for experts in {weight_key}")
        return WNA16MoEBackend.MARLIN, None

    compressed_tensors_wNa16.choose_mp_linear_kernel = linear_kernel
    compressed_tensors_w8a8_fp8.init_fp8_linear_kernel = _NoKernel
    compressed_tensors_w8a16_fp8.init_wfp8_a16_linear_kernel = _NoKernel
    compressed_tensors_moe_wna16.select_wna16_moe_backend = expert_backend
    compressed_tensors_moe_w8a8_fp8.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.TRITON, None)


def _skip_fp4() -> None:
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_mxfp4,
        compressed_tensors_moe_w4a4_nvfp4,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_mxfp4,
        compressed_tensors_w4a4_nvfp4,
    )

    compressed_tensors_w4a4_nvfp4.init_nvfp4_linear_kernel = _NoKernel
    compressed_tensors_w4a4_mxfp4.init_mxfp4_linear_kernel = _NoKernel
    compressed_tensors_moe_w4a4_nvfp4.select_nvfp4_moe_backend = lambda **_: (NvFp4MoeBackend.MARLIN, None)
    compressed_tensors_moe_w4a4_mxfp4.CutlassExpertsMxfp4._supports_current_device = lambda: False
