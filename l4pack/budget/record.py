"""A budget as plain data: the stable keys of `l4pack budget --json`, bytes as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from l4pack.budget.lines import Line
from l4pack.budget.model import Budget
from l4pack.budget.solve import LargestLoads, Suggestion


def budget_record(found: Budget, limits: LargestLoads, changes: Sequence[Suggestion] = ()) -> dict[str, Any]:
    """What was asked, whether it fits, and every line of the GPU that decides."""
    setting, subject = found.setting, found.subject
    return {
        "fits": found.fits,
        "verdict": found.verdict.value,
        "headroom_bytes": found.headroom_bytes,
        "headroom_high_bytes": found.headroom_high_bytes,
        **asdict(limits),
        "model": subject.name,
        "recipe": subject.recipe,
        "device": found.host.name,
        "runtime": found.runtime.title,
        "context": setting.context,
        "sequences": setting.sequences,
        "kv_dtype": setting.kv_dtype,
        "tp": setting.tp,
        "pp": setting.pp,
        "idle_gpus": setting.idle_gpus,
        "expert_parallel": setting.expert_parallel,
        "hybrid_kv": setting.hybrid,
        "batched_tokens": setting.batched_tokens,
        "max_num_seqs": setting.max_num_seqs,
        "max_positions": setting.max_positions,
        "utilization": setting.utilization,
        "device_bytes": found.host.device.memory_bytes,
        "planned_bytes": found.tightest.planned_bytes,
        "weight_bytes": subject.weight_bytes,
        "gpu_weight_bytes": sum(line.low for line in found.lines if line.group == "weights"),
        "kv_bytes": sum(line.low for line in found.lines if line.group == "kv_cache"),
        "stage": found.tightest.index,
        "lines": [_line(line) for line in found.lines],
        "gpu_layers": setting.gpu_layers,
        "machine_bytes": sum(line.high for line in found.outside),
        "machine_lines": [_line(line) for line in found.outside],
        "changes": [asdict(change) for change in changes],
    }


def _line(line: Line) -> dict[str, Any]:
    return {
        "name": line.name,
        "group": line.group.value,
        "low_bytes": line.low,
        "high_bytes": line.high,
        "formula": line.formula,
    }
