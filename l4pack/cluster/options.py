"""Which cluster a job runs on, and what each of its workers takes of a node; parsed without importing Ray."""

from __future__ import annotations

from dataclasses import dataclass

from l4pack.errors import UsageError
from l4pack.work.device import CPU, CUDA

AUTO, LOCAL = "auto", "local"


@dataclass(frozen=True)
class ClusterOptions:
    """`address` is `auto` (the cluster this machine is a node of), `local` (begun here, for this job) or HOST:PORT.

    A worker takes `gpus` of a node, a share of one where several are to use it together.
    """

    address: str
    gpus: float = 0

    @classmethod
    def of(cls, address: str, gpus: float | None, *, accelerated: bool) -> ClusterOptions:
        """What was typed; a worker that computes on a device takes one unless told otherwise. Raises UsageError."""
        if gpus is not None and not accelerated:
            raise UsageError("--gpus-per-worker is for devices, and the CPU computes", hint="add --compute cuda")
        wanted = float(accelerated) if gpus is None else gpus
        if wanted < 0 or (accelerated and wanted == 0) or (wanted > 1 and wanted != int(wanted)):
            raise UsageError(
                f"--gpus-per-worker {wanted:g} is no share of a device", hint="give a whole number, or less than 1"
            )
        return cls(address, wanted)


def worker_device(device: str) -> str:
    """What a worker calls its device: it sees its own alone, from number 0 on."""
    return device if device == CPU else CUDA


@dataclass(frozen=True)
class Share:
    """What one task holds of a node while it runs: cores, devices, and bytes of memory."""

    cpus: int
    gpus: float
    ram: int
