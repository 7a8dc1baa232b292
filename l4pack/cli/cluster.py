"""Connecting a command to the cluster that its options name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from l4pack.errors import UsageError
from l4pack.work.device import CPU

if TYPE_CHECKING:
    from l4pack.cluster.cluster import Cluster
    from l4pack.cluster.options import ClusterOptions


def cluster_options(address: str | None, gpus_per_worker: float | None, device: str) -> ClusterOptions | None:
    """What was typed of a cluster; None where none is asked for. Raises UsageError."""
    if address is None:
        if gpus_per_worker is not None:
            raise UsageError("--gpus-per-worker goes with --ray", hint="add --ray auto, or leave it out")
        return None
    from l4pack.cluster.options import ClusterOptions

    return ClusterOptions.of(address, gpus_per_worker, accelerated=device != CPU)


_MOST_WORKERS = 10_000


@contextmanager
def joined(options: ClusterOptions | None, *, computes: bool) -> Iterator[Cluster | None]:
    """The cluster, if one is asked for, until the block is left; where a model `computes` there, on as many threads as
    here, for their number shows in the last bits."""
    if options is None:
        yield None
        return
    from l4pack.cluster.connect import connected

    with connected(options, _threads() if computes else 1) as cluster:
        yield cluster


def worker_count(ray: str | None) -> int | None:
    """How many workers a plan is asked for. Raises UsageError."""
    if ray is None:
        return None
    if not ray.isdecimal() or not 0 < int(ray) <= _MOST_WORKERS:
        raise UsageError(f"--ray {ray} is no number of workers", hint="give how many there would be, for example 8")
    return int(ray)


def planned_workers(ray: str | None, gpus_per_worker: float | None, device: str, *, computes: bool) -> int | None:
    """How many workers a job would have that is only planned: as many as typed, or those of the cluster that is named.

    Raises UsageError, ClusterError."""
    options = cluster_options(ray, gpus_per_worker, device)
    if ray is None or ray.isdecimal():
        return worker_count(ray)
    with joined(options, computes=computes) as cluster:
        return slots(cluster)


def slots(cluster: Cluster | None) -> int | None:
    """How many workers a cluster takes, by cores and devices."""
    if cluster is None:
        return None
    from l4pack.cluster.options import Share

    return cluster.slots(Share(cluster.threads, cluster.options.gpus, 1))


def _threads() -> int:
    import torch

    return torch.get_num_threads()
