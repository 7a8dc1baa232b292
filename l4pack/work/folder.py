"""The folder a job works in: marked as l4pack's own, held by one process at a time, never reached through a link.

The end of a job removes its folder with all it holds, so none is taken that somebody else made.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from l4pack.errors import L4packError, UsageError
from l4pack.work.files import sync_folder

LOCK_NAME = "lock"
FETCHED = "fetched"  # the mark of a folder that shards are fetched into
VOUCHING = ("state.json", "measured.json", "journal.jsonl")  # say what of the other files is to be believed
_MARK = ".l4pack-"
_ATTEMPTS = 100  # at taking a folder that others remove meanwhile


def claim(folder: Path, kind: str) -> None:
    """Make and mark a folder for a kind of job, or take one that is marked so. Raises UsageError for any other folder.

    One without a mark is taken when there is nothing in it but a lock and folders that are marked themselves.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise _not_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Looked at again, because another process may make or remove it meanwhile: its mark comes first and goes last.
    if not any(is_marked(folder, kind) or all(map(_may_lie_there, folder.iterdir())) for _ in range(_ATTEMPTS)):
        raise _not_own(folder)
    os.close(os.open(_mark(folder, kind), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))


def work_beside(out: Path, own: Collection[str]) -> Path:
    """The folder beside `out` where its work lies until it is complete; it may hold the names in `own`. Raises UsageError."""
    if out.is_symlink() or out.name in ("", "..") or out.is_mount():
        raise UsageError(f"{out} can't be made in one step", hint="give --out a new folder's name")
    work = out.with_name(f"{out.name}.partial")
    if work.is_symlink() or (work.exists() and not _holds_only(work, own)):
        raise UsageError(
            f"{work}, where the work would lie, is not l4pack's", hint="move it away, or choose another --out"
        )
    return work


def _holds_only(work: Path, own: Collection[str]) -> bool:
    """Whether a folder holds nothing but what a job leaves in it: the end of the job removes it with all it holds."""
    with suppress(FileNotFoundError):  # another run has finished, and removes it
        return work.is_dir() and {path.name for path in work.iterdir()} <= set(own)
    return True


def is_marked(folder: Path, kind: str | None = None) -> bool:
    """Whether a folder bears the mark of a kind of job, or of any."""
    marks = folder.glob(f"{_MARK}*") if kind is None else [_mark(folder, kind)]
    return any(mark.is_file() and not mark.is_symlink() for mark in marks)


@dataclass(frozen=True)
class WorkFolder:
    """A folder this process holds."""

    path: Path
    kind: str

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove what an earlier job left, but for the names to `keep`: first what vouches for the rest."""
        kept = {_mark(self.path, self.kind).name, LOCK_NAME, *keep}
        left = [path for path in self.path.iterdir() if path.name not in kept]
        remove_all(path for path in left if path.name in VOUCHING)
        sync_folder(self.path)
        remove_all(path for path in left if path.name not in VOUCHING)

    def remove(self) -> None:
        """Remove the folder; another process may take its name at once."""
        self.clear()
        # The lock goes last: until then whoever comes is refused, and whoever comes later begins a folder of their own.
        for path in (_mark(self.path, self.kind), self.path / LOCK_NAME):
            path.unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise


@contextmanager
def owned(folder: Path, kind: str, *, restart: bool = False, keep: Collection[str] = ()) -> Iterator[WorkFolder]:
    """Claim a folder and hold it for this process; with `restart` it is cleared first, but for the names to `keep`.

    Raises UsageError for a folder that is not l4pack's or holds links, L4packError when another process holds it.
    """
    descriptor = _hold(folder, kind)
    try:
        held = WorkFolder(folder, kind)
        if restart:
            held.clear(keep)
        _refuse_links(folder)
        yield held
    finally:
        os.close(descriptor)


def tidy(folder: Path, kind: str) -> None:
    """Remove what a finished job was killed before it removed, if nobody else is at it."""
    if folder.exists():
        with suppress(L4packError), owned(folder, kind, restart=True) as held:
            held.remove()


def remove_all(paths: Iterable[Path]) -> None:
    """Remove files and folders; of a link, the link."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def keep_apart(sources: Iterable[Path], written: Iterable[Path]) -> None:
    """Raise UsageError when what is read lies in what is written, or the other way round, all links followed."""
    targets = [(path, _lies_in(path)) for path in written]
    for source in filter(Path.exists, sources):
        places = _lies_in(source)
        for target, others in targets:
            inside = target.exists() and others[0] in places
            if inside or places[0] in others:
                where = f"{source}, which is read, lies in" if inside else f"{source}, which is read, holds"
                raise UsageError(f"{where} {target}, which is written", hint="choose another folder to write to")


def check_writable(folder: Path) -> None:
    """Raise OSError when no file can be made in a folder: better now than after the work."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from error


def mark_name(kind: str) -> str:
    """The name of the mark of a kind of job."""
    return f"{_MARK}{kind}"


def _mark(folder: Path, kind: str) -> Path:
    return folder / mark_name(kind)


def _may_lie_there(path: Path) -> bool:
    return path.name == LOCK_NAME or (path.is_dir() and not path.is_symlink() and is_marked(path))


def _not_own(folder: Path) -> UsageError:
    return UsageError(
        f"{folder}, where the work would lie, is not l4pack's", hint="move it away, or choose another --out or --work"
    )


def _hold(folder: Path, kind: str) -> int:
    """A descriptor that holds the lock of a claimed folder."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):  # whoever held it removed it just now
            claim(folder, kind)
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), (folder / LOCK_NAME).lstat()):
                    claim(folder, kind)  # its last holder may have taken our mark away
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    raise L4packError(f"another run is working in {folder}", hint="wait for it, or choose another --out")


def _refuse_links(folder: Path) -> None:
    """A job writes into its own files and nobody else's."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            status = path.lstat()
            own = stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
            if not own:
                raise UsageError(
                    f"{path} is a link, and what it leads to is not the job's",
                    hint="remove the link, or add --restart to begin again",
                )


def _lies_in(path: Path) -> list[tuple[int, int]]:
    """Device and inode of a path, where it exists, and of every folder above it."""
    real = Path(os.path.realpath(path))
    statuses = [place.stat() for place in (real, *real.parents) if place.exists()]
    return [(status.st_dev, status.st_ino) for status in statuses]
