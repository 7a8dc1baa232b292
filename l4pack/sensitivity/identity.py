"""Which model a measurement is of, wherever its files lie."""

from __future__ import annotations

import hashlib
import json

from l4pack.assign import source_dtype
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError
from l4pack.model.names import classify
from l4pack.model.tensors import Role

_SMALL = (Role.NORM, Role.ROUTER)


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 of a model's headers and configuration: every tensor's name, dtype and shape, and the keys l4pack reads.

    A copy of the files has the same; so has a bare configuration of the same model, and a fine-tune of it.
    """
    config = checkpoint.config
    sections = [config.text, *([config.vision] if config.vision is not None else [])]
    digest = hashlib.sha256(json.dumps([one.model_dump(mode="json") for one in sections], sort_keys=True).encode())
    for spec in sorted(checkpoint.layout.tensors, key=lambda spec: spec.name):
        digest.update(f"{spec.name} {source_dtype(checkpoint, spec.name)} {spec.shape}\n".encode())
    return digest.hexdigest()


def weights_digest(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 of the norms' and routers' bytes by name: a fine-tune has another, and little is read.

    Raises SourceError for a configuration without weights.
    """
    if checkpoint.bare or checkpoint.store is None:
        raise SourceError(f"{checkpoint.name} is a configuration without weights", hint="give a checkpoint folder")
    digest = hashlib.sha256()
    with Reader(checkpoint.entries, checkpoint.store.path) as reader:
        for name in sorted(checkpoint.entries):
            if classify(name).role in _SMALL:
                digest.update(name.encode())
                digest.update(reader.tensor(name).tobytes())
    return digest.hexdigest()
