"""Auditing a folder or a Hub repository against the licence of the model in it.

Which licence governs is decided by what the model is, before what its card says: a Llama 4 whose card claims another
licence, or none, gets the strict reading. A checkpoint that only shares the architecture passes under its own licence
when it carries that licence's text, none of Meta's dimensions and no Llama 4 lineage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from l4pack.artifact.policy import Breach, Duty, Policy, agrees, plain, policies
from l4pack.checkpoint.open import hub_repository
from l4pack.containers.gguf_check import gguf_files, holds_gguf
from l4pack.containers.gguf_header import read_model
from l4pack.containers.gguf_model import TEXT, text_config
from l4pack.datafile import MAX_BYTES, json_or_none, parse_yaml
from l4pack.errors import LicenceError, SourceError
from l4pack.model.config import known_config
from l4pack.publish.names import name_findings

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD_NAME = "README.md"
MAX_TEXT_BYTES = 2_000_000
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|^(```|~~~).*?(?:^\1|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Materials:
    """What is to be audited: a name, file names, and a way to read the small ones."""

    where: str
    given_name: str | None
    files: frozenset[str]
    load: Callable[[str], bytes]

    def text(self, name: str) -> str | None:
        """A file's text; None when it is absent or empty of text."""
        if name not in self.files:
            return None
        return self.load(name).decode("utf-8-sig", errors="replace")

    @cached_property
    def card(self) -> Card:
        """The model card; an empty one when there is none."""
        return Card.parse(self.text(CARD_NAME) or "")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or an empty mapping when it is absent or unreadable."""
        value = json_or_none(self.text("config.json") or "{}")
        return value if isinstance(value, dict) else {}

    @property
    def name(self) -> str:
        """The name it is published under: as given, else the card's title where that is a name, else the folder's."""
        title = (self.card.title or "").rpartition("/")[2]
        return self.given_name or ("" if " " in title else title) or Path(self.where).resolve().name

    def find(self, names: Iterable[str]) -> str | None:
        """The first file with one of the names, whatever its case."""
        wanted = {name.lower() for name in names}
        return next((file for file in sorted(self.files) if file.lower() in wanted), None)


@dataclass(frozen=True)
class Card:
    """A model card, taken apart."""

    metadata: dict[str, Any]
    body: str

    @classmethod
    def parse(cls, text: str) -> Card:
        """Split off the metadata; unreadable ones count as none."""
        match = _FRONT_MATTER.match(text)
        if match is None:
            return cls({}, text)
        try:
            metadata = parse_yaml(match[1]) if len(match[1]) <= MAX_BYTES else None
        except (yaml.YAMLError, ValueError, RecursionError):
            metadata = None
        return cls(metadata if isinstance(metadata, dict) else {}, text[match.end() :])

    @cached_property
    def visible(self) -> str:
        """The body without comments and code blocks: what a reader is shown."""
        return _HIDDEN.sub("", self.body)

    @property
    def title(self) -> str | None:
        """The first heading."""
        headings = (line.strip("# \t") for line in self.visible.splitlines() if line.startswith(("# ", "#\t")))
        return next(headings, None)

    def says(self, phrases: Iterable[str], within_lines: int | None) -> bool:
        """Whether one paragraph holds all the phrases, within the first lines with text if that is asked."""
        lines = self.visible.splitlines()
        if within_lines is not None:
            lines = [line for line in lines if line.strip()][:within_lines]
        paragraphs = [plain(part) for part in re.split(r"\n\s*\n|\n(?=\s*[-*] )", "\n".join(lines))]
        return any(all(plain(phrase) in paragraph for phrase in phrases) for paragraph in paragraphs)


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    where: str
    name: str
    policy: Policy
    duties: int
    findings: tuple[Breach, ...]

    @property
    def ok(self) -> bool:
        """Whether every duty is met."""
        return not self.findings

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "where": self.where,
            "name": self.name,
            "licence": self.policy.title,
            "duties": self.duties,
        }


def audit(target: str, *, name: str | None = None, endpoint: str | None = None) -> Audit:
    """Audit a folder, or `ORG/NAME[@REVISION]` on the Hub.

    Raises SourceError when there is nothing to audit, LicenceError when no policy knows the licence, HubError.
    """
    if Path(target).is_dir():
        return audit_materials(folder_materials(Path(target), name))
    repo_id, revision = hub_repository(target)
    from l4pack.hub.client import hub_api, hub_errors

    api = hub_api(endpoint, None)
    with hub_errors(api, repo_id, revision):
        return audit_materials(hub_materials(api, repo_id, revision, name))


def audit_materials(materials: Materials) -> Audit:
    """Check every duty of the licence that governs the model. Raises SourceError, LicenceError."""
    if not materials.files:
        raise SourceError(f"{materials.where} is empty", hint="name the folder that holds the model")
    policy = governing_policy(materials)
    findings = [finding for duty in policy.duties for finding in breaches(duty, materials)]
    if policy.name is not None:
        findings += name_findings(materials.name, policy.name)
    duties = len(policy.duties) + (policy.name is not None)
    return Audit(materials.where, materials.name, policy, duties, tuple(findings))


def folder_materials(folder: Path, name: str | None = None) -> Materials:
    """The files at a folder's root; GGUF files say themselves which model they hold."""

    described = holds_gguf(folder)

    def load(file: str) -> bytes:
        if described and file == "config.json":
            return gguf_config(folder)
        with (folder / file).open("rb") as stream:
            return stream.read(MAX_TEXT_BYTES)

    files = frozenset(path.name for path in folder.iterdir() if path.is_file())
    return Materials(str(folder), name, files | ({"config.json"} if described else set()), load)


