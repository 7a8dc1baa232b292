"""Other artifacts of the same model, side by side: size, closeness, where each runs, from the records in their folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from l4pack.artifact.manifest_schema import ManifestFile, read_manifest
from l4pack.budget.named import open_subject
from l4pack.errors import UsageError
from l4pack.evaluate.record import check_current, read_evaluations
from l4pack.publish.card_facts import Rung
from l4pack.publish.fits import served
from l4pack.publish.licence import CARD_NAME, folder_materials
from l4pack.publish.markdown import word

USE = re.compile(r"^## Use it$.*?(?=^## )", re.MULTILINE | re.DOTALL)
PLACEHOLDER = "ORG/"


def addressee(card: str) -> str | None:
    """The repository that a card's commands name."""
    part = USE.search(card)
    named = re.search(r"^vllm serve ([\w.-]+/[\w.-]+)(?=\s)", part[0], re.MULTILINE) if part else None
    return named[1] if named else None


def rungs(folders: Sequence[Path], manifest: ManifestFile) -> list[Rung]:
    """What stands on a card of other artifacts. Raises UsageError for one of another model, QualityError for records of
    other weights than its own."""
    return [_rung(folder, manifest) for folder in folders]


def _rung(folder: Path, manifest: ManifestFile) -> Rung:
    other = read_manifest(folder)
    if other.source.headers_sha256 != manifest.source.headers_sha256:
        raise UsageError(
            f"{folder} was made from another model ({other.source.name}) than this artifact ({manifest.source.name})",
            hint="a family is of one original",
        )
    records = read_evaluations(folder)
    check_current(folder, records)
    materials = folder_materials(folder)
    card = materials.text(CARD_NAME) or ""
    repository = addressee(card)
    return Rung(
        name=word(materials.name),
        repository=None if repository is None or repository.startswith(PLACEHOLDER) else repository,
        weight_bytes=other.weight_bytes,
        accuracy=records[0] if records else None,
        runs=served(open_subject(str(folder)), other.made_with().promise, "ORG/NAME")[1],
    )
