"""Packaging and publishing an artifact: everything that must go with it, and everything that must be true first."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from l4pack.artifact.calibration_record import read_calibration
from l4pack.artifact.manifest_schema import ManifestFile, artifact_bytes, quantized_files, read_manifest
from l4pack.artifact.policy import Policy
from l4pack.artifact.signature import SMALL_BYTES, broken_files, is_signed, sign
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.model import budget
from l4pack.budget.named import open_subject
from l4pack.checkpoint.source import Checkpoint
from l4pack.datafile import small_object
from l4pack.errors import BudgetError, L4packError, UsageError
from l4pack.evaluate.gates import limits_of, recorded, require
from l4pack.evaluate.record import check_current, read_evaluations
from l4pack.hub.account import writer
from l4pack.hub.client import hub_api
from l4pack.model.config import parse_config
from l4pack.publish.base_model import base_claim, checked_base
from l4pack.publish.card import card_values, render_card
from l4pack.publish.card_check import carries_mark, first_difference, same_mark
from l4pack.publish.card_facts import CardFacts, Rung
from l4pack.publish.family import USE, addressee
from l4pack.publish.fits import device_fits, served
from l4pack.publish.gates import check_quality, licence_error
from l4pack.publish.licence import (
    CARD_NAME,
    Audit,
    Card,
    audit_materials,
    folder_materials,
    governing_policy,
    with_lineage,
)
from l4pack.publish.markdown import word
from l4pack.publish.names import adapted_name, check_name, derive_name
from l4pack.publish.origin import MAX_SMALL_FILE, Origin, source_text, taken
from l4pack.publish.upload import (
    Destination,
    LocalFile,
    Uploaded,
    UploadPlan,
    left_here,
    local_files,
    plan_upload,
    upload,
)
from l4pack.recipe import Gates, Promise
from l4pack.units import human_bytes, human_gib
from l4pack.verify.verify import verify_artifact
from l4pack.work.files import write_atomic

GATED_KEY = "extra_gated_prompt"


@dataclass(frozen=True)
class Wishes:
    """What a user may say about a package; None means what follows from the artifact."""

    name: str | None = None
    base_model: str | None = None
    template: Path | None = None
    gated: bool = False
    repository: str | None = None  # where it will be on the Hub, for the commands on the card
    family: Sequence[Rung] = ()  # other artifacts of the same model
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
    _evaluations(folder)
    base = checked_base(wishes.base_model or manifest.source.repository)
    policy = governing_policy(with_lineage(folder_materials(folder), folder.resolve().name, base))
    name = wishes.name or derived_name(manifest, wishes.base_model)
    check_name(name, policy.name)
    origin = Origin(source, *repository_of(manifest, wishes), wishes.endpoint)
    written = [*put_duty_files(folder, policy, origin)]
    card = render_card(gather_facts(folder, name, policy, manifest, source, base, wishes), wishes.template)
    written += write_changed(folder, CARD_NAME, card)
    return Packaged(name, tuple(written), audited(folder, name), missed_gates(folder))


def derived_name(manifest: ManifestFile, base_model: str | None) -> str:
    """What an artifact is called by what it was made from, the adapters in it and its recipe."""
    called = base_model.rpartition("/")[2] if base_model else manifest.source.name
    return derive_name(adapted_name(called, [one.name for one in manifest.source.adapters]), manifest.made_with())


def check_ready(
    folder: Path, name: str, *, gated: bool = False, advance: Callable[[int], None] | None = None
) -> list[str]:
    """Everything that must be true before an artifact leaves; what was checked, in words.

    Raises LicenceError (a duty or the name), BudgetError (the recipe's promise), QualityError (its gates), or
    L4packError (what `verify` found).
    """
    result = audited(folder, name)
    nbytes = artifact_bytes(folder)
    done = [
        f"artifact: {nbytes:,} bytes ({human_bytes(nbytes)})",
        f"licence: {result.policy.title}, {result.duties} duties met",
    ]
    check_gating(folder, gated=gated)
    done += check_measured(folder)
    promise = read_manifest(folder).made_with().promise
    if promise is None:
        done.append("budget and gates: the recipe promises none")
    else:
        done += [_check_budget(folder, promise), check_gates(folder, promise.gates)]
    done.append(_check_card(folder, result.policy))
    verification = verify_artifact(folder, advance=advance)
    if not verification.ok:
        first = next((found for found in verification.findings if found.level == "error"), None)
        what = f"{first.where}: {first.message}" if first else "nothing could be checked"
        raise L4packError(f"{folder} does not verify: {what}", hint=f"l4pack verify {folder} lists all findings")
    return [*done, f"verify: {verification.checked.tally.matrices} quantized matrices and every other tensor in order"]


def audited(folder: Path, name: str) -> Audit:
    """The audit of a folder that may go out under `name`. Raises LicenceError for the first duty that is not met."""
    result = audit_materials(folder_materials(folder, name))
    if not result.ok:
        raise licence_error(result)
    return result


def missed_gates(folder: Path) -> tuple[str, ...]:
    """Gates that a recorded evaluation of an artifact missed."""
    return tuple(gate["gate"] for record in _evaluations(folder) for gate in recorded(record) if not gate["ok"])


def address_card(folder: Path, repo_id: str) -> None:
    """Put the repository where it goes into the card's commands, which name a placeholder until then, or another one."""
    path = folder / CARD_NAME
    text = path.read_text(encoding="utf-8")
    named, part = addressee(text), USE.search(text)
    if part is not None and named is not None and named != repo_id:
        told = part[0].replace(named, repo_id)
        write_atomic(path, f"{text[: part.start()]}{told}{text[part.end() :]}".encode())


def who_pushes(target: Destination) -> str:
    """Whose token would be used, in words. Raises HubError where it may not write there."""
    return writer(hub_api(None, None), target.repo_id, proposes=target.pull_request)


def sign_artifact(folder: Path, key: Path, names: Collection[str] | None = None) -> None:
    """Sign every file that `push` would send. `names` as for `plan_push`. Raises UsageError, HubError."""
    sign(folder, _sent(folder, names), key)


def plan_push(folder: Path, target: Destination, names: Collection[str] | None = None) -> UploadPlan:
    """What a push would do; changes nothing. `names` are the files that belong to the folder, its manifest's unless given.

    Raises HubError, L4packError for a signature of other files than these.
    """
    local = _sent(folder, names)
    if is_signed(folder):
        _check_still_signed(folder, local)
    return replace(plan_upload(hub_api(None, None), target, local), left_behind=left_here(folder, local))


def push_artifact(plan: UploadPlan, *, advance: Callable[[int], None] = lambda _: None) -> Uploaded:
    """Upload as planned and compare digests. Raises HubError."""
    name = plan.target.repo_id.rpartition("/")[2]
    return upload(hub_api(None, None), plan, f"Upload {name} with l4pack", advance)


def _sent(folder: Path, names: Collection[str] | None) -> dict[str, LocalFile]:
    return local_files(folder, read_manifest(folder).files if names is None else names)


def _check_still_signed(folder: Path, sent: Collection[str]) -> None:
    """Nothing changed since the folder was signed; weights were held against the manifest, which is among the signed."""
    for name, message in broken_files(folder, largest=SMALL_BYTES):
        if name in sent or not (folder / name).exists():
            raise L4packError(f"{name} {message}", hint="sign it again: --sign KEY")


def check_gating(folder: Path, *, gated: bool) -> None:
    """Raise UsageError where readers are let in by request and the card has no fields for that."""
    card = Card.parse((folder / CARD_NAME).read_text(encoding="utf-8-sig"))
    if gated and GATED_KEY not in card.metadata:
        raise UsageError(f"the card has no {GATED_KEY}", hint=f"run l4pack package {folder} --gated first")


def _check_budget(folder: Path, promise: Promise) -> str:
    load = Load(context=promise.context, sequences=promise.sequences, kv_dtype=promise.kv_dtype)
    found = budget(open_subject(str(folder)), find_host(promise.device, load_devices()), load)
    what = f"{promise.context:,} tokens on {promise.device}"
    if not found.fits:
        raise BudgetError(
            f"the recipe promises {what}, which {found.lacking('lacks')}",
            hint=f"l4pack budget {folder} --device {promise.device} --context {promise.context} shows every line",
        )
    return f"budget: {what} fits, {human_gib(found.headroom_bytes)} to spare"


def check_measured(folder: Path) -> list[str]:
    """Every evaluation is of these weights, and no gate that one was judged by was missed."""
    records = _evaluations(folder)
    results = [result for record in records for result in recorded(record)]
    require(results, "make a better artifact; a gate given again to the same evaluation takes the place of the earlier")
    evaluations = "1 evaluation" if len(records) == 1 else f"{len(records)} evaluations"
    return [f"measured: {evaluations} of these weights, {len(results)} gates met"] if records else []


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """All evaluations, the most careful first. Raises UsageError, QualityError (of other weights than these)."""
    records = read_evaluations(folder)
    check_current(folder, records)
    return records


def _check_card(folder: Path, policy: Policy) -> str:
    """The card as it would be made now agrees with the one that is there in all that l4pack writes."""
    manifest, base = read_manifest(folder), base_on_card(folder)
    facts = gather_facts(folder, name_on_card(folder), policy, manifest, None, base, Wishes())
    return same_card(folder, facts)


def base_on_card(folder: Path, artifact: Path | None = None) -> str | None:
    """The first base model that a card names, of a folder that is an artifact or was made from `artifact`.

    Raises LicenceError for one that the artifact can't have been made from.
    """
    materials, artifact = folder_materials(folder), artifact or folder
    bases = materials.card.metadata.get("base_model") or []
    source = read_manifest(artifact).source
    adapters = {adapter.repository for adapter in source.adapters}
    listed = bases if isinstance(bases, list) else [bases]
    named = [base for base in listed if isinstance(base, str) and base not in adapters]
    for base in named:
        base_claim(base, source, folder_materials(artifact).config)
    return named[0] if named else None


def name_on_card(folder: Path) -> str:
    """What a folder's card calls it, else the folder's own name."""
    return (folder_materials(folder).card.title or folder.resolve().name).rpartition("/")[2]


def same_card(folder: Path, facts: CardFacts) -> str:
    """That a folder's card says what these facts say, in words. Raises L4packError where it says otherwise."""
    text = (folder / CARD_NAME).read_text(encoding="utf-8")
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


def check_gates(folder: Path, gates: Gates) -> str:
    """That the most careful evaluation meets a recipe's gates, in words. Raises QualityError."""
    asked = limits_of(gates, {})
    if not asked:
        return "gates: the recipe has none"
    check_quality(folder, gates)
    return f"gates: {', '.join(sorted(asked))} met"


def repository_of(manifest: ManifestFile, wishes: Wishes) -> tuple[str | None, str | None]:
    """The repository that the artifact was made from at its revision, else the base model that was named."""
    if manifest.source.repository:
        return manifest.source.repository, manifest.source.revision
    return wishes.base_model, None


def put_duty_files(folder: Path, policy: Policy, origin: Origin) -> list[str]:
    """Bring in every file the licence asks for that is not there yet."""
    written = []
    for duty in policy.duties:
        there = folder_materials(folder).find(duty.files or ["."])
        if duty.files is None or (there is not None and duty.origin == "source"):
            continue
        if duty.origin == "written":
            written += write_changed(folder, there or duty.files[0], "\n\n".join(duty.contains) + "\n")
        else:
            written += write_changed(folder, *taken(duty, origin))
    return written


def gather_facts(
    folder: Path,
    name: str,
    policy: Policy,
    manifest: ManifestFile,
    source: Checkpoint | None,
    base: str | None,
    wishes: Wishes,
) -> CardFacts:
    """All that an artifact's card is made from. Raises UsageError, SourceError, QualityError, LicenceError."""
    config = folder_materials(folder).config
    parse_config(config)
    records = _evaluations(folder)
    subject = open_subject(str(folder))
    reader = subject.exported_for
    commands, serves = served(subject, manifest.made_with().promise, wishes.repository or f"ORG/{word(name)}")
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
        fits=device_fits(subject),
        gated=wishes.gated,
        served=commands,
        serves=serves,
        exported_for=None if reader is None else (reader.runtime, str(reader.container)),
        repository=wishes.repository,
        generation=small_object(folder / "generation_config.json", MAX_SMALL_FILE),
        chat=(folder / "chat_template.jinja").is_file()
        or "chat_template" in small_object(folder / "tokenizer_config.json", MAX_SMALL_FILE),
        packaged=packaged_on(folder),
        family=wishes.family,
    )


def packaged_on(folder: Path) -> str:
    """The day that the card there was made, so that making it again changes nothing; today for the first."""
    card = folder / CARD_NAME
    said = re.search(r"Packaged (\d{4}-\d\d-\d\d)\.", card.read_text(encoding="utf-8")) if card.is_file() else None
    return said[1] if said else datetime.now(UTC).date().isoformat()


def _languages(source: Checkpoint | None) -> list[str]:
    card = Card.parse((source_text(source, CARD_NAME) if source else None) or "")
    languages = card.metadata.get("language") or []
    listed = languages if isinstance(languages, list) else [languages]
    return [language for language in listed if isinstance(language, str)]


def write_changed(folder: Path, name: str, text: str) -> list[str]:
    """Write a small file in one step; its name if that changed anything."""
    path, content = folder / name, text.encode()
    if path.is_file() and path.read_bytes() == content:
        return []
    write_atomic(path, content)
    return [name]
