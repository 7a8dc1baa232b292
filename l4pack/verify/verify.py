"""Verify an artifact, ours or anyone's compressed-tensors Llama 4: what runtimes would read, and whether it is right.

Names, dtypes, shapes and the stanza are checked from headers and config.json; then every byte is read once, a matrix
or a chunk at a time, by a few threads. With a source, kept tensors are compared bit for bit and quantized matrices
dequantized and held against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from l4pack.artifact.stanza import read_stanza
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError
from l4pack.verify.checks_config import check_config, check_config_kept, check_stanza
from l4pack.verify.checks_files import check_files
from l4pack.verify.checks_manifest import check_manifest, read_manifest_of
from l4pack.verify.checks_signature import check_signature
from l4pack.verify.checks_tensors import examine
from l4pack.verify.checks_tokenizer import check_tokenizer
from l4pack.verify.declared import read_declared
from l4pack.verify.findings import Finding, Findings
from l4pack.verify.opened import open_artifact
from l4pack.verify.origin import OriginCheck
from l4pack.verify.tally import Tally


@dataclass(frozen=True)
class Checked:
    """How much was looked at."""

    files: int
    modules: int
    tally: Tally
    sampled_of: int | None  # matrices that --sample chose from; None when all were to be compared


@dataclass(frozen=True)
class Verification:
    """What a verification found, in a fixed order, and how much it looked at."""

    findings: tuple[Finding, ...]
    checked: Checked
    against: str | None
    headers_only: bool = False

    @property
    def errors(self) -> int:
        """Findings that make the artifact wrong."""
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def ok(self) -> bool:
        """No error, and something was really checked."""
        tally = self.checked.tally
        compared = self.against is None or tally.matrices_compared > 0
        return not self.errors and (self.headers_only or tally.matrices > 0) and compared


def verify_artifact(
    folder: Path,
    against: Checkpoint | None = None,
    sample: int | None = None,
    advance: Callable[[int], None] | None = None,
    *,
    headers_only: bool = False,
    signers: Path | None = None,
) -> Verification:
    """Check everything in `folder`; `advance` is told the artifact's tensor bytes as they are checked.

    With `against`, kept tensors must equal the source's bit for bit, and `sample` quantized matrices (all of them when
    None; chosen with a fixed seed) must be as close to the source as their scheme allows. Peak memory is a few
    matrices. With `signers`, a file of `ssh-keygen`'s allowed signers, one of them must have signed every file as it is,
    which reads all bytes. With `headers_only` no tensor is read, so there is nothing to hold against a source. Raises SourceError
    when the artifact or the source can't be opened at all.
    """
    assert not (headers_only and against is not None), "a source is compared by its bytes"
    found = Findings()
    artifact = open_artifact(folder, found, ask_library=not headers_only)
    if against is not None and against.bare:
        raise SourceError(f"{against.name} has no weights to compare with", hint="give the checkpoint itself")
    declared = read_declared(read_stanza(artifact.stanza), artifact.modules, found)
    check_config(artifact, found)
    check_stanza(artifact, declared, found)
    check_tokenizer(artifact, found)
    manifest = read_manifest_of(artifact, found)
    if manifest is not None:
        check_manifest(artifact, manifest, found)
    if against is not None:
        from l4pack.artifact.original import check_unquantized

        check_unquantized(against, manifest)
    origin = None if against is None else OriginCheck(artifact, manifest, against)
    comparable = against if origin is not None and origin.comparable else None
    check_files(artifact, comparable, manifest.files if manifest else (), found)
    contents = examine(artifact, declared, found)
    if comparable is not None:
        check_config_kept(artifact, comparable, found)
    tally, sampled_of = Tally(tensors=len(artifact.entries)), None
    if not headers_only:
        from l4pack.verify.values import check_values

        report = advance or (lambda _: None)
        tally, sampled_of = check_values(artifact, contents, manifest, comparable, sample, report, found)
    if origin is not None:
        origin.tell(tally, found)
    if signers is not None:
        check_signature(folder, signers, found)
    if not contents.matrices and not any(finding.level == "error" for finding in found):
        found.error("stanza", "quantization_config", "no matrix is quantized")
    checked = Checked(len(artifact.files), contents.modules, tally, sampled_of)
    return Verification(tuple(found), checked, against.name if against else None, headers_only)
