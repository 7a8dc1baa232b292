"""`l4pack report`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack.cli import console
from l4pack.cli.opening import opened_original
from l4pack.cli.options import (
    AgainstOption,
    AsJsonOption,
    AuditedOption,
    DeviceOption,
    FittedOption,
    LoraOption,
    OutOption,
)
from l4pack.errors import UsageError

if TYPE_CHECKING:
    from l4pack.checkpoint.source import Checkpoint
    from l4pack.report.page import Records
    from l4pack.verify.verify import Verification


def report(
    artifact: AuditedOption,
    out: OutOption[Path | None] = None,
    device: DeviceOption[str | None] = None,
    fitted: FittedOption = None,
    against: AgainstOption = None,
    as_json: AsJsonOption = False,
    lora: LoraOption = None,
) -> None:
    """Write one HTML page about an artifact: how close it is, where it runs, how it was made. Needs no network.

    The page is DIR.report.html unless `--out` names another. Memory is that of the device and load that the artifact's
    recipe promises, else of one h100. With --against every byte is read and held against the source, as `verify` does;
    without it, headers are, and of a repository on the Hub no weight is fetched.

    Example: `l4pack report demo-int4`
    """
    from l4pack.artifact.published import look, own_path
    from l4pack.budget.load import Load
    from l4pack.budget.named import Asked, question_of
    from l4pack.checkpoint.source import open_folder
    from l4pack.report.page import render_report
    from l4pack.work.files import path_beside, write_atomic

    own = own_path(artifact)
    with look(artifact, weights=against is not None, say=console.tell) as looked:
        records = _records(looked.folder, _fitted(own, fitted), opened_original(against, None, lora))
        question = question_of(Asked(str(looked.folder), None, device, Load()))
        page = render_report(open_folder(looked.folder), records, question, datetime.now(UTC).date().isoformat())
    path = out or path_beside(own, ".report.html")
    write_atomic(path, page.encode())
    if as_json:
        console.show_json({"page": str(path), "bytes": path.stat().st_size})
    else:
        console.show(f"[bold]{console.plain(path)}[/bold]  open it in a browser")


def _records(artifact: Path, fitted: dict[str, Any] | None, original: Checkpoint | None) -> Records:
    """What was measured, fitted and verified. Raises UsageError, QualityError for a measurement of other weights."""
    from l4pack.evaluate.record import check_current, read_evaluations
    from l4pack.report.page import Records

    measured = read_evaluations(artifact)
    check_current(artifact, measured)
    return Records(_verified(artifact, original), measured[0] if measured else None, fitted)


def _verified(artifact: Path, source: Checkpoint | None) -> Verification:
    """What `verify` finds: beside a source by every byte, else by headers. Raises SourceError."""
    from l4pack.containers.safetensors_folder import CONTAINER
    from l4pack.verify.verify import verify_artifact

    if source is None:
        return verify_artifact(artifact, headers_only=True)
    with console.progress("verifying", CONTAINER.weight_bytes(artifact)) as bar:
        return verify_artifact(artifact, source, advance=bar.advance)


def _fitted(artifact: Path, file: Path | None) -> dict[str, Any] | None:
    """What fit decided, from the file named or the one beside the artifact. Raises UsageError for one that is not."""
    from l4pack.fit.record import read_fit
    from l4pack.work.files import path_beside

    record = read_fit(file or path_beside(artifact, ".fit.json"))
    if record is None and file is not None:
        raise UsageError(f"{file} is not what fit says", hint="make one with: l4pack fit SOURCE ... --json > fit.json")
    return None if record is None else record.model_dump(mode="json")
