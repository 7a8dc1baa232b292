"""Run the command line; turn every error l4pack raises on purpose into one line, a hint and an exit code."""

from __future__ import annotations

import errno
import os
import sys

from l4pack.errors import L4packError

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HINTS = {
    **dict.fromkeys(OUT_OF_SPACE, "free some space, then run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you may write to"),
}


def main() -> None:
    """The `l4pack` command."""
    from l4pack.cli import console
    from l4pack.cli.app import app

    try:
        app()
    except L4packError as error:
        console.error(error.message, error.hint)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe left; stdout must not be flushed into it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        console.error(f"{where}{error.strerror or error}", HINTS.get(error.errno or 0, ""))
        sys.exit(3 if error.errno in OUT_OF_SPACE else 1)
    except KeyboardInterrupt:
        console.error("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
