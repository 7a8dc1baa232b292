"""Run the command line; turn every error l4pack raises on purpose into one line, a hint and an exit code."""

from __future__ import annotations

import errno
import gc
import io
import sys

from l4pack.errors import L4packError

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130
HINTS = {
    **dict.fromkeys(OUT_OF_SPACE, "free some space, then run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you may write to"),
}


def main() -> None:
    """The `l4pack` command."""
    try:
        ended = _run()
    except KeyboardInterrupt:
        ended = INTERRUPTED
    gc.freeze()  # or leaving goes through every object of torch and transformers, for over a second
    if ended == INTERRUPTED:
        _refuse("interrupted", "run the same command again", INTERRUPTED)
    sys.exit(ended)


def _run() -> int:
    """Run one command; its exit code."""
    from l4pack.cli import console
    from l4pack.cli.app import app

    console.manner.answered = False

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name the terminal can't show is no reason to fail
    try:
        ended = app(prog_name="l4pack", standalone_mode=False)
        return ended if isinstance(ended, int) else 0
    except SystemExit as end:
        # Click and Rich call it a failure when the reader of a help page left.
        if isinstance(end.__context__, BrokenPipeError):
            return 0
        raise
    except L4packError as error:
        return _refuse(error.message, error.hint, error.exit_code)
    except ModuleNotFoundError as error:
        from l4pack.extras import missing_part

        missing = missing_part(error)
        if missing is None:
            raise
        return _refuse(missing.message, missing.hint, missing.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = HINTS.get(error.errno or 0, "check the path and the disk")
        return _refuse(f"{where}{error.strerror or error}", hint, 3 if error.errno in OUT_OF_SPACE else 1)
    except Exception as error:
        _refuse_usage(error)
        raise


def _refuse(message: str, hint: str, exit_code: int) -> int:
    """Say what is wrong, to a script that asked for JSON as an object too; the exit code."""
    from l4pack.cli import console

    console.error(message, hint)
    if "--json" in sys.argv and not console.manner.answered:
        console.show_json({"error": {"message": message, "hint": hint, "exit_code": exit_code}})
    return exit_code


def _refuse_usage(error: Exception) -> None:
    """End with one line and a hint for a command line that Typer can't parse; other errors are left alone.

    Typer brings its own copy of Click in some versions, so its errors are known by what they offer, not by their class.
    """
    from l4pack.cli import console

    context, explain = getattr(error, "ctx", None), getattr(error, "format_message", None)
    if explain is None:
        return
    message = str(explain()).strip()
    if type(error).__name__ == "NoArgsIsHelpError":
        console.show_text(f"{message}\n")
        sys.exit(2)
    words = context.command_path if context is not None else "l4pack"
    sys.exit(_refuse(f"{message[:1].lower()}{message[1:]}".removesuffix("."), f"see {words} --help", 2))


if __name__ == "__main__":
    main()
