"""Getting hold of a Ray cluster, or beginning one on this machine."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from l4pack.cluster.cluster import Cluster
from l4pack.cluster.options import AUTO, LOCAL, ClusterOptions
from l4pack.errors import ClusterError, UsageError
from l4pack.work import machine

_KNOCK_SECONDS = 5.0
# Read by Ray when it is imported: it would report its use to its makers, and its workers that no device is theirs.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextmanager
def connected(options: ClusterOptions, threads: int, cores: int | None = None) -> Iterator[Cluster]:
    """The cluster, until the block is left; its workers compute on so many `threads` each.

    One that is begun here takes all cores of the machine unless told how many.

    Raises UsageError (Ray is not installed, no address), ClusterError (nothing answers there, or not Ray).
    """
    ray = _imported()
    _knock(options.address)
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    asked = signal.getsignal(signal.SIGTERM)
    try:
        _begin(ray, options.address, counts, cores or machine.cores())
    finally:
        _take_back(asked)
    try:
        # Ray prints what it makes of lost workers, lines of its log with it, on stdout, which is for results.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), _shut_down(ray):
            yield Cluster(ray, options, threads)
    finally:
        _take_back(asked)


@contextmanager
def _shut_down(ray: Any) -> Iterator[None]:
    try:
        yield
    finally:
        ray.shutdown()


def _imported() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError(
            "--ray needs Ray: pip install 'l4pack[ray]'", hint="install it on every node, in the same version"
        ) from error
    return ray


def _begin(ray: Any, address: str, environment: dict[str, str], cores: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    own = {"num_cpus": cores, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, runtime_env={"env_vars": environment}, **quiet, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable(address, str(error)) from error


def _knock(address: str) -> None:
    """Refuse in seconds what Ray would try for minutes."""
    if address in (AUTO, LOCAL):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--ray {address} is no address", hint="give HOST:PORT, auto or local")
    try:
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error


def _unreachable(address: str, why: str) -> ClusterError:
    return ClusterError(
        f"no Ray cluster answers at {address}: {why}",
        hint="begin one with `ray start --head`, join it with `ray start --address HOST:6379` on every other node",
    )


def _take_back(asked: Any) -> None:
    """Ray answers SIGTERM by ending the process where it is; what this process did before, it goes on doing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, asked)
