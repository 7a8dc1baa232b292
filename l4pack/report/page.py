"""One page about an artifact that a person can look at: no network, no script, light and dark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import artifact_bytes, read_manifest
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.model import budget
from l4pack.budget.record import budget_record
from l4pack.budget.solve import limits
from l4pack.budget.subject import Subject
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import L4packError
from l4pack.evaluate.refusal_text import refusal_lines, refusal_rows
from l4pack.evaluate.sample import turns
from l4pack.model.names import classify
from l4pack.model.tensors import Role, catalogue
from l4pack.report.charts import Marks, Series, heat_map, histogram, line_chart, trade_off
from l4pack.resources import data_text
from l4pack.units import human_bytes, human_gib, human_seconds

GB = 10**9
_ITEM_BYTES = {"float32": 4}
_SLICES = {
    Role.ROUTED_EXPERT: ("routed experts", "c1"), Role.SHARED_EXPERT: ("shared experts", "c2"),
    Role.DENSE_MLP: ("dense MLPs", "c3"), Role.ATTENTION: ("attention", "c4"),
    Role.EMBEDDING: ("embedding and head", "c5"), Role.LM_HEAD: ("embedding and head", "c5"),
    Role.VISION: ("vision", "c6"), Role.PROJECTOR: ("vision", "c6"),
    Role.ROUTER: ("routers and norms", "c7"), Role.NORM: ("routers and norms", "c7"),
}  # fmt: skip
_BLOCKS = (
    ("residual stream", "c6", "residual_error"), ("attention", "c4", "attention_error"),
    ("shared expert", "c2", "shared_expert_error"), ("dense MLP", "c3", "dense_mlp_error"),
    ("routed experts", "c1", "routed_expert_error"),
)  # fmt: skip
_CHARTS = ("errors", "expert_errors", "coverage", "routing", "histogram", "positions")
_MEMORY_STYLES = {"weights": "c1", "kv_cache": "c2", "activations": "c3"}


@dataclass(frozen=True)
class StackedBar:
    """One stacked bar: its parts as (name, class, bytes)."""

    label: str
    parts: list[tuple[str, str, int]]
    scale: int  # bytes of the full width

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, _, size in self.parts)


def render_report(
    artifact: Checkpoint,
    accuracy: dict[str, Any] | None,
    subject: Subject,
    device: str,
    fitted: dict[str, Any] | None = None,
) -> str:
    """The page's HTML; sections without data are left out. `fitted` is what `fit --json` said of the recipe.

    Raises BudgetError or UsageError for an unknown device, UsageError for a manifest that can't be read.
    """
    folder = Path(artifact.name)
    bars = _size_bars(artifact)
    memory, memory_error = _memory(subject, device)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"bytes": human_bytes, "gib": human_gib, "seconds": human_seconds, "number": _number}
    return page.from_string(data_text("report", "templates", "report.html")).render(
        name=folder.name,
        accuracy=accuracy,
        refusals=_refusals(accuracy),
        recipe=_recipe_name(folder),
        size=artifact_bytes(folder) if (folder / MANIFEST_NAME).is_file() else None,
        bars=bars,
        legend=_legend(bars),
        memory=memory,
        memory_bar=_memory_bar(memory) if memory else None,
        memory_error=memory_error,
        charts={**dict.fromkeys(_CHARTS), **(_charts(accuracy) if accuracy else {})},
        sample=turns(accuracy or {}),
        fitted=fitted,
        frontier=_frontier(fitted) if fitted else None,
        choices=_choices(fitted) if fitted else [],
        blocks=[(label, style) for label, style, key in _BLOCKS if accuracy and _known(accuracy["layers"], key)],
    )


def _refusals(accuracy: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rows and words of what was measured of refusals."""
    found = (accuracy or {}).get("refusals")
    return {"rows": refusal_rows(found), "lines": refusal_lines(found)} if found else None


def _frontier(fitted: dict[str, Any]) -> Markup:
    """Bytes of weights against predicted KL: the frontier, one scheme for all, and what was chosen."""

    def points(sizes: Sequence[dict[str, Any]], words: str) -> list[tuple[float, float, str]]:
        return [
            (
                size["bytes"] / GB,
                size["predicted_kl"],
                f"{size['name'] or words}: {human_bytes(size['bytes'])}, KL {size['predicted_kl']:.4g}",
            )
            for size in sizes
        ]

    here = {"name": "chosen", "bytes": fitted["weight_bytes"], "predicted_kl": fitted["predicted_kl"]}
    marks = [
        Marks("c1", points(fitted["frontier"], "frontier"), joined=True),
        Marks("c7", points(fitted["uniform"], "one scheme for all")),
        Marks("c2", points([here], "chosen")),
    ]
    return Markup(trade_off(marks, "GB of weights", "predicted KL, nats"))


