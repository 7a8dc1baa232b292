"""What `package` and `push` would refuse of an artifact to come, known before its first byte is written.

The same checks as theirs, of what an artifact carries over from its source: licence, lineage, name, files. What they
measure of the artifact itself (its budget, its gates, its digests) can't be known before it is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from l4pack.artifact.manifest import source_record
from l4pack.artifact.manifest_schema import SourceRecord
from l4pack.artifact.policy import Breach, Policy
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import L4packError, LicenceError
from l4pack.publish.base_model import base_claim, checked_base
from l4pack.publish.licence import Materials, breaches, governing_policy, with_lineage
from l4pack.publish.names import adapted_name, check_name, derive_name
from l4pack.publish.origin import Origin, source_text, taken
from l4pack.recipe import Recipe
from l4pack.verify.checks_files import absent_files

SAY_BASE = "package it with --base-model ORGANISATION/NAME"


@dataclass(frozen=True)
class Refusal:
    """One reason for which an artifact would not be published, and what to do about it."""

    rule: str
    where: str
    message: str
    hint: str

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def refused_later(
    checkpoint: Checkpoint, recipe: Recipe, *, name: str | None = None, base_model: str | None = None
) -> list[Refusal]:
    """What would be refused of an artifact of this source; nothing of a bare configuration, which has no files.

    `name` and `base_model` as `package` is given them. Raises UsageError for a base model that is no repository's name.
    """
    if checkpoint.bare:
        return []
    source = SourceRecord.model_validate(source_record(checkpoint))
    base = checked_base(base_model or source.repository)
    called = base_model.rpartition("/")[2] if base_model else source.name
    materials = _to_come(checkpoint)
    try:
        policy = governing_policy(with_lineage(materials, called, base))
    except LicenceError as error:
        return [Refusal("licence", materials.where, error.message, "put the licence's file beside the weights")]
    claims = {**policy.metadata, **({"base_model": base} if base else {})}
    found = list(_duties(policy, with_lineage(materials, called, base, claims), Origin(checkpoint)))
    wanted = name or derive_name(adapted_name(called, [adapter.name for adapter in source.adapters]), recipe)
    found += _refused("name", wanted, lambda: check_name(wanted, policy.name))
    if base is not None:
        found += _refused("base-model", base, lambda: base_claim(base, source, checkpoint.config.raw))
    for names, message in absent_files(checkpoint.companions, vision=checkpoint.config.vision is not None):
        found.append(Refusal("companion", names[0], message, "put it beside the weights"))
    return found


def _to_come(checkpoint: Checkpoint) -> Materials:
    """The small files of an artifact of this source, but for those that are written when it is packaged."""

    def load(name: str) -> bytes:
        if name == "config.json":
            return json.dumps(checkpoint.config.raw).encode()
        return (source_text(checkpoint, name) or "").encode()

    return Materials(checkpoint.name, None, frozenset((*checkpoint.companions, "config.json")), load)


def _duties(policy: Policy, materials: Materials, origin: Origin) -> Iterator[Refusal]:
    for duty in policy.duties:
        if duty.files is not None and duty.origin == "source" and materials.find(duty.files) is None:
            yield from _refused(duty.rule, duty.files[0], partial(taken, duty, origin))
        elif duty.card is None and duty.origin != "written":
            yield from (_of_breach(breach) for breach in breaches(duty, materials))


def _of_breach(breach: Breach) -> Refusal:
    hint = SAY_BASE if breach.rule == "base-model" else "put the file that came with the original model in its place"
    return Refusal(breach.rule, breach.where, breach.message, hint)


def _refused(rule: str, where: str, check: Callable[[], object]) -> list[Refusal]:
    """What a check of packaging raises, as a refusal."""
    try:
        check()
    except L4packError as error:
        return [Refusal(rule, where, error.message, error.hint)]
    return []
