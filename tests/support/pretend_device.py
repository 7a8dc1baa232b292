"""A CUDA device on a machine without one: tensors in CPU memory that say `cuda:0` and refuse to meet CPU tensors.

What real CUDA refuses is refused here: operations on tensors of two devices (numbers, zero-dimensional tensors in pointwise
operations, copies, and CPU indices into a CUDA tensor are allowed), NumPy of a tensor there, and matrix products that must be
deterministic while cuBLAS was not told so. Everything else is computed as on the CPU, so figures can be compared bit by bit,
but for products whose factors are rounded as tensor cores do it, where that is asked for.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama4 import modeling_llama4  # noqa: F401  its imports read what is replaced here

DEVICE, CPU = torch.device("cuda:0"), torch.device("cpu")
TOTAL_BYTES = 80 * 10**9
NAME = "Pretended GPU"

aten: Any = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_, aten.mv, aten.addmv, aten.dot}
NOT_DETERMINISTIC = {
    aten.cumsum,
    aten.histc,
    aten.kthvalue,
    aten.median,
    aten.put_,
}  # those that l4pack might come to use
NUMBERS = {Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__, Tensor.item}
CROSSING = {aten.copy_, aten._to_copy}


class PretendTensor(Tensor):
    """A tensor on the pretended device; `inner` holds its numbers.

    Where gradients are computed torch's own code takes it for one in CPU memory: its engine would ask for a driver.
    """

    inner: Tensor
    taken_for: ClassVar[torch.device] = DEVICE

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        with torch.inference_mode(inner.is_inference()):  # a view of what was made without it is none of its tensors
            made: PretendTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=cls.taken_for,
            )
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to(CPU)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != "cpu":
            return super().to(*args, **kwargs)
        copied: Tensor = aten._to_copy(self, dtype=dtype, device=CPU)
        return copied

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {DEVICE}"

    def numpy(self, **_: Any) -> NoReturn:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self.numpy()

    def record_stream(self, _: Any) -> None:
        pass

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.nn.functional.scaled_dot_product_attention and cls.taken_for == DEVICE
        ):  # which kernel it is does not matter
            return _on_cpu(func, args, kwargs or {})
        if func in NUMBERS:
            return func(*_inner(args))
        if func is Tensor.copy_:
            func(*_inner(args), **(kwargs or {}))
            return args[0]
        if func is Tensor.detach:
            return PretendTensor(args[0].inner.detach())
        if func is Tensor.__invert__:  # as below
            return torch.bitwise_not(args[0])
        if func is Tensor.contiguous:  # torch would ask the driver to make the device current
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise RuntimeError(f"{func} on the pretended device, in a thread that does not know it")


def _there(value: Any) -> bool:
    return isinstance(value, PretendTensor)


def _here(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """`change` applied to what is not a list, tuple or mapping; torch's own does more and takes ten times as long."""
    if isinstance(tree, list | tuple):
        changed = [_mapped(change, part) for part in tree]
        return changed if isinstance(tree, list) else tuple(changed)
    if isinstance(tree, dict):
        return {key: _mapped(change, part) for key, part in tree.items()}
    return change(tree)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from _leaves(part)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    else:
        yield tree


def _inner(tree: Any) -> Any:
    return _mapped(lambda leaf: leaf.inner if isinstance(leaf, PretendTensor) else leaf, tree)


def _outer(tree: Any) -> Any:
    return _mapped(lambda leaf: PretendTensor(leaf) if _here(leaf) else leaf, tree)


def _refuse(func: Any) -> NoReturn:
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two: cuda:0 and cpu ({func})"
    )


def _on_cpu(func: Any, args: Any, kwargs: Any) -> Any:
    if any(map(_here, _leaves((args, kwargs)))):
        _refuse(func)
    return _outer(func(*_inner(args), **_inner(kwargs)))


def _indexed(func: Any, args: Any) -> Any:
    """Reading or writing a part, for which torch would ask the driver to make the device current."""
    owner, index, *values = args
    by_tensor = any(isinstance(leaf, Tensor) for leaf in _leaves(index))
    strange = [value for value in values if isinstance(value, Tensor) and _there(value) != _there(owner)]
    if not _there(owner) and any(map(_there, _leaves(index))):
        _refuse(func)
    if by_tensor and any(value.dim() or _there(value) for value in strange):  # else it is a copy, which may cross
        _refuse(func)
    if PretendTensor.taken_for == CPU and func is Tensor.__getitem__:
        return func(*args)  # with its gradient
    found = func(*_inner(args))
    return _outer(found) if _there(owner) else found


