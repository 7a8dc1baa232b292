"""Packaging and publishing an artifact: everything that must go with it, and everything that must be true first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from l4pack.artifact.calibration_record import read_calibration
from l4pack.artifact.manifest_schema import ManifestFile, artifact_bytes, quantized_files, read_manifest
from l4pack.artifact.policy import Duty, Policy
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.matrix import HOSTS, matrix
from l4pack.budget.model import Verdict, budget
from l4pack.budget.named import open_subject
from l4pack.checkpoint.hub import open_remote
from l4pack.checkpoint.source import HUB_ID, Checkpoint
from l4pack.errors import BudgetError, L4packError, LicenceError, SourceError, UsageError
from l4pack.evaluate.gates import limits_of, recorded, require
from l4pack.evaluate.record import check_current, read_evaluations
from l4pack.hub.client import hub_api, hub_errors
from l4pack.model.config import parse_config
from l4pack.publish.base_model import base_claim
from l4pack.publish.card import CardFacts, DeviceFit, card_values, render_card
from l4pack.publish.card_check import carries_mark, first_difference, same_mark
from l4pack.publish.gates import check_quality, licence_error
from l4pack.publish.licence import (
    CARD_NAME,
    Audit,
    Card,
    Materials,
    audit_materials,
    folder_materials,
    governing_policy,
)
from l4pack.publish.names import check_name, derive_name
from l4pack.publish.upload import Destination, Uploaded, UploadPlan, left_here, local_files, plan_upload, upload
from l4pack.recipe import Gates, Promise
from l4pack.units import human_bytes, human_gib
from l4pack.verify.verify import verify_artifact
from l4pack.work.files import write_atomic

MAX_SMALL_FILE = 2_000_000
GATED_KEY = "extra_gated_prompt"


@dataclass(frozen=True)
class Wishes:
    """What a user may say about a package; None means what follows from the artifact."""

    name: str | None = None
    base_model: str | None = None
    template: Path | None = None
    gated: bool = False
    endpoint: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Packaged:
    """A packaged artifact."""

    name: str
    written: tuple[str, ...]
    audit: Audit
    missed: tuple[str, ...] = ()  # gates that a recorded evaluation missed: `push` refuses the artifact


def package_artifact(folder: Path, source: Checkpoint | None = None, wishes: Wishes | None = None) -> Packaged:
    """Put licence, notice and card into an artifact's folder, under a name that may be used.

    Licence files come from `source`, or from the repository and revision in the manifest; they are never made up.
    The same artifact gives the same bytes. Raises LicenceError, UsageError, SourceError, HubError.
    """
    wishes = wishes or Wishes()
    manifest = read_manifest(folder)
    judged = [gate for record in _evaluations(folder) for gate in recorded(record)]
    base = _base_model(manifest, wishes)
    policy = governing_policy(_without_card(folder, base))
    name = wishes.name or derive_name(manifest.source.name, manifest.made_with())
    check_name(name, policy.name)
    written = [*_duty_files(folder, policy, manifest, source, wishes.endpoint)]
    card = render_card(_facts(folder, name, policy, manifest, source, base, wishes), wishes.template)
    written += _write(folder, CARD_NAME, card)
    result = audit_materials(folder_materials(folder, name))
    if not result.ok:
        raise licence_error(result)
    return Packaged(name, tuple(written), result, tuple(gate["gate"] for gate in judged if not gate["ok"]))


def check_ready(
    folder: Path, name: str, *, gated: bool = False, advance: Callable[[int], None] | None = None
) -> list[str]:
    """Everything that must be true before an artifact leaves; what was checked, in words.

    Raises LicenceError (a duty or the name), BudgetError (the recipe's promise), QualityError (its gates), or
    L4packError (what `verify` found).
    """
    result = audit_materials(folder_materials(folder, name))
    if not result.ok:
        raise licence_error(result)
    nbytes = artifact_bytes(folder)
    done = [
        f"artifact: {nbytes:,} bytes ({human_bytes(nbytes)})",
        f"licence: {result.policy.title}, {result.duties} duties met",
    ]
    _check_gating(folder, gated=gated)
    done += _check_measured(folder)
    promise = read_manifest(folder).made_with().promise
    if promise is None:
        done.append("budget and gates: the recipe promises none")
    else:
        done += [_check_budget(folder, promise), _check_gates(folder, promise.gates)]
    done.append(_check_card(folder, result.policy))
    verification = verify_artifact(folder, advance=advance)
    if not verification.ok:
        first = next((found for found in verification.findings if found.level == "error"), None)
        what = f"{first.where}: {first.message}" if first else "nothing could be checked"
        raise L4packError(f"{folder} does not verify: {what}", hint=f"l4pack verify {folder} lists all findings")
    return [*done, f"verify: {verification.checked.tally.matrices} quantized matrices and every other tensor in order"]


def plan_push(folder: Path, target: Destination) -> UploadPlan:
    """What a push would do; changes nothing. Raises HubError."""
    local = local_files(folder, read_manifest(folder).files)
    return replace(plan_upload(hub_api(None, None), target, local), left_behind=left_here(folder, local))


def push_artifact(plan: UploadPlan, *, advance: Callable[[int], None] = lambda _: None) -> Uploaded:
    """Upload as planned and compare digests. Raises HubError."""
    name = plan.target.repo_id.rpartition("/")[2]
    return upload(hub_api(None, None), plan, f"Upload {name} with l4pack", advance)


def _check_gating(folder: Path, *, gated: bool) -> None:
    card = Card.parse((folder / CARD_NAME).read_text(encoding="utf-8-sig"))
    if gated and GATED_KEY not in card.metadata:
        raise UsageError(f"the card has no {GATED_KEY}", hint=f"run l4pack package {folder} --gated first")


def _check_budget(folder: Path, promise: Promise) -> str:
    load = Load(context=promise.context, sequences=promise.sequences, kv_dtype=promise.kv_dtype)
    found = budget(open_subject(str(folder)), find_host(promise.device, load_devices()), load)
    what = f"{promise.context:,} tokens on {promise.device}"
    if not found.fits:
        verb = "may lack" if found.verdict is Verdict.UNSURE else "lacks"
        raise BudgetError(
            f"the recipe promises {what}, which {verb} {human_gib(-found.headroom_bytes)}",
            hint=f"l4pack budget {folder} --device {promise.device} --context {promise.context} shows every line",
        )
    return f"budget: {what} fits, {human_gib(found.headroom_bytes)} to spare"


def _check_measured(folder: Path) -> list[str]:
    """Every evaluation is of these weights, and no gate that one was judged by was missed."""
    records = _evaluations(folder)
    results = [result for record in records for result in recorded(record)]
    require(results, "make a better artifact; a gate given again to the same evaluation takes the place of the earlier")
    return [f"measured: {len(records)} evaluations of these weights, {len(results)} gates met"] if records else []


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """All evaluations, the most careful first. Raises UsageError, QualityError (of other weights than these)."""
    records = read_evaluations(folder)
    check_current(folder, records)
    return records


def _check_card(folder: Path, policy: Policy) -> str:
    """The card as it would be made now agrees with the one that is there in all that l4pack writes."""
    text = (folder / CARD_NAME).read_text(encoding="utf-8")
    card = Card.parse(text)
    bases = card.metadata.get("base_model") or []
    named = [base for base in (bases if isinstance(bases, list) else [bases]) if isinstance(base, str)]
    manifest = read_manifest(folder)
    for base in named:
        base_claim(base, manifest.source, folder_materials(folder).config)
    name = (card.title or folder.resolve().name).rpartition("/")[2]
    facts = _facts(folder, name, policy, manifest, None, named[0] if named else None, Wishes())
    if carries_mark(text):
        wrong = None if same_mark(text, card_values(facts)) else "its text"
    else:
        wrong = first_difference(text, render_card(facts))
    if wrong is not None:
        raise L4packError(
            f"{folder / CARD_NAME} says otherwise than the records beside it, in {wrong!r}",
            hint=f"l4pack package {folder} writes it anew; what you added elsewhere on it is lost",
        )
    return "card: says what the records say"


def _check_gates(folder: Path, gates: Gates) -> str:
    asked = limits_of(gates, {})
    if not asked:
        return "gates: the recipe has none"
    check_quality(folder, gates)
    return f"gates: {', '.join(sorted(asked))} met"


def _base_model(manifest: ManifestFile, wishes: Wishes) -> str | None:
    base = wishes.base_model or manifest.source.repository
    if base is not None and (HUB_ID.fullmatch(base) is None or "@" in base):
        raise UsageError(f"'{base}' is not a repository's name", hint="write --base-model ORGANISATION/NAME")
    return str(base) if base else None


def _without_card(folder: Path, base: str | None) -> Materials:
    """The folder as its licence is decided by: with its lineage, and without a card of its own."""
    there = folder_materials(folder)
    card = f"---\nbase_model: {base}\n---\n".encode() if base else b""
    return Materials(
        there.where,
        folder.resolve().name,
        there.files | {CARD_NAME},
        lambda file: card if file == CARD_NAME else there.load(file),
    )


def _duty_files(
    folder: Path, policy: Policy, manifest: ManifestFile, source: Checkpoint | None, endpoint: str | None
) -> list[str]:
    """Bring in every file the licence asks for that is not there yet."""
    written = []
    for duty in policy.duties:
        there = folder_materials(folder).find(duty.files or ["."])
        if duty.files is None or (there is not None and duty.origin == "source"):
            continue
        if duty.origin == "written":
            written += _write(folder, there or duty.files[0], "\n\n".join(duty.contains) + "\n")
        else:
            written += _write(folder, *_from_source(duty, manifest, source, endpoint))
    return written


def _from_source(
    duty: Duty, manifest: ManifestFile, source: Checkpoint | None, endpoint: str | None
) -> tuple[str, str]:
    """Name and text of a file the source must have; what it holds is checked before it is taken."""
    for name in duty.files or []:
        text = source_text(source, name) if source else _repository_text(manifest, name, endpoint)
        if text is not None and duty.satisfied_by(text):
            return name, text
    where = source.name if source else manifest.source.repository or "the source (no repository is known)"
    raise LicenceError(
        f"{duty.files[0] if duty.files else duty.rule} is missing, and {where} has none that serves: {duty.cited}",
        hint="put the file that came with the original model into the folder, or say --source",
    )


def source_text(source: Checkpoint, name: str) -> str | None:
    """A small text file of a source, None when it has none."""
    if source.store is None:
        return None
    try:
        path = source.store.path(name)
    except SourceError:
        return None
    if not path.is_file() or path.stat().st_size > MAX_SMALL_FILE:
        return None
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _repository_text(manifest: ManifestFile, name: str, endpoint: str | None) -> str | None:
    repository, revision = manifest.source.repository, manifest.source.revision
    if not repository:
        return None
    api = hub_api(endpoint, None)
    with hub_errors(api, repository, revision):
        remote = open_remote(api, repository, revision)
        file = remote.files.get(name)
        fits = file is not None and file.size <= MAX_SMALL_FILE
        return remote.small(name, MAX_SMALL_FILE).decode(errors="replace") if fits else None


def _facts(
    folder: Path,
    name: str,
    policy: Policy,
    manifest: ManifestFile,
    source: Checkpoint | None,
    base: str | None,
    wishes: Wishes,
) -> CardFacts:
    config = folder_materials(folder).config
    parse_config(config)
    records = _evaluations(folder)
    return CardFacts(
        name=name,
        policy=policy,
        manifest=manifest.model_dump(mode="json", exclude={"files", "shards", "tensors"}),
        config=config,
        files=quantized_files(folder, manifest),
        base_model=base,
        languages=_languages(source),
        accuracy=records[0] if records else None,
        others=records[1:],
        claim=base_claim(base, manifest.source, config) if base else "",
        weight_bytes=manifest.weight_bytes,
        calibration=read_calibration(folder),
        fits=_fits(folder, manifest),
        gated=wishes.gated,
    )


def _languages(source: Checkpoint | None) -> list[str]:
    card = Card.parse((source_text(source, CARD_NAME) if source else None) or "")
    languages = card.metadata.get("language") or []
    listed = languages if isinstance(languages, list) else [languages]
    return [language for language in listed if isinstance(language, str)]


def _fits(folder: Path, manifest: ManifestFile) -> list[DeviceFit]:
    """The largest context of one sequence by device, for devices from small to large."""
    promise = manifest.made_with().promise
    devices = load_devices()
    hosts = [find_host(name, devices) for name in HOSTS]
    load = Load(sequences=1, kv_dtype=promise.kv_dtype if promise else "auto")
    (row,) = matrix([open_subject(str(folder))], hosts, load, "vllm")
    titles = {host.name: f"{host.count} x {host.device.title}" for host in hosts}
    counts = {host.name: host.count for host in hosts}
    return [DeviceFit(titles[cell.host], counts[cell.host], cell.max_context) for cell in row.cells]


def _write(folder: Path, name: str, text: str) -> list[str]:
    """Write a small file in one step; its name if that changed anything."""
    path, content = folder / name, text.encode()
    if path.is_file() and path.read_bytes() == content:
        return []
    write_atomic(path, content)
    return [name]
