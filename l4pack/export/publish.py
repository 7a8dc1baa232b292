"""Packaging and publishing an export: the licence, the card and the measurements of the artifact whose numbers it holds.

Nothing of these lies in an export's folder, so the artifact is named beside it, and its digest must be the recorded one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from l4pack.artifact.contents import recorded_digest
from l4pack.artifact.manifest_schema import ManifestFile, read_manifest
from l4pack.artifact.policy import Policy
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.files import FileSubject, open_files
from l4pack.budget.load import Load
from l4pack.budget.matrix import matrix
from l4pack.checkpoint.source import Checkpoint, open_folder
from l4pack.datafile import read_json, small_object, validate
from l4pack.errors import L4packError, UsageError
from l4pack.export.record import RECORD_NAME, export_folder
from l4pack.publish.base_model import checked_base
from l4pack.publish.card import render_card
from l4pack.publish.card_facts import CardFacts, ExportFacts
from l4pack.publish.export_card import suffixed
from l4pack.publish.licence import CARD_NAME, folder_materials, governing_policy, with_lineage
from l4pack.publish.names import check_name
from l4pack.publish.origin import Origin
from l4pack.publish.publish import (
    Packaged,
    Wishes,
    audited,
    base_on_card,
    check_gates,
    check_gating,
    check_measured,
    derived_name,
    gather_facts,
    missed_gates,
    name_on_card,
    packaged_on,
    put_duty_files,
    repository_of,
    same_card,
    write_changed,
)
from l4pack.units import human_bytes

_MAX_BYTES = 16 * 1024**2
_HINT = "export again"
_APPLE = ("m4-max-128", "m2-ultra-192", "m3-ultra-256", "m3-ultra-512")
_HOSTS = {"gguf": ("rtx4090", "rtx5090", "2xrtx5090", "rtx6000-pro", "h100", "2xh100", *_APPLE), "mlx": _APPLE}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Rounded(_Data):
    where: str
    to: str
    why: str


class _File(_Data):
    bytes: Annotated[int, Field(ge=0)]


class _Artifact(_Data):
    contents_sha256: str | None


class _Record(_Data):
    """What packaging takes from the record beside an export."""

    container: Annotated[str, Field(pattern="^(gguf|mlx)$")]
    proved_by: str
    artifact: _Artifact
    rounded: tuple[_Rounded, ...]
    files: Mapping[str, _File]


@dataclass(frozen=True)
class Export:
    """An export's folder, and the artifact that it was made from."""

    folder: Path
    artifact: Path
    record: _Record
    manifest: ManifestFile

    @property
    def names(self) -> frozenset[str]:
        """The files that belong to it, whether or not each is there."""
        return frozenset({*self.record.files, *self.manifest.files, RECORD_NAME})


def find_export(folder: Path, artifact: Path | None) -> Export | None:
    """The export in a folder, made from `artifact`; None for an artifact itself. Raises UsageError where one is named wrongly."""
    if export_folder(folder) is not None and artifact is None:
        raise UsageError(f"{folder} is an export", hint="add --of and the artifact that it was made from")
    if export_folder(folder) is None and artifact is not None:
        raise UsageError(f"{folder} is no export of l4pack", hint="leave --of out, or name an export's folder")
    return None if artifact is None else open_export(folder, artifact)


def open_export(folder: Path, artifact: Path) -> Export:
    """An export beside its artifact. Raises UsageError for a record that can't be read, or of another artifact."""
    found = export_folder(folder) or folder
    record = validate(_Record, read_json(found / RECORD_NAME, _MAX_BYTES, _HINT), str(found / RECORD_NAME), _HINT)
    manifest = read_manifest(artifact)
    if record.artifact.contents_sha256 != recorded_digest(artifact):
        raise UsageError(
            f"{found} was not made from {artifact}: its record has another digest",
            hint="name the artifact that it was exported from",
        )
    return Export(found, artifact, record, manifest)


def package_export(export: Export, source: Checkpoint | None = None, wishes: Wishes | None = None) -> Packaged:
    """Put licence, notice and card into an export's folder, under the artifact's name with `-GGUF` or `-MLX`.

    Licence files come from the artifact, or from `source`; the base model is the one on the artifact's card unless it is named.
    Raises LicenceError, UsageError, SourceError, QualityError for measurements of other weights.
    """
    wishes, folder, manifest = wishes or Wishes(), export.folder, export.manifest
    base = checked_base(wishes.base_model or base_on_card(export.artifact) or manifest.source.repository)
    materials = folder_materials(export.artifact)
    policy = governing_policy(with_lineage(materials, export.artifact.resolve().name, base))
    made = _artifact_name(export, wishes)
    name = wishes.name or suffixed(made, export.record.container)
    check_name(name, policy.name)
    origin = Origin(source or open_folder(export.artifact), *repository_of(manifest, wishes), wishes.endpoint)
    written = put_duty_files(folder, policy, origin)
    written += write_changed(
        folder, CARD_NAME, render_card(_facts(export, name, policy, base, wishes), wishes.template)
    )
    return Packaged(name, tuple(written), audited(folder, name), missed_gates(export.artifact))