class Queue:
    """Stands for a CUDA stream: what is put there is done at once."""

    def wait_stream(self, other: Queue) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Names(TorchFunctionMode):
    """Gives `cuda` its number, which torch would ask a driver for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.tensor and kwargs and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return PretendTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and any(map(_there, _leaves(args))):
            return _indexed(func, args)

        def numbered(leaf: Any) -> Any:
            device = isinstance(leaf, torch.device) and leaf.type == "cuda"
            return DEVICE if device or (isinstance(leaf, str) and leaf == "cuda") else leaf

        return func(*_mapped(numbered, args), **_mapped(numbered, kwargs or {}))


class _Operations(TorchDispatchMode):
    """Carries out what is asked of tensors on either device, and counts what is done on the pretended one."""

    def __init__(self, done: Counter[str], *, tf32: bool) -> None:
        super().__init__()
        self._done, self._tf32 = done, tf32

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = list(_leaves((args, kwargs)))
        there = any(map(_there, leaves))
        device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        on_device = there if device is None else device.type == "cuda"
        if not there and not on_device:
            return func(*args, **kwargs)
        if composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        self._done[func.overloadpacket.__name__] += 1
        if there:
            _check(func, args, kwargs)
        if on_device and device is not None:
            kwargs["device"] = torch.device("cpu")
        if self._tf32 and func.overloadpacket in PRODUCTS and torch.backends.cuda.matmul.allow_tf32:
            args = (*args[:-2], *map(_rounded, args[-2:]))
        found = func(*_inner(args), **_inner(kwargs))
        if written := _written(func, args, kwargs):
            return _same(written, found)
        return _outer(found) if on_device else found


def _rounded(factor: PretendTensor) -> PretendTensor:
    return PretendTensor(tf32(factor.inner)) if factor.dtype is torch.float32 else factor


def tf32(values: Tensor) -> Tensor:
    """float32 numbers rounded to ten bits of fraction, halves away from zero."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@cache
def composite(func: Any) -> bool:
    """Whether torch makes an operation of others, whatever the device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@cache
def _marked(func: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(place, one.name) for place, one in arguments if one.alias_info is not None and one.alias_info.is_write]


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes to, and gives back."""
    found = [args[place] if place < len(args) else kwargs.get(name) for place, name in _marked(func)]
    return [value for value in found if isinstance(value, Tensor)]


def _same(written: list[Any], found: Any) -> Any:
    for value in written:
        if _there(value) and value.shape != value.inner.shape:
            raise NotImplementedError("an operation that changes the shape of a tensor in place")
    if found is None:
        return None
    return tuple(written) if isinstance(found, tuple | list) else written[0]


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse what CUDA refuses. Raises RuntimeError."""
    packet = func.overloadpacket
    if torch.are_deterministic_algorithms_enabled():
        told = os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
        if packet in NOT_DETERMINISTIC or (packet in PRODUCTS and not told):
            raise RuntimeError(
                f"Deterministic behavior was enabled, but {func} is not deterministic on CUDA as it is set up"
            )
    if packet in CROSSING:
        return
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        mixed = not _there(args[0]) or any(_here(value) and value.dim() for value in args[2:3])
    else:
        own = _leaves((args, kwargs))
        scalars = torch.Tag.pointwise in func.tags or packet in (aten.where, aten.fill_)
        mixed = any(_here(value) and not (scalars and value.dim() == 0) for value in own)
        mixed |= any(map(_here, _written(func, args, kwargs)))
    if mixed:
        _refuse(func)


@contextmanager
def _modes(done: Counter[str], *, tf32: bool) -> Iterator[None]:
    with _Names(), _Operations(done, tf32=tf32):
        yield


@contextmanager
def pretend_device(*, gradients: bool = False, tf32: bool = False) -> Iterator[Counter[str]]:
    """One CUDA device, in this thread and in those it starts; gives the number of operations done on it by name.

    `gradients`: of what is computed on it, too. `tf32`: where torch is told to, products round their factors.
    """
    run = threading.Thread.run
    done: Counter[str] = Counter()

    def run_knowing(thread: threading.Thread) -> None:
        with _modes(done, tf32=tf32):
            run(thread)

    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "mem_get_info": (TOTAL_BYTES, TOTAL_BYTES),
        "is_bf16_supported": True,
        "synchronize": None,
        "empty_cache": None,
        "_lazy_init": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "Stream": Queue(),
        "default_stream": Queue(),
        "stream": nullcontext(),
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(threading.Thread, "run", run_knowing))
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda self: self))
        stack.enter_context(patch.object(PretendTensor, "taken_for", CPU if gradients else DEVICE))
        stack.enter_context(_modes(done, tf32=tf32))
        yield done
