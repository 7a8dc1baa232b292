"""Which model a measurement is of, wherever its files lie."""

from __future__ import annotations

import hashlib
import json

from l4pack.checkpoint.source import Checkpoint


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 of a model's headers and configuration: every tensor's name, dtype and shape, and the keys l4pack reads.

    A copy of the files has the same; so has a bare configuration of the same model, and a fine-tune of it.
    """
    config = checkpoint.config
    sections = [config.text, *([config.vision] if config.vision is not None else [])]
    digest = hashlib.sha256(json.dumps([one.model_dump(mode="json") for one in sections], sort_keys=True).encode())
    for spec in sorted(checkpoint.layout.tensors, key=lambda spec: spec.name):
        digest.update(f"{spec.name} {checkpoint.dtype_of(spec.name)} {spec.shape}\n".encode())
    return digest.hexdigest()
