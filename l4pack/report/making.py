"""How an artifact was made, in words: its recipe by role, what calibration saw, the command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4pack.artifact.calibration_record import read_calibration
from l4pack.artifact.manifest_schema import ManifestFile
from l4pack.artifact.mixture import scheme_rows
from l4pack.model.config import Llama4Config
from l4pack.publish.commands import make_command

_NAMED = 8
# A word of a shell's command as it is typed: quotes hold spaces and whatever looks like an option.
_WORD = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+""")
Facts = list[tuple[str, str]]


def making(folder: Path, manifest: ManifestFile, config: Llama4Config) -> dict[str, Any]:
    """What a page says of the making. Raises UsageError for a recipe or a record that can't be read."""
    recipe = manifest.made_with()
    plain = manifest.model_dump(mode="json", exclude={"files", "shards", "tensors"})
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "roles": [(", ".join(role.value.replace("_", " ") for role in roles), what)
                  for what, roles in scheme_rows(recipe, config)],
        "calibration": _calibration(read_calibration(folder)) if recipe.calibration else [],
        "command": a_line_each(make_command(plain, recipe.name, folder.resolve().name)),
        "version": manifest.l4pack_version,
        "source": _source(plain["source"]),
    }  # fmt: skip


def a_line_each(command: str) -> str:
    """A command with every option on a line of its own, as a shell still takes it."""
    words = _WORD.findall(command)
    return "".join(f" \\\n  {word}" if word.startswith("--") else f" {word}" for word in words).strip()


def _source(source: Mapping[str, Any]) -> str:
    name = str(source["repository"] or source["name"])
    merged = [str(one["repository"] or one["name"]) for one in source.get("adapters", ())]
    at = f"{name} at {source['revision']}" if source["revision"] else name
    return f"{at}, with {', '.join(merged)} merged" if merged else at


def _calibration(record: Mapping[str, Any] | None) -> Facts:
    if record is None:
        return [("record", "missing")]
    return [("text", _text(record["text"])), *_experts(record["routed_tokens"]), *_solved(record["matrices"])]


def _text(text: Mapping[str, Any]) -> str:
    parts = [str(text.get("source", "not recorded"))]
    if "sequences" in text and "sequence_length" in text:
        parts.append(f"{text['sequences']:,} sequences of at most {text['sequence_length']:,} tokens")
    if "tokens" in text:
        parts.append(f"{text['tokens']:,} tokens in all")
    return ", ".join(parts)


def _experts(routed: Mapping[str, list[int]]) -> Facts:
    counts = {(layer, expert): count for layer in routed for expert, count in enumerate(routed[layer])}
    if not counts:
        return []
    cold = [f"layer {layer} expert {expert}" for (layer, expert), count in counts.items() if not count]
    (layer, expert), least = min(counts.items(), key=lambda one: one[1])
    told = f"{len(cold):,} of {len(counts):,} saw no token"
    return [
        ("cold experts", f"{told}: {_listed(cold)}" if cold else told),
        ("fewest tokens", f"{least:,}, in layer {layer} expert {expert}"),
    ]


def _solved(matrices: Mapping[str, Mapping[str, Any]]) -> Facts:
    """Matrices that were solved, and those that fell back to rounding; others had their inputs looked at only."""
    solved = {name: found for name, found in matrices.items() if "error" in found}
    if not solved:
        return []
    fallen = [
        f"{name} ({found['reason']})" if found.get("reason") else name
        for name, found in solved.items()
        if found.get("method") == "rtn"
    ]
    borrowed = sum(bool(found.get("borrowed_tokens")) for found in solved.values())
    told = f"{len(fallen):,} of {len(solved):,} matrices are rounded to nearest instead"
    facts = [("fallbacks", f"{told}: {_listed(fallen)}" if fallen else told)]
    if borrowed:
        facts.append(
            ("borrowed tokens", f"{borrowed:,} matrices of thin experts were solved with runner-up tokens too")
        )
    return facts


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
