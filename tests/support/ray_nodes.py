"""A Ray cluster of three nodes on this machine, each with one core, and tricks to play on it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
STORE = 80 * 2**20  # bytes of shared memory a node; less than that Ray refuses
# Ray takes the machine's outward address for loopback unless it believes that it is on a laptop.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_local_fs_capacity_threshold": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Nodes:
    """The cluster. Where it listens is `address`."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._tricks = folder / "tricks"
        self._tricks.mkdir()
        head = {"include_dashboard": False, "temp_dir": str(folder / "ray"), **self._node("head")}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._others = [self._cluster.add_node(**self._node(name)) for name in ("second", "third")]
        self.address = self._cluster.address

    def _node(self, name: str) -> dict[str, Any]:
        tricks = {
            "L4PACK_TEST_TRICKS": str(self._tricks),
            "L4PACK_TEST_NODE": name,
            "PYTHONPATH": os.pathsep.join(map(str, (SUPPORT / "worker_tricks", SUPPORT, SUPPORT.parents[1]))),
        }
        return {
            "num_cpus": 1, "object_store_memory": STORE, "node_ip_address": "127.0.0.1", "node_name": name,
            "env_vars": tricks,
        }  # fmt: skip

    @contextmanager
    def trick(self, name: str, what: str = "") -> Iterator[Path]:
        """Play a trick, see `worker_tricks`, while the block lasts: on a node, or as often as there are lines.

        The file is gone, or empty, once it was played."""
        path = self._tricks / name
        path.write_text(what)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def replace(self, name: str) -> None:
        """Add a node in the place of one that was killed."""
        number = ("second", "third").index(name)
        self._cluster.remove_node(self._others[number], allow_graceful=False)
        self._others[number] = self._cluster.add_node(**self._node(name))

    @contextmanager
    def another(self, name: str) -> Iterator[None]:
        """One node more while the block lasts."""
        node = self._cluster.add_node(**self._node(name))
        try:
            yield
        finally:
            self._cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()


@contextmanager
def three_nodes() -> Iterator[Nodes]:
    """The cluster while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # names of sockets must be short
        nodes = Nodes(Path(folder))
        try:
            yield nodes
        finally:
            nodes.stop()