def check_export_ready(export: Export, name: str, *, gated: bool = False) -> list[str]:
    """Everything that must be true before an export leaves; what was checked, in words.

    Raises LicenceError (a duty or the name), QualityError (a gate of the artifact's), L4packError (a weight, a file or the
    card is not what the artifact makes it).
    """
    from l4pack.export.check import check_export  # brings numpy, which packaging does without

    folder, artifact = export.folder, export.artifact
    result = audited(folder, name)
    done = [
        f"export: {sum(_sizes(export).values()):,} bytes ({human_bytes(sum(_sizes(export).values()))})",
        f"licence: {result.policy.title}, {result.duties} duties met",
    ]
    check_gating(folder, gated=gated)
    done += check_measured(artifact)
    promise = export.manifest.made_with().promise
    if promise is not None:
        done.append(check_gates(artifact, promise.gates))
    facts = _facts(export, name_on_card(folder), result.policy, base_on_card(folder, artifact), Wishes())
    done.append(same_card(folder, facts))
    found = check_export(folder, open_folder(artifact))
    if found.proof is None:
        first = found.faults[0]
        raise L4packError(
            f"{folder} does not verify: {first.where}: {first.message}",
            hint=f"l4pack verify {folder} --against {artifact}",
        )
    return [*done, f"verify: {found.proof.weights:,} weights read back, each is the artifact's"]


def _artifact_name(export: Export, wishes: Wishes) -> str:
    """What the artifact is published as: by its card, else by what its source and recipe make it."""
    if (export.artifact / CARD_NAME).is_file():
        return name_on_card(export.artifact)
    return derived_name(export.manifest, wishes.base_model)


def _facts(export: Export, name: str, policy: Policy, base: str | None, wishes: Wishes) -> CardFacts:
    """The artifact's facts, but for the files and for what runs them."""
    artifact, record = export.artifact, export.record
    facts = gather_facts(artifact, name, policy, export.manifest, open_folder(artifact), base, wishes)
    subject = open_files(export.folder)
    if subject is None:
        raise UsageError(f"{export.folder} holds no model that {record.container} has", hint=_HINT)
    memory = _memory(subject, record.container)
    runs = next((f"{device}, up to {most:,} tokens" for device, most in memory if most), "")
    made = _export_facts(export, subject, memory, _artifact_name(export, wishes))
    return replace(
        facts,
        config=small_object(export.folder / "config.json") or facts.config,
        files=_sizes(export),
        weight_bytes=subject.weight_bytes,
        fits=(),
        served={},
        serves=runs,
        packaged=packaged_on(export.folder),
        export=replace(made, text_alone=facts.multimodal and record.container == "mlx"),
    )


def _export_facts(export: Export, subject: FileSubject, memory: list[tuple[str, int]], artifact: str) -> ExportFacts:
    record = export.record
    return ExportFacts(
        container=record.container,
        artifact=artifact,
        proved_by=record.proved_by,
        model=subject.path.name if record.container == "gguf" else "",
        tower=subject.tower.name if subject.tower is not None else None,
        context=subject.config.text.max_position_embeddings,
        rounded=[(one.where, one.to, one.why) for one in record.rounded],
        memory=memory,
    )


def _memory(subject: FileSubject, container: str) -> list[tuple[str, int]]:
    """Most tokens of one sequence by device, for devices that people run such files on."""
    devices = load_devices()
    hosts = [find_host(name, devices) for name in _HOSTS[container]]
    cells = matrix([subject], hosts, Load(), subject.runtime)[0].cells
    return [(f"{host.count} x {host.device.title}", cell.max_context) for host, cell in zip(hosts, cells, strict=True)]


def _sizes(export: Export) -> dict[str, int]:
    """The files with tensors and their bytes, as they lie there. Raises UsageError where one is missing."""
    gone = next((name for name in export.record.files if not (export.folder / name).is_file()), None)
    if gone is not None:
        raise UsageError(f"{gone} is not in {export.folder}", hint=_HINT)
    return {name: (export.folder / name).stat().st_size for name in export.record.files}
