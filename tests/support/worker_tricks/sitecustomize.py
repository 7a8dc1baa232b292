"""What every process of a test cluster imports first: tricks that a test plays on whoever writes.

A test puts a file named after a trick into the folder `L4PACK_TEST_TRICKS`; `NAME` in it is the node it is played on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path

write, sync, node = os.pwrite, os.fsync, os.environ.get("L4PACK_TEST_NODE", "")
folder = Path(os.environ.get("L4PACK_TEST_TRICKS", "/nowhere"))
SLOW_SECONDS = 0.05
flushed: dict[str, int] = {}


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


def deadly(descriptor: int) -> None:
    """`os.fsync`, but for one task of each name that a line of "kill at flush" begins: it has written, and is killed; of
    "kill node at flush", with the second node. `NAME@9` is played at the ninth flush of such tasks in a process."""
    for trick, victim in (("kill at flush", os.getpid()), ("kill node at flush", os.getppid())):
        if victim != os.getpid() and node != "second":
            continue
        with contextlib.suppress(OSError):
            lines = (folder / trick).read_text().splitlines()
            left = [line for line in lines if not due(line)]
            if left != lines:
                (folder / trick).write_text("\n".join(left))
                os.kill(victim, signal.SIGKILL)
    sync(descriptor)


def due(line: str) -> bool:
    """Whether a trick that is played on tasks of a name is to be played now."""
    name, _, number = line.partition("@")
    if not name or not task_name().startswith(name):
        return False
    flushed[line] = flushed.get(line, 0) + 1
    return flushed[line] >= int(number or 1)


def task_name() -> str:
    """The task that this process does, as Ray's dashboard shows it."""
    import ray

    return ray.get_runtime_context().get_task_name() or ""


os.pwrite, os.fsync = tricky, deadly