def gguf_config(folder: Path) -> bytes:
    """What config.json would say of the Llama 4 in a folder's GGUF files; no key where there is none. Raises SourceError."""
    texts = (file for file in map(read_model, gguf_files(folder)) if file.architecture == TEXT)
    return json.dumps(next((text_config(file).raw for file in texts), {})).encode()


def hub_materials(api: HfApi, repo_id: str, revision: str | None, name: str | None = None) -> Materials:
    """A Hub repository's files, read as they are asked for."""
    from l4pack.checkpoint.hub import open_remote

    remote = open_remote(api, repo_id, revision)
    load = partial(remote.small, limit=MAX_TEXT_BYTES)
    return Materials(repo_id, name or repo_id.rpartition("/")[2], frozenset(remote.files), load)


def with_lineage(
    materials: Materials, name: str, base: str | None, claims: Mapping[str, Any] | None = None
) -> Materials:
    """The same, called `name`, with a card that says the base model, and `claims` beside it, and nothing else."""
    said = {**({"base_model": base} if base else {}), **(claims or {})}
    card = f"---\n{yaml.safe_dump(said)}---\n".encode() if said else b""
    return Materials(
        materials.where,
        name,
        materials.files | {CARD_NAME},
        lambda file: card if file == CARD_NAME else materials.load(file),
    )


def governing_policy(materials: Materials) -> Policy:
    """The policy of the licence that governs the model. Raises LicenceError when none is known."""
    own = _own_licence(materials)
    for policy in policies():
        if policy.family is not None and (_is_family(policy, materials) or policy.declared_by(materials.card.metadata)):
            return own if own is not None and _only_shares_architecture(policy, own, materials) else policy
    if own is not None:
        return own
    declared = materials.card.metadata.get("license")
    raise LicenceError(
        f"{materials.where}: no policy knows " + (f"licence '{declared}'" if declared else "which licence governs it"),
        hint=f"policies: {', '.join(policy.title for policy in policies())}",
    )


def _own_licence(materials: Materials) -> Policy | None:
    """A general licence whose text is there, and which the card does not contradict."""
    metadata = materials.card.metadata
    for policy in policies():
        file = materials.find(policy.text_duty.files or [])
        if policy.family is None and file and policy.text_duty.satisfied_by(materials.text(file) or ""):
            return policy if policy.declared_by(metadata) or "license" not in metadata else None
    return next((p for p in policies() if p.family is None and p.declared_by(metadata)), None)


def _is_family(policy: Policy, materials: Materials) -> bool:
    assert policy.family is not None
    by_type = materials.config.get("model_type") in policy.family.model_types
    return by_type or _descends(policy, materials, materials.name)


def _descends(policy: Policy, materials: Materials, *names: str) -> bool:
    """Whether the base models on the card, or the names given, belong to the family."""
    assert policy.family is not None
    bases = materials.card.metadata.get("base_model") or []
    claimed = [*names, *([bases] if isinstance(bases, str) else bases if isinstance(bases, list) else [])]
    return any(re.search(policy.family.lineage, claim) for claim in claimed if isinstance(claim, str))


def _only_shares_architecture(policy: Policy, own: Policy, materials: Materials) -> bool:
    """Whether a model of the family's architecture is truly something else: by text, dimensions and lineage."""
    assert policy.family is not None
    file = materials.find(own.text_duty.files or [])
    own_text = file is not None and own.text_duty.satisfied_by(materials.text(file) or "")
    dimensions = _dimensions(materials.config)
    known = {_dimensions(known_config(name).raw) for name in policy.family.known_models}
    return own_text and None not in dimensions and dimensions not in known and not _descends(policy, materials)


def _dimensions(config: dict[str, Any]) -> tuple[Any, Any]:
    """Hidden size and vocabulary: what a pruned or cut copy of a model still has."""
    text = config.get("text_config")
    section = text if isinstance(text, dict) else config
    return section.get("hidden_size"), section.get("vocab_size")


def breaches(duty: Duty, materials: Materials) -> list[Breach]:
    """What of a duty is not met."""
    if duty.files is not None:
        return _check_file(duty, duty.files, materials)
    where = CARD_NAME
    if CARD_NAME not in materials.files:
        return [Breach(duty.rule, where, f"there is no card: {duty.cited}")]
    if duty.card is not None:
        good = materials.card.says(duty.card, duty.within_lines)
    else:
        good = any(agrees(choice, materials.card.metadata) for choice in duty.metadata or [])
    return [] if good else [Breach(duty.rule, where, duty.cited)]


def _check_file(duty: Duty, names: list[str], materials: Materials) -> list[Breach]:
    file = materials.find(names)
    if file is None:
        return [Breach(duty.rule, names[0], f"the file is missing: {duty.cited}")]
    text = plain(materials.text(file) or "")
    lacking = [sentence for sentence in duty.contains if plain(sentence) not in text]
    return [Breach(duty.rule, file, f'"{plain(lacking[0])}" is not in it: {duty.cited}')] if lacking else []
