"""Other artifacts of the same model, side by side: size, closeness, where each runs, from the records beside them,
here or on the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from l4pack.artifact.contents import recorded_digest
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import ManifestFile, read_manifest
from l4pack.artifact.published import Looked, look
from l4pack.budget.named import open_subject
from l4pack.checkpoint.hub import open_remote
from l4pack.checkpoint.open import HUB_SCHEME
from l4pack.errors import UsageError
from l4pack.evaluate.record import check_current, read_evaluations
from l4pack.hub.client import hub_api, hub_errors, patiently
from l4pack.publish.card_facts import Rung
from l4pack.publish.fits import served
from l4pack.publish.licence import CARD_NAME, folder_materials
from l4pack.publish.markdown import word

USE = re.compile(r"^## Use it$.*?(?=^## )", re.MULTILINE | re.DOTALL)
PLACEHOLDER = "ORG/"
_NAMED = r"(?:vllm serve|hf download|mlx_lm\.generate --model)"
_COLLECTION = re.compile(r"(?:https://huggingface\.co/)?collections/([\w.-]+/[\w.-]+)")


def addressee(card: str) -> str | None:
    """The repository that a card's commands name."""
    part = USE.search(card)
    named = re.search(rf"^{_NAMED} ([\w.-]+/[\w.-]+)(?=\s)", part[0], re.MULTILINE) if part else None
    return named[1] if named else None


def rungs(named: Iterable[str], own: Path, say: Callable[[str], None] = lambda _: None) -> list[Rung]:
    """What stands on the card of the artifact in `own` of others of its model: folders, `ORG/NAME`, or `collections/OWNER/SLUG`,
    whose repositories of other models are left out, which `say` is told.

    Of a repository, headers alone are read. Raises UsageError for one of another model, QualityError for records of other
    weights than its own, SourceError, HubError.
    """
    manifest, here = read_manifest(own), recorded_digest(own)
    found = []
    for name in named:
        collection = _COLLECTION.fullmatch(name)
        for one in [name] if collection is None else _members(collection[1], say):
            with look(one, weights=False, say=say) as looked:
                if collection is None:
                    _refuse_strangers(looked, manifest)
                elif _is_stranger(looked, manifest):
                    say(f"{looked.name}: of another model, left out")
                    continue
                elif recorded_digest(looked.folder) == here:
                    continue
                found.append(_rung(looked))
    return found


def _members(slug: str, say: Callable[[str], None]) -> Iterator[str]:
    """The artifacts in a collection, as names on the Hub."""
    api = hub_api(None, None)
    with hub_errors(api, slug):
        items = patiently(lambda: api.get_collection(slug)).items
    for name in (item.item_id for item in items if item.item_type == "model"):
        with hub_errors(api, name):
            made_here = MANIFEST_NAME in open_remote(api, name, None).files
        if made_here:
            yield f"{HUB_SCHEME}{name}"
        else:
            say(f"{name}: no artifact of l4pack, left out")


def _is_stranger(looked: Looked, manifest: ManifestFile) -> bool:
    other = read_manifest(looked.folder)
    alike = other.source.headers_sha256 == manifest.source.headers_sha256
    return not alike or _merged(other) != _merged(manifest)


def _merged(manifest: ManifestFile) -> list[str]:
    """The digests of the adapters in a model."""
    return [adapter.sha256 for adapter in manifest.source.adapters]


def _refuse_strangers(looked: Looked, manifest: ManifestFile) -> None:
    if _is_stranger(looked, manifest):
        model = read_manifest(looked.folder).source.name
        raise UsageError(
            f"{looked.name} was made from another model ({model}) than this artifact ({manifest.source.name})",
            hint="a family is of one original",
        )


def _rung(looked: Looked) -> Rung:
    folder, other = looked.folder, read_manifest(looked.folder)
    records = read_evaluations(folder)
    check_current(folder, records)
    materials = folder_materials(folder)
    addressed = addressee(materials.text(CARD_NAME) or "")
    told = None if addressed is None or addressed.startswith(PLACEHOLDER) else addressed
    return Rung(
        name=word(materials.name),
        repository=told if looked.here else looked.name.partition("@")[0],
        weight_bytes=other.weight_bytes,
        accuracy=records[0] if records else None,
        runs=served(open_subject(str(folder)), other.made_with().promise, "ORG/NAME")[1],
    )
