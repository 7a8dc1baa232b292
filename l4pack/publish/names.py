"""Names of artifacts: derived from source and recipe, or the user's own, held against the licence and the Hub's rules."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from l4pack.artifact.mixture import recipe_tag
from l4pack.artifact.policy import Breach, NameRule
from l4pack.errors import LicenceError
from l4pack.recipe import Recipe

MAX_NAME = 96  # the Hub's limit
_HUB_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_FAMILY = re.compile(r"llama(?![a-z])", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def adapted_name(base: str, adapters: Sequence[str]) -> str:
    """A model's name with those of the adapters merged into it; one that names the family itself stands for the model."""
    for adapter in adapters:
        base = adapter if _FAMILY.match(adapter) else f"{base}-{adapter}"
    return base


def derive_name(source_name: str, recipe: Recipe) -> str:
    """The source's name with what was done to it: `Llama-4-Scout-17B-16E-Instruct-W4A16-g128`."""
    return f"{source_name.strip('-. ')}-{recipe_tag(recipe)}"


def check_name(name: str, rule: NameRule | None) -> None:
    """Raise LicenceError, citing the rule, when a model may not be called `name`."""
    findings = [*([] if rule is None else name_findings(name, rule)), *hub_name_findings(name)]
    if findings:
        raise LicenceError(
            f"'{_printable(name)}' can't be the model's name: {findings[0].message}",
            hint=f"for example --name {suggestion(name, rule)}",
        )


def name_findings(name: str, rule: NameRule) -> list[Breach]:
    """What the licence has against a name."""
    where = _printable(name)
    if not name.isascii():
        odd = next(char for char in name if not char.isascii())
        shown = unicodedata.name(odd, f"U+{ord(odd):04X}")
        what = f"it holds {shown}, which only looks like a letter of '{rule.begins_with}' or hides in it"
        return [Breach("name", where, f"{what} ({rule.clause})")]
    if not re.match(rf"{rule.begins_with}(?![A-Za-z])", name):
        return [Breach("name", where, f"a model's name must begin with '{rule.begins_with}' ({rule.clause})")]
    marks = [mark for mark in rule.foreign_marks if mark.lower() in (word.lower() for word in _WORD.findall(name))]
    if marks:
        return [Breach("name", where, f"no right is granted to the mark '{marks[0]}' ({rule.marks_clause})")]
    return []


def hub_name_findings(name: str) -> list[Breach]:
    """What the Hub has against a name."""
    if len(name) <= MAX_NAME and name.isascii() and _HUB_NAME.fullmatch(name) and not name.endswith(".git"):
        return []
    what = f"a repository's name has at most {MAX_NAME} letters, digits, '-', '_' and '.', no '--', '..' or '.git' end"
    return [Breach("name", _printable(name), f"{what} (Hub)")]


def suggestion(name: str, rule: NameRule | None) -> str:
    """A name that meets the rules, as close as can be."""
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    clean = re.sub(r"[^A-Za-z0-9._-]+|--+|\.\.+", "-", ascii_only).removesuffix(".git").strip("-.")
    if rule is None:
        return clean[:MAX_NAME] or "model"
    words = [part for part in re.split(r"[-_]", clean) if part.lower() not in {m.lower() for m in rule.foreign_marks}]
    rest = "-".join(re.sub(rf"^{rule.begins_with}", "", part, flags=re.IGNORECASE) for part in words).strip("-._")
    rest = re.sub(r"--+", "-", rest)
    return f"{rule.begins_with}-{rest}"[:MAX_NAME].strip("-.")


def _printable(name: str) -> str:
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in name)
