"""Where an artifact runs: contexts that fit by device, and the servers' commands for a device that holds it."""

from __future__ import annotations

from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.matrix import HOSTS, matrix
from l4pack.budget.model import Budget, budget
from l4pack.budget.serve import serve_command
from l4pack.budget.subject import Subject
from l4pack.errors import UsageError
from l4pack.publish.card_facts import DeviceFit
from l4pack.recipe import Promise


def device_fits(subject: Subject) -> list[DeviceFit]:
    """The largest contexts of one sequence by device, for devices from small to large."""
    if subject.exported_for is not None:  # memory is that of another runtime's files
        return []
    devices = load_devices()
    hosts = [find_host(name, devices) for name in HOSTS]
    rows = [matrix([subject], hosts, Load(kv_dtype=dtype), "vllm")[0] for dtype in ("bfloat16", "fp8")]
    return [
        DeviceFit(f"{host.count} x {host.device.title}", bf16.gpus, bf16.max_context, fp8.max_context)
        for host, bf16, fp8 in zip(hosts, *(row.cells for row in rows), strict=True)
    ]


def served(subject: Subject, promise: Promise | None, where: str) -> tuple[dict[str, str], str]:
    """Servers' commands as the recipe promises, else for the smallest device that holds the usual load; and that load."""
    if subject.exported_for is not None:
        return {}, f"{subject.exported_for.runtime}, by l4pack export"
    load = Load(promise.context, promise.sequences, promise.kv_dtype) if promise else Load(kv_dtype="fp8")
    for name in [promise.device] if promise else HOSTS:
        found = {runtime: _budgeted(subject, name, load, runtime) for runtime in ("vllm", "sglang")}
        commands = {runtime: one and serve_command(one, where) for runtime, one in found.items()}
        if commands["vllm"] and (main := found["vllm"]):
            kv = "FP8" if main.setting.kv_dtype == "fp8" else "BF16"
            what = f"{main.host.count} x {main.host.device.title}, {main.setting.context:,} tokens, {kv} KV cache"
            return {runtime: command for runtime, command in commands.items() if command}, what
    return {}, ""


def _budgeted(subject: Subject, device: str, load: Load, runtime: str) -> Budget | None:
    """The budget; None for a load that the model or the runtime can't take."""
    try:
        return budget(subject, find_host(device, load_devices()), load, runtime)
    except UsageError:
        return None
