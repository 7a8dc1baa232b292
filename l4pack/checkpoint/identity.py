"""What a checkpoint is, as parts of a job's identity."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable

from l4pack.checkpoint.source import Checkpoint


def source_parts(checkpoint: Checkpoint, name: str, companions: Iterable[str] = ()) -> dict[str, str]:
    """Configuration, headers and each weight file of the checkpoint called `name`, and those companions that matter."""
    headers = hashlib.sha256()
    for entry in sorted(checkpoint.entries.values(), key=lambda entry: entry.name):
        headers.update(f"{entry!r}\n".encode())
    config = json.dumps(checkpoint.config.raw, sort_keys=True)
    parts = {
        f"{name}: config.json": hashlib.sha256(config.encode()).hexdigest(),
        f"{name}: tensors": headers.hexdigest(),
    }
    if checkpoint.store is not None:
        for file in (*checkpoint.shards, *sorted(companions)):
            shown = os.fsencode(file).decode(errors="replace")
            parts[f"{name}: {shown}"] = checkpoint.store.identity(file)
    return parts
