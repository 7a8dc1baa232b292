"""Whether somebody who may sign has signed every file as it is."""

from __future__ import annotations

from pathlib import Path

from l4pack.artifact.signature import SIGNATURE_NAME, broken_files, signer
from l4pack.errors import L4packError, UsageError
from l4pack.verify.findings import Findings


def check_signature(folder: Path, allowed: Path, found: Findings) -> None:
    """Findings of a signature that is not there, is not one of the allowed signers', or is of other files.

    Raises UsageError where there is no file of allowed signers, or no ssh-keygen.
    """
    try:
        signer(folder, allowed)
    except UsageError:
        raise
    except L4packError as error:
        found.error("signature", SIGNATURE_NAME, error.message)
        return
    for name, message in broken_files(folder):
        found.error("signature", name, message)
