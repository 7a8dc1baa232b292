"""What every process of a test cluster imports first: tricks that a test plays on whoever writes into a shard.

A test puts a file named after a trick into the folder `L4PACK_TEST_TRICKS`; `NAME` in it is the node it is played on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path

write, node = os.pwrite, os.environ.get("L4PACK_TEST_NODE", "")
folder = Path(os.environ.get("L4PACK_TEST_TRICKS", "/nowhere"))
SLOW_SECONDS = 0.05


def asked(trick: str, *, once: bool = False) -> bool:
    """Whether a trick is asked for on this node; what is played `once` nobody else plays."""
    path = folder / trick
    with contextlib.suppress(OSError):
        if path.read_text() in ("", node):
            if once:
                path.unlink()
            return True
    return False


def tricky(descriptor: int, data: memoryview, offset: int) -> int:
    """`os.pwrite` with whatever goes wrong."""
    if asked("kill worker", once=True):
        os.kill(os.getpid(), signal.SIGKILL)
    if asked("kill node", once=True):
        os.kill(os.getppid(), signal.SIGKILL)
    if asked("full disk"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")
    if asked("slow"):
        time.sleep(SLOW_SECONDS)
    return write(descriptor, data, offset)


os.pwrite = tricky
