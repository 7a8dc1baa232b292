"""What a device would be asked to do: operations started on it, and times the host would wait for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from pretend_device import composite
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.item, aten.nonzero, aten.is_nonzero, aten.equal, aten.masked_select}
MADE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten.lift_fresh}


class Launches(TorchDispatchMode):
    """Counts what computes on a device: neither views of what is there nor memory without contents.

    `waits` are operations whose result the host must wait for, copies to it for one.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.started: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        packet, own = func.overloadpacket, _tensors(args, kwargs or {})
        there = any(tensor.device.type == self._device for tensor in own)
        if packet in WAITS or self._comes_over(packet, args, kwargs or {}):
            self.waits[packet.__name__] += 1
        elif there and not _is_view(func) and packet not in MADE:
            self.started[packet.__name__] += 1
        return func(*args, **(kwargs or {}))

    def _comes_over(self, packet: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation copies from the device to the host."""
        if packet is aten._to_copy:
            target = kwargs.get("device")
            return args[0].device.type == self._device and target is not None and torch.device(target).type == "cpu"
        return packet is aten.copy_ and args[1].device.type == self._device and args[0].device.type == "cpu"

    @property
    def total(self) -> int:
        """Operations started."""
        return self.started.total()


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    found = []
    for value in (*args, *kwargs.values()):
        found += [
            one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, torch.Tensor)
        ]
    return found


def _is_view(func: Any) -> bool:
    """Whether the result shares its argument's memory, which is left as it is."""
    aliases = [one.alias_info for one in func._schema.arguments if one.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)