def _choices(fitted: dict[str, Any]) -> list[tuple[str, str, int, int, float]]:
    """Role, option, number of layers, bytes and predicted KL of what was chosen."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in fitted["choice"]:
        found[one["role"].replace("_", " "), one["option"]].append(one)
    return [
        (role, option, len(members), sum(one["bytes"] for one in members), sum(one["kl"] for one in members))
        for (role, option), members in sorted(found.items())
    ]


def _number(value: float | None, digits: int = 4) -> str:
    return "not measured" if value is None else f"{value:,.{digits}g}"


def _recipe_name(folder: Path) -> str | None:
    """What the manifest calls the recipe, None without a manifest. Raises UsageError."""
    return str(read_manifest(folder).recipe.get("name")) if (folder / MANIFEST_NAME).exists() else None


def _size_bars(artifact: Checkpoint) -> list[StackedBar]:
    """Bytes by role: what the original's configuration implies, and what the artifact's headers say."""
    before: dict[Role, int] = defaultdict(int)
    after: dict[Role, int] = defaultdict(int)
    item = _ITEM_BYTES.get(artifact.config.dtype or "", 2)
    for spec in catalogue(artifact.config).tensors:
        before[spec.role] += spec.numel * item
    for name, entry in artifact.entries.items():
        after[classify(name).role] += entry.nbytes
    scale = max(sum(before.values()), sum(after.values()))
    return [StackedBar("original", _parts(before), scale), StackedBar("artifact", _parts(after), scale)]


def _parts(sizes: dict[Role, int]) -> list[tuple[str, str, int]]:
    merged: dict[tuple[str, str], int] = defaultdict(int)
    for role, (label, style) in _SLICES.items():
        merged[label, style] += sizes.get(role, 0)
    return [(label, style, size) for (label, style), size in merged.items() if size]


def _legend(bars: Sequence[StackedBar]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((label, style) for bar in bars for label, style, _ in bar.parts))


def _memory(subject: Subject, device: str) -> tuple[dict[str, Any] | None, str]:
    host = find_host(device, load_devices())
    try:
        found = budget(subject, host, Load(), "vllm")
        return budget_record(found, limits(found)), ""
    except L4packError as error:
        return None, error.message


def _memory_bar(memory: dict[str, Any]) -> StackedBar:
    groups: dict[str, int] = defaultdict(int)
    for line in memory["lines"]:
        groups[line["group"]] += line["high_bytes"]
    parts = [
        (group.replace("_", " ").replace("kv", "KV"), _MEMORY_STYLES.get(group, "c7"), size)
        for group, size in groups.items()
        if size > 0
    ]
    return StackedBar(memory["device"], parts, max(memory["device_bytes"], sum(size for _, _, size in parts)))


def _known(layers: Sequence[dict[str, Any]], key: str) -> bool:
    return any(key in layer for layer in layers)


def _charts(accuracy: dict[str, Any]) -> dict[str, Markup]:
    layers = accuracy["layers"]
    labels = [str(layer["layer"]) for layer in layers]
    drawn: dict[str, str] = {}
    series = [
        Series(label, style, [layer.get(key) for layer in layers])
        for label, style, key in _BLOCKS
        if _known(layers, key)
    ]
    if series:
        drawn["errors"] = line_chart(labels, series, "layer", "relative error")
    if _known(layers, "routing_agreement"):
        moved = [None if "routing_agreement" not in one else 1 - one["routing_agreement"] for one in layers]
        drawn["routing"] = line_chart(labels, [Series("moved", "c1", moved)], "layer", "share of tokens moved")
    drawn |= _expert_maps([layer for layer in layers if layer.get("experts")])
    if "kl_histogram" in accuracy:
        found = accuracy["kl_histogram"]
        drawn["histogram"] = histogram(found["edges"], found["counts"], "KL of a token, nats", "tokens")
        places = accuracy["by_position"]
        values = Series("mean KL", "c1", [place["kl_mean"] for place in places])
        drawn["positions"] = line_chart([str(place["from"]) for place in places], [values], "position", "mean KL, nats")
    return {name: Markup(svg) for name, svg in drawn.items()}


def _expert_maps(layers: Sequence[dict[str, Any]]) -> dict[str, str]:
    if not layers:
        return {}
    rows = [str(layer["layer"]) for layer in layers]
    columns = [str(expert["expert"]) for expert in max(layers, key=lambda one: len(one["experts"]))["experts"]]
    tokens = [[float(expert["tokens"]) or None for expert in layer["experts"]] for layer in layers]
    drawn = {"coverage": heat_map(rows, columns, tokens, "tokens")}
    if any("error" in expert for layer in layers for expert in layer["experts"]):
        errors = [[expert.get("error") for expert in layer["experts"]] for layer in layers]
        drawn["expert_errors"] = heat_map(rows, columns, errors, "relative error")
    return drawn
