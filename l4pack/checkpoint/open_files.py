"""Room for open files: small shards make thousands of them, and systems allow 1024 unless asked."""

from __future__ import annotations

import resource

from l4pack.errors import UsageError

_OTHERS = 256  # what the process has open besides


def allow_open_files(count: int) -> None:
    """Let this process hold `count` more files open. Raises UsageError where the system's hard limit forbids it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHERS
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UsageError(
            f"{count:,} files would be open at once, this machine allows {hard:,}",
            hint="choose a larger --shard-size, or raise the hard limit of `ulimit -n`",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
