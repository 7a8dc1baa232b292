"""A plan and a checkpoint, summed up by class of tensor for tables and JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from l4pack.artifact.stanza import read_stanza
from l4pack.checkpoint.companions import Missing, is_licence, missing_files
from l4pack.checkpoint.source import Checkpoint
from l4pack.checkpoint.templates import has_template
from l4pack.model.names import classify
from l4pack.model.tensors import Catalogue, Role, canonical_naming, catalogue
from l4pack.plan.plan import Plan
from l4pack.recipe import KEEP


@dataclass(frozen=True, slots=True)
class ClassRow:
    """All tensors of one role that got one scheme."""

    role: Role
    scheme: str
    matrices: int
    source_bytes: int
    artifact_bytes: int


def plan_classes(plan: Plan) -> list[ClassRow]:
    """One row for each role and scheme, in model order."""
    artifact: Counter[tuple[Role, str]] = Counter()
    for tensor in plan.tensors:
        artifact[tensor.role, tensor.scheme] += tensor.nbytes
    source: Counter[tuple[Role, str]] = Counter()
    count: Counter[tuple[Role, str]] = Counter()
    for task in plan.tasks:
        key = (task.copied.role, KEEP) if task.copied else (task.targets[0].linear.role, task.targets[0].scheme)
        source[key] += task.read_bytes
        count[key] += len(task.targets) * (task.rows[0] == 0) if task.targets else 1
    for target in plan.calibrated:
        source[target.linear.role, target.scheme] += plan.target_bytes(target)
        count[target.linear.role, target.scheme] += 1
    order = list(Role)
    keys = sorted(artifact, key=lambda key: (order.index(key[0]), key[1]))
    return [
        ClassRow(role, scheme, count[role, scheme], source[role, scheme], artifact[role, scheme])
        for role, scheme in keys
    ]


def room_record(plan: Plan) -> dict[str, Any]:
    """What the job may take where it was planned; unlike the plan, it is another at every call."""
    return {"memory_limit_bytes": plan.room.nbytes, "memory_limited_by": plan.room.limit}


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan as JSON: bytes as plain numbers, stable keys."""
    return {
        "source": plan.checkpoint.name,
        "recipe": plan.recipe.name,
        "artifact_bytes": plan.artifact_bytes,
        "weight_bytes": plan.weight_bytes,
        "source_bytes": plan.source_weight_bytes,
        "peak_ram_bytes": plan.peak_ram_bytes,
        "peak_vram_bytes": plan.peak_vram_bytes,
        "disk_bytes": plan.disk_bytes,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.artifact_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "workers": plan.workers,
        "files": plan.files,
        "classes": [
            {
                "role": row.role.value,
                "scheme": row.scheme,
                "matrices": row.matrices,
                "source_bytes": row.source_bytes,
                "artifact_bytes": row.artifact_bytes,
            }
            for row in plan_classes(plan)
        ],
        "calibration": _calibration_record(plan),
        **beside_record(plan.checkpoint),
        "warnings": plan.warnings(),
    }


def _calibration_record(plan: Plan) -> dict[str, Any] | None:
    """What calibrating looks at and takes; None when nothing is calibrated."""
    if plan.needs is None:
        return None
    text = None if plan.text is None else plan.text.record
    return {"matrices": len(plan.looked_at), "tokens": plan.needs.tokens, "streams": plan.needs.streams,
            "ram_bytes": plan.needs.ram_bytes, "hidden_bytes": plan.needs.disk_bytes,
            "experts_together": plan.needs.together, "hidden_states_on_device": plan.needs.resident,
            "gradient": plan.needs.gradient and plan.needs.gradient.record(), "text": text}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RoleRow:
    """All tensors of one role in a checkpoint."""

    role: Role
    tensors: int
    parameters: int
    nbytes: int


def checkpoint_roles(checkpoint: Checkpoint) -> list[RoleRow]:
    """One row for each role, in model order; a bare configuration counts as BF16."""
    layout = structure(checkpoint)
    parameters: Counter[Role] = Counter()
    for spec in layout.tensors:
        parameters[spec.role] += spec.numel
    held = [(classify(name).role, entry.nbytes) for name, entry in checkpoint.entries.items()]
    held = held or [(spec.role, 2 * spec.numel) for spec in layout.tensors]
    tensors = Counter(role for role, _ in held)
    nbytes: Counter[Role] = Counter()
    for role, size in held:
        nbytes[role] += size
    return [RoleRow(role, tensors[role], parameters[role], nbytes[role]) for role in Role if tensors[role]]


def structure(checkpoint: Checkpoint) -> Catalogue:
    """What the configuration says the model holds; of an unquantized checkpoint, held against its headers."""
    return catalogue(checkpoint.config) if checkpoint.config.quantized else checkpoint.layout


def layout_in_words(checkpoint: Checkpoint, layout: Catalogue) -> str:
    """How the weights lie in files, whether experts are fused, and what the text model's names begin with."""
    if checkpoint.bare or checkpoint.config.quantized or checkpoint.kind != Checkpoint.kind:
        return checkpoint.kind
    experts = "fused" if layout.fused else "one by one"
    known = layout.naming == canonical_naming(checkpoint.config)
    names = "named as released" if known else f"the text model's names below {layout.naming.text or 'no prefix'}"
    return f"{checkpoint.kind}, experts {experts}, {names}"


def licence_files(checkpoint: Checkpoint) -> list[str]:
    """Files of a checkpoint that state its licence."""
    return [name for name in checkpoint.companions if is_licence(name)]


def files_missing(checkpoint: Checkpoint) -> list[Missing]:
    """Companions a checkpoint lacks, and what each absence breaks; nothing of a bare configuration."""
    if checkpoint.bare:
        return []
    return missing_files(
        checkpoint.companions,
        vision=checkpoint.config.vision is not None,
        template=has_template(checkpoint),
        temperature_tuning=bool(checkpoint.config.text.attn_temperature_tuning),
    )


def beside_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The files beside the weights as JSON: left behind, and missing."""
    return {
        "left_behind": list(checkpoint.left_behind),
        "missing": [asdict(file) for file in files_missing(checkpoint)],
    }


def checkpoint_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as JSON."""
    text, layout = checkpoint.config.text, structure(checkpoint)
    stanza = read_stanza(checkpoint.config.stanza)
    return {
        "source": checkpoint.name,
        "revision": checkpoint.revision,
        "layout": layout_in_words(checkpoint, layout),
        "architecture": (checkpoint.config.raw.get("architectures") or [None])[0],
        "quantization": stanza.format or stanza.method,
        "parameters": layout.parameters,
        "tensors": len(checkpoint.entries) or len(layout.tensors),
        "weight_bytes": checkpoint.weight_bytes or 2 * layout.parameters,
        "shards": len(checkpoint.shards),
        "dtypes": dict(Counter(entry.dtype for entry in checkpoint.entries.values())),
        "layers": text.num_hidden_layers,
        "moe_layers": len(text.moe_layers),
        "experts": text.num_local_experts,
        "fused_experts": layout.fused and not checkpoint.config.quantized,
        "vision": checkpoint.config.vision is not None,
        "max_context": text.max_position_embeddings,
        "licence_files": licence_files(checkpoint),
        "other_files": dict(checkpoint.companions),
        **beside_record(checkpoint),
        "warnings": list(checkpoint.notes),
        "roles": [
            {"role": row.role.value, "tensors": row.tensors, "parameters": row.parameters, "bytes": row.nbytes}
            for row in checkpoint_roles(checkpoint)
        ],
    }
