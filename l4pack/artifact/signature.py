"""Signing an artifact with an SSH key: a list of every file's SHA-256, and a detached signature of that list.

Both are what standard tools read: the list is `sha256sum`'s, the signature OpenSSH's (`ssh-keygen -Y sign`), so a reader
without l4pack checks them with `ssh-keygen -Y verify` and `sha256sum -c`. The manifest has a digest of every tensor, but
not of the card or of records that came later; the list has all that is published, the manifest among it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from l4pack.checkpoint.parts import file_digest
from l4pack.errors import L4packError, UsageError
from l4pack.work.files import write_atomic

LIST_NAME = "l4pack-files.sha256"
SIGNATURE_NAME = f"{LIST_NAME}.sig"
NAMES = (LIST_NAME, SIGNATURE_NAME)
NAMESPACE = "l4pack"  # a signature made for something else is not one for an artifact
SMALL_BYTES = 64 * 1024**2
_MAX_LIST_BYTES = 64 * 1024**2
_LINE = re.compile(r"([0-9a-f]{64})  ([^\\\n]+)")
_SECONDS = 600  # a key in a token waits to be touched


def sign(folder: Path, names: Iterable[str], key: Path) -> None:
    """Put the list of the files `names` and its signature by an SSH key into a folder.

    `key` is a private key, or a public one whose private half is in the agent. Raises UsageError.
    """
    if not key.is_file():
        raise UsageError(f"{key} is no key", hint="make one with ssh-keygen -t ed25519, or name its file")
    listed = sorted(name for name in names if name not in NAMES)
    odd = next((name for name in listed if "\\" in name or not name.isprintable()), None)
    if odd is not None:
        raise UsageError(f"{odd!a} can't stand in a list of files", hint="rename it")
    text = "".join(f"{file_digest(folder / name)}  {name}\n" for name in listed)
    (folder / SIGNATURE_NAME).unlink(missing_ok=True)
    write_atomic(folder / LIST_NAME, text.encode())
    asked = ["-Y", "sign", "-n", NAMESPACE, "-f", str(key.absolute()), str((folder / LIST_NAME).absolute())]
    ended = _ssh_keygen(asked)
    if ended.returncode or not (folder / SIGNATURE_NAME).is_file():
        (folder / LIST_NAME).unlink(missing_ok=True)
        raise UsageError(f"{key} can't sign: {_said(ended)}", hint="name an SSH key, and enter its passphrase")


def is_signed(folder: Path) -> bool:
    """Whether a folder has a signature."""
    return any((folder / name).exists() for name in NAMES)


def signer(folder: Path, allowed: Path) -> str:
    """Who signed the list: a name from the file of allowed signers (`ssh-keygen`'s ALLOWED SIGNERS).

    Raises UsageError for a file that is not there, L4packError where the list is not signed, or by none of them.
    """
    if not allowed.is_file():
        raise UsageError(f"{allowed} is no file of allowed signers", hint="a line of it is NAME ssh-ed25519 AAAA...")
    listing, signature = folder / LIST_NAME, folder / SIGNATURE_NAME
    for path in (listing, signature):
        if not path.is_file():
            raise L4packError(f"{path.name} is not there: the artifact is not signed", hint="l4pack package --sign KEY")
    who = ["-f", str(allowed.absolute()), "-s", str(signature.absolute())]
    found = _ssh_keygen(["-Y", "find-principals", *who])
    hint = f"names and keys that may sign stand in {allowed}"
    names = found.stdout.decode(errors="replace").split()
    if found.returncode or not names:
        raise L4packError(f"{SIGNATURE_NAME}: none of the allowed signers made it", hint=hint)
    content = listing.read_bytes() if listing.stat().st_size <= _MAX_LIST_BYTES else b""
    checked = _ssh_keygen(["-Y", "verify", "-n", NAMESPACE, "-I", names[0], *who], content)
    if checked.returncode:
        raise L4packError(f"{SIGNATURE_NAME} is not a signature of this {LIST_NAME}", hint=hint)
    return names[0]


def broken_files(
    folder: Path, advance: Callable[[int], None] = lambda _: None, largest: int | None = None
) -> Iterator[tuple[str, str]]:
    """Files that are not what the list says, missing, or not on it, each with what is wrong; hidden files aside.

    With `largest`, the bytes of larger files are not read. `advance` is told the bytes read.
    """
    digests = _listed(folder)
    there = {name: path for name, path in _files(folder) if name not in NAMES}
    for name in sorted(set(digests) | set(there)):
        if name not in there:
            yield name, "is on the signed list and not here"
        elif name not in digests:
            yield name, "is not on the signed list"
        elif largest is None or there[name].stat().st_size <= largest:
            if file_digest(there[name]) != digests[name]:
                yield name, "is not what was signed"
            advance(there[name].stat().st_size)


def _listed(folder: Path) -> dict[str, str]:
    """Hex SHA-256 by name; lines that are none of the list's are left out, so that their files are not on it."""
    text = (folder / LIST_NAME).read_text(encoding="utf-8", errors="replace")
    return {match[2]: match[1] for line in text.splitlines() if (match := _LINE.fullmatch(line))}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def _ssh_keygen(arguments: list[str], given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["ssh-keygen", *arguments],
            input=given,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise UsageError("ssh-keygen is not installed, which signs", hint="install OpenSSH's client") from error
    except subprocess.TimeoutExpired as error:
        raise UsageError("ssh-keygen does not end", hint="unlock the key first, for example with ssh-add") from error


def _said(ended: subprocess.CompletedProcess[bytes]) -> str:
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {ended.returncode}"
