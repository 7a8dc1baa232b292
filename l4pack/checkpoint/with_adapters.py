"""A checkpoint with adapters merged into it: the same tensors, some of them made as they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from l4pack.checkpoint.adapter import Adapter
from l4pack.checkpoint.adapter_places import Changes, changes_of
from l4pack.checkpoint.header import TensorEntry, tensor_bytes
from l4pack.checkpoint.merged import Merged
from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.errors import SourceError
from l4pack.quant.dtypes import FloatName

_FAMILIES = ("scout", "maverick")
_WORD = re.compile(r"[a-z]+")


def merged(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """A checkpoint with adapters merged in the order given. Raises SourceError for one that doesn't belong to it."""
    if checkpoint.config.quantized:
        raise SourceError(
            f"{checkpoint.name} is quantized: an adapter is merged into the original",
            hint="quantize the original with --lora; runtimes can also serve the adapter beside the quantized model",
        )
    entries = dict(checkpoint.entries)
    before: dict[str, Changes] = {}
    for adapter in adapters:
        _check_base(adapter, checkpoint)
        changes = changes_of(adapter, checkpoint.layout)
        _refuse_second(changes, before, adapter)
        before[adapter.title] = changes
        if not checkpoint.bare:
            entries |= {name: _made(entries[name], changes, name) for name in {*changes.added, *changes.replaced}}
    return _with(checkpoint, entries, adapters)


def _with(checkpoint: Checkpoint, entries: dict[str, TensorEntry], adapters: Sequence[Adapter]) -> Checkpoint:
    files = {adapter.file: adapter.files.weights for adapter in adapters}
    store = None if checkpoint.store is None else checkpoint.store.beside(files)
    names = ", ".join(adapter.title for adapter in adapters)
    notes = [note for adapter in adapters for note in _notes(adapter, checkpoint)]
    reopen = checkpoint.reopen and partial(_again, checkpoint.reopen, adapters)
    return replace(
        checkpoint,
        entries=entries,
        store=store,
        adapters=tuple(adapters),
        notes=(*checkpoint.notes, *notes),
        kind=f"{checkpoint.kind}, with {names} merged",
        reopen=reopen,
    )


def _again(reopen: Callable[[], Checkpoint], adapters: Sequence[Adapter]) -> Checkpoint:
    return merged(reopen(), [adapter.reopen() for adapter in adapters])


def _made(base: TensorEntry, changes: Changes, name: str) -> TensorEntry:
    """A tensor as the changes make it, in the dtype it has."""
    given = changes.replaced.get(name)
    added = tuple(changes.added.get(name, ()))
    if given is None and isinstance(base.derived, Merged):  # an earlier adapter's changes: all are added, then rounded
        return replace(base, derived=replace(base.derived, changes=(*base.derived.changes, *added)))
    stored = base if given is None else given
    dtype = cast("FloatName", base.dtype)
    return replace(base, derived=Merged(stored, added, dtype), nbytes=tensor_bytes(dtype, base.shape))


def _refuse_second(changes: Changes, before: dict[str, Changes], adapter: Adapter) -> None:
    """Raise SourceError where one of two adapters replaces what the other changes: neither would be in the sum."""
    for title, earlier in before.items():
        both = (set(changes.replaced) & {*earlier.added, *earlier.replaced}) | (
            set(earlier.replaced) & {*changes.added}
        )
        if both:
            raise SourceError(
                f"{title} and {adapter.title} both change {min(both)}, and one of them replaces it whole",
                hint="give one of the two adapters",
            )


def _check_base(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Raise SourceError where names say that an adapter is of another Llama 4: Scout's fits Maverick's attention."""
    base, name = (_family(text) for text in (adapter.config.base_model_name_or_path or "", checkpoint.name))
    if base is not None and name is not None and base != name:
        raise SourceError(
            f"{adapter.title} is an adapter of {adapter.config.base_model_name_or_path}, the source is {checkpoint.name}",
            hint="give the model it was trained on",
        )


def _family(text: str) -> str | None:
    """The known model whose name a repository's or a folder's last part has in it, if just one is."""
    words = _WORD.findall(_stem(text))
    found = [family for family in _FAMILIES if family in words]
    return found[0] if len(found) == 1 else None


def _stem(text: str) -> str:
    return text.rstrip("/").rpartition("/")[2].lower()


def _same_folder(base: str, checkpoint: Checkpoint) -> bool:
    """Whether an adapter's base is the folder that the checkpoint lies in."""
    store = checkpoint.store
    return isinstance(store, LocalStore) and os.path.realpath(base) == os.path.realpath(store.folder)


def _notes(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    base = adapter.config.base_model_name_or_path
    if base is None or _stem(base) == _stem(checkpoint.name) or _same_folder(base, checkpoint):
        return []
    return [f"{adapter.title} says that it was trained on {base[:200]!r}: is that this model?"]
