"""Whether the files of an export are still what the artifact makes of them.

The export is planned again: its headers must be those bytes, so that nothing of a header that somebody else wrote is
believed or even parsed; then every weight is read back and compared, as when it was made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from l4pack.checkpoint.parts import file_digest
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.datafile import read_json
from l4pack.errors import L4packError, StoppedError, UsageError
from l4pack.export.artifact import Rows
from l4pack.export.known import target_named
from l4pack.export.plan import ExportPlan, plan_export
from l4pack.export.prove import Proof, prove
from l4pack.export.record import RECORD_NAME

_MAX_BYTES = 16 * 1024**2
_HINT = "export again"


@dataclass(frozen=True)
class Fault:
    """A file or a tensor that is not as it was written."""

    where: str
    message: str
    rule: str = "export"


@dataclass(frozen=True)
class ExportCheck:
    """What was found, and what was proved where nothing was."""

    faults: tuple[Fault, ...]
    proof: Proof | None

    @property
    def ok(self) -> bool:
        """Whether all is as it was written."""
        return not self.faults


def check_export(folder: Path, checkpoint: Checkpoint) -> ExportCheck:
    """Hold an export against the artifact it was made from. Raises UsageError for a record that can't be read."""
    record = read_json(folder / RECORD_NAME, _MAX_BYTES, _HINT)
    options, container = record.get("options"), record.get("container")
    split = options.get("split") if isinstance(options, dict) else None
    if not isinstance(options, dict) or not isinstance(container, str) or not isinstance(split, int | None):
        raise UsageError(f"{folder / RECORD_NAME} is not a record of l4pack export", hint=_HINT)
    plan = plan_export(
        checkpoint,
        target_named(container),
        split=split,
        lossy=options.get("lossy") is True,
        round_embeddings=options.get("round_embeddings") is True,
    )
    faults = tuple(_faults(plan, folder))
    if faults:
        return ExportCheck(faults, None)
    store = checkpoint.store
    assert store is not None
    with Reader(checkpoint.entries, store.path) as reader:
        try:
            return ExportCheck((), prove(plan, folder, Rows(plan.artifact, reader), threading.Event()))
        except StoppedError:
            raise
        except L4packError as error:
            return ExportCheck((Fault(str(folder), error.message),), None)


def _faults(plan: ExportPlan, folder: Path) -> Iterator[Fault]:
    """What sizes, small files and first bytes tell."""
    for name, size in plan.files.items():
        path = folder / name
        if not path.is_file():
            yield Fault(name, "is missing")
        elif path.stat().st_size != size:
            yield Fault(name, f"has {path.stat().st_size:,} bytes, the artifact makes {size:,}")
        elif not _is_right(plan, name, path):
            yield Fault(name, "is not what this version of l4pack makes of the artifact")


def _is_right(plan: ExportPlan, name: str, path: Path) -> bool:
    """Whether a file's bytes are right, of one with tensors those before them."""
    heads = {shard.file: shard.prefix for shard in plan.layout.shards}
    small = {**plan.layout.beside, RECORD_NAME: plan.record_json}
    if name in heads:
        with path.open("rb") as stream:
            return stream.read(len(heads[name])) == heads[name]
    if name in small:
        return path.read_bytes() == small[name]
    store = plan.artifact.checkpoint.store
    assert store is not None
    return file_digest(path) == file_digest(store.path(name))
