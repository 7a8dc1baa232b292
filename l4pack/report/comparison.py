"""What artifacts of one original weigh, cost, and how close to it they are, as plain data: `compare --json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l4pack.artifact.contents import recorded_digest
from l4pack.artifact.made import made_seconds
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import artifact_bytes, read_manifest
from l4pack.artifact.published import Looked
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.model import budget
from l4pack.budget.named import open_subject
from l4pack.budget.solve import limits
from l4pack.errors import L4packError
from l4pack.evaluate.compare import Comparison, Difference
from l4pack.evaluate.record import read_evaluations

_MEASURED = (
    "kl_mean", "kl_standard_error", "kl_median", "kl_p99", "kl_max", "top1_agreement", "top1_agreement_standard_error",
    "perplexity_artifact", "perplexity_artifact_standard_error", "perplexity_ratio", "perplexity_ratio_standard_error",
)  # fmt: skip
_OF_ALL = ("against", "tokens", "text", "perplexity_reference", "perplexity_reference_standard_error")
_TASK = ("questions", "accuracy", "accuracy_reference", "recovery")


def comparison_record(
    comparison: Comparison, artifacts: Sequence[Looked], device: str, context: int | None
) -> dict[str, Any]:
    """Figures of all, one object an artifact, and one a pair. Raises UsageError for a damaged record."""
    first, names = comparison.records[0], titles(artifacts)
    return {
        **{key: first[key] for key in _OF_ALL},
        "device": device,
        "artifacts": [
            {"artifact": name, "path": one.name, **_artifact(one.folder, record, device, context)}
            for name, one, record in zip(names, artifacts, comparison.records, strict=True)
        ],
        "differences": [_difference(one, names) for one in comparison.differences],
        "run": {**first["run"], "resumed_layers": first["resumed_layers"]},
    }


def titles(artifacts: Sequence[Looked]) -> list[str]:
    """What to call each: its folder's name, or where another has that, its path or its repository."""
    names = [one.folder.resolve().name for one in artifacts]
    return [name if names.count(name) == 1 else one.name for name, one in zip(names, artifacts, strict=True)]


def _artifact(folder: Path, record: Mapping[str, Any], device: str, context: int | None) -> dict[str, Any]:
    own = (folder / MANIFEST_NAME).is_file()
    return {
        "recipe": read_manifest(folder).recipe.get("name") if own else None,
        "artifact_bytes": artifact_bytes(folder) if own else None,
        "weight_bytes": record["artifact_weight_bytes"],
        **{key: record[key] for key in _MEASURED},
        "tasks": _tasks(folder),
        "memory": _memory(folder, device, context),
        "made_seconds": made_seconds(folder),
    }


def _tasks(folder: Path) -> dict[str, Any]:
    """Tasks that were run on these weights before, each from the most careful evaluation that has it."""
    here = recorded_digest(folder)
    found: dict[str, Any] = {}
    for record in reversed(read_evaluations(folder)):
        if record["identity"]["artifact"] == here:
            found |= {name: {key: task.get(key) for key in _TASK} for name, task in record["tasks"].items()}
    return found


def _memory(folder: Path, device: str, context: int | None) -> dict[str, Any]:
    """Whether it fits, and with how much context; `error` where that is not known."""
    host = find_host(device, load_devices())
    try:
        found = budget(open_subject(str(folder)), host, Load(context=context), "vllm")
        most = limits(found)
    except L4packError as error:
        return {"error": error.message}
    return {
        "fits": found.fits,
        "verdict": found.verdict.value,
        "context": found.setting.context,
        "headroom_bytes": found.headroom_bytes,
        "max_context": most.max_context,
    }


def _difference(one: Difference, names: Sequence[str]) -> dict[str, Any]:
    return {**asdict(one), "artifact": names[one.artifact], "than": names[one.than]}
