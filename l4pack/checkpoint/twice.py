"""Tensors as wrappers name them, and tensors that a checkpoint stores more than once.

torch.compile, FSDP and activation checkpointing put parts of their own into names; saving a wrapped and a plain model into
one folder, or shards by hand, leaves the same tensor in two places. Runtimes take whichever they read last.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from l4pack.checkpoint.header import TensorEntry
from l4pack.errors import SourceError
from l4pack.model.names import below_prefix

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A tensor's entry that is read, and another of the same dtype and shape that must hold the same bytes."""

    kept: TensorEntry
    other: TensorEntry

    @property
    def files(self) -> tuple[str, str]:
        """The files of both."""
        return self.kept.file, self.other.file

    def __str__(self) -> str:
        return f"{self.kept.name} in {self.kept.file} and {self.other.name} in {self.other.file}"


def unwrapped(name: str) -> str:
    """A tensor's name without what torch's wrappers put into it, anywhere."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def taken_once(
    found: Iterable[TensorEntry], weight_map: Mapping[str, str]
) -> tuple[dict[str, TensorEntry], tuple[Duplicate, ...], list[str]]:
    """Tensors by their names without wrappers, each once; what is stored twice; and notes on both.

    Of several, that is kept which the index places, then that under the prefix most tensors have. That they hold the
    same bytes is checked by `check_duplicates`, which reads them. Raises SourceError where dtypes or shapes differ.
    """
    places: dict[str, list[TensorEntry]] = defaultdict(list)
    stale, wrapped = set(), 0
    for entry in found:
        name = unwrapped(entry.name)
        wrapped += name != entry.name
        if weight_map.get(entry.name, entry.file) != entry.file:
            stale.add((name, entry.file))
        places[below_prefix(name) or name].append(replace(entry, name=name))
    prefixes = Counter(entry.name.removesuffix(below) for below, group in places.items() for entry in group)
    entries, duplicates = {}, []
    for below, group in places.items():
        first, *others = sorted(
            group,
            key=lambda entry: (
                (entry.name, entry.file) in stale,
                -prefixes[entry.name.removesuffix(below)],
                len(entry.name),
            ),
        )
        entries[first.name] = first
        duplicates += [Duplicate(first, other) for other in others]
    _refuse_unlike(duplicates)
    return entries, tuple(duplicates), _notes(duplicates, wrapped)


def _refuse_unlike(duplicates: Iterable[Duplicate]) -> None:
    for pair in duplicates:
        if (pair.kept.dtype, pair.kept.shape) != (pair.other.dtype, pair.other.shape):
            kept, other = (f"{entry.dtype} {list(entry.shape)}" for entry in (pair.kept, pair.other))
            raise SourceError(
                f"{pair} are one tensor stored twice, and differ: {kept} and {other}",
                hint="keep the right one: remove the other from its file and from the index",
            )


def _notes(duplicates: Sequence[Duplicate], wrapped: int) -> list[str]:
    notes = []
    if wrapped:
        notes.append(f"{wrapped:,} names carry parts of torch's wrappers (_orig_mod): they are read without them")
    if duplicates:
        count = f"{len(duplicates):,} tensors are" if len(duplicates) > 1 else "1 tensor is"
        notes.append(f"{count} stored twice ({duplicates[0]}): taken once, if quantize finds the same bytes in both")
    return notes


def by_files(duplicates: Iterable[Duplicate]) -> list[list[Duplicate]]:
    """Duplicates in groups that lie in the same two files."""
    ordered = sorted(duplicates, key=lambda pair: pair.files)
    return [list(group) for _, group in groupby(ordered, lambda pair: pair.files)]
