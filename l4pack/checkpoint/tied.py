"""A head that is stored although the configuration ties it to the embedding."""

from __future__ import annotations

from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.checkpoint.reader import NUMPY_TYPES, Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError
from l4pack.model.tensors import Role
from l4pack.quant.floats import widen

_CHUNK = 4 * 1024**2  # elements


def check_tied_head(checkpoint: Checkpoint) -> None:
    """Read a tied head that is stored, and raise SourceError where it is not the embedding: runtimes differ then."""
    head = checkpoint.tied_head
    if head is None or checkpoint.store is None:
        return
    embedding = next(spec.name for spec in checkpoint.layout.tensors if spec.role is Role.EMBEDDING)
    entries = {embedding: checkpoint.entries[embedding], head.name: head}
    numel = 8 * head.nbytes // DTYPE_BITS[head.dtype]
    with Reader(entries, checkpoint.store.path) as reader:
        for start in range(0, numel, _CHUNK):
            count = min(_CHUNK, numel - start)
            values = []
            for name, entry in entries.items():
                item = DTYPE_BITS[entry.dtype] // 8
                values.append(widen(reader.span(name, start * item, count * item).view(NUMPY_TYPES[entry.dtype])))
            if not (values[0] == values[1]).all():
                raise SourceError(
                    f"{head.name} is tied to the embedding by config.json, and holds other numbers",
                    hint="set tie_word_embeddings to false in the text_config if the head is right, or remove the head",
                )
