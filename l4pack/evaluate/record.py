"""`accuracy.json`: what an evaluation found, inside the artifact's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4pack.errors import UsageError
from l4pack.evaluate.gates import gate_results
from l4pack.recipe import Gates
from l4pack.work.files import write_atomic

ACCURACY_NAME = "accuracy.json"
MAX_BYTES = 200_000_000


def write_accuracy(artifact: Path, record: dict[str, Any], gates: Gates, recovery: Mapping[str, float]) -> None:
    """Add the gates' results to a record and write it."""
    record["gates"] = gate_results(record, gates, recovery)
    write_atomic(artifact / ACCURACY_NAME, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def read_accuracy(artifact: Path) -> dict[str, Any]:
    """A record written before. Raises UsageError."""
    path = artifact / ACCURACY_NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is implausibly large", hint="run `l4pack evaluate` again")
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{artifact} has no {ACCURACY_NAME}", hint="run `l4pack evaluate` first") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON", hint="run `l4pack evaluate` again") from error
    if not isinstance(record, dict) or "tokens" not in record or "layers" not in record:
        raise UsageError(f"{path} is not an evaluation", hint="run `l4pack evaluate` again")
    return record
