"""Whether a checkpoint is the original an artifact was made from: unquantized, and what the manifest knows of it.

Headers tell another model, but not a fine-tune of it. Norms, routers and whatever else the recipe left alone lie in the
artifact with the original's own numbers, and a fine-tune has others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from l4pack.artifact.adapters import other_adapters
from l4pack.artifact.as_source import is_own, is_release
from l4pack.artifact.contents import tensor_digest
from l4pack.artifact.manifest import MANIFEST_NAME, source_record
from l4pack.artifact.manifest_schema import ManifestFile, SourceRecord, read_manifest
from l4pack.checkpoint.exports import WEIGHT_DTYPES
from l4pack.checkpoint.header import DTYPE_BITS, TensorEntry
from l4pack.checkpoint.reader import NUMPY_TYPES, Reader
from l4pack.checkpoint.sample import local_sample
from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.errors import SourceError, UsageError
from l4pack.model.names import classify, detect_layout
from l4pack.model.tensors import Role, canonical_naming, rename
from l4pack.quant.floats import round_to_bfloat16, widen

_SMALL = (Role.NORM, Role.ROUTER)
ORIGINAL_KEYS = ("headers_sha256", "weights_sha256")
_SPAN = 32768  # numbers read at the beginning, in the middle and at the end of a large tensor
_FINE_TUNE = "give the checkpoint it was quantized from; is this a fine-tune of it, or was it dequantized?"
_COMPARE = "give the unquantized checkpoint: comparing two artifacts with each other is not what this is for"


def check_original(artifact: Checkpoint, original: Checkpoint) -> None:
    """Raise unless `original` is an unquantized checkpoint and, as far as the artifact's manifest tells, its source.

    A quantized one may stand for an original where it is a release in FP8, or the artifact was made from it. SourceError
    for a configuration without weights, UsageError for everything else. Reads the small tensors that both have in common
    and a part of each large one.
    """
    manifest = manifest_of(artifact)
    check_unquantized(original, manifest)
    if manifest is None:
        return
    source = manifest.source
    if source_record(original)["headers_sha256"] != source.headers_sha256:
        raise UsageError(
            f"{original.name} is not what {artifact.name} was made from: that was {_title(source)}, with other tensors",
            hint="give the checkpoint it was quantized from",
        )
    unlike = other_adapters(artifact.name, source, original)
    if unlike is not None:
        raise UsageError(unlike[0], hint=unlike[1])
    sample = None if source.sample_sha256 is None else local_sample(original)
    changed = _changed(artifact, original, manifest)
    if changed is not None:
        raise UsageError(
            f"{original.name} is not what {artifact.name} was made from, though its tensors have the same names and "
            f"shapes: {changed} is kept as in the original and has other numbers here",
            hint=_FINE_TUNE,
        )
    if sample is not None and sample != source.sample_sha256:
        raise UsageError(
            f"{original.name} is not what {artifact.name} was made from, though its tensors have the same names and "
            "shapes: its weights are not those that were read then",
            hint=_FINE_TUNE,
        )


def adapter_digests(checkpoint: Checkpoint) -> list[str]:
    """Of the adapters merged into a checkpoint as it is read, or into an artifact when it was made."""
    manifest = None if checkpoint.adapters else manifest_of(checkpoint)
    merged = checkpoint.adapters if manifest is None else manifest.source.adapters
    return [adapter.sha256 for adapter in merged]


def check_unquantized(original: Checkpoint, manifest: ManifestFile | None) -> None:
    """Raise SourceError for a configuration without weights, UsageError for an artifact or any quantized checkpoint.

    `manifest` is that of the artifact which is held against it, and may say that it was made from a quantized one.
    """
    if original.bare:
        raise SourceError(f"{original.name} is a configuration without weights", hint="give the checkpoint itself")
    if manifest is not None and original.dequantized and manifest.source.dequantized_from == original.dequantized:
        return
    what = quantized_as(original)
    if what is not None:
        raise UsageError(f"{original.name} is {what}, not an original", hint=_COMPARE)


def quantized_as(checkpoint: Checkpoint) -> str | None:
    """What kind of quantized checkpoint this is, judged by its tensors; None for an original, or a release in FP8."""
    if is_own(checkpoint):
        return "an artifact that l4pack made"
    if checkpoint.dequantized and not is_release(checkpoint):
        return f"quantized already ({checkpoint.dequantized})"
    odd = sorted({entry.dtype for entry in checkpoint.entries.values()} - set(WEIGHT_DTYPES))
    return f"quantized already (it has tensors of {', '.join(odd)})" if odd else None


def manifest_of(artifact: Checkpoint) -> ManifestFile | None:
    """An artifact's manifest; None without one. Raises UsageError for one that can't be read."""
    if not isinstance(artifact.store, LocalStore) or not (artifact.store.folder / MANIFEST_NAME).is_file():
        return None
    return read_manifest(artifact.store.folder)


def original_record(original: Checkpoint) -> dict[str, str]:
    """Which original this is: its headers, and the bytes of its small tensors (see `weights_digest`)."""
    return dict(
        zip(ORIGINAL_KEYS, (str(source_record(original)["headers_sha256"]), weights_digest(original)), strict=True)
    )


def weights_digest(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 of the norms' and routers' numbers by name, and of what was merged: a fine-tune has another, and little
    is read.

    An artifact has the same as its original, whatever prefixes and float dtype they are kept with: numbers are rounded
    to bfloat16 first. Raises SourceError for a configuration without weights.
    """
    if checkpoint.bare or checkpoint.store is None:
        raise SourceError(f"{checkpoint.name} is a configuration without weights", hint="give a checkpoint folder")
    old, new = detect_layout(checkpoint.config, checkpoint.entries).naming, canonical_naming(checkpoint.config)
    small = {rename(name, old, new): name for name in checkpoint.entries if classify(name).role in _SMALL}
    digest = hashlib.sha256()
    for merged in adapter_digests(checkpoint):
        digest.update(merged.encode())
    with Reader(checkpoint.entries, checkpoint.store.path) as reader:
        for name in sorted(small):
            digest.update(name.encode())
            digest.update(_as(reader.tensor(small[name]), "BF16").tobytes())
    return digest.hexdigest()


def _changed(artifact: Checkpoint, original: Checkpoint, manifest: ManifestFile) -> str | None:
    """The first tensor that both have unquantized and that differs, unless it is the artifact that was damaged."""
    assert artifact.store is not None
    assert original.store is not None
    with (
        Reader(artifact.entries, artifact.store.path) as mine,
        Reader(original.entries, original.store.path) as theirs,
    ):
        for kept, source in _kept(artifact, original):
            if _differ(mine, kept, theirs, source):
                made = manifest.tensors.get(kept.name)
                if made is not None and made.sha256 == tensor_digest(mine, kept):
                    return source.name
    return None


def _differ(mine: Reader, kept: TensorEntry, theirs: Reader, source: TensorEntry) -> bool:
    """Whether the parts of a tensor that are read differ, rounded to the dtype that the artifact keeps it in."""
    for start, count in _spans(source):
        wanted = _as(_numbers(theirs, source, start, count), kept.dtype)
        if _numbers(mine, kept, start, count).tobytes() != wanted.tobytes():
            return True
    return False


def _kept(artifact: Checkpoint, original: Checkpoint) -> Iterator[tuple[TensorEntry, TensorEntry]]:
    """Tensors of the artifact that are those of the original, each with it; the telling ones first."""
    old, new = detect_layout(original.config, original.entries).naming, canonical_naming(original.config)
    for source in sorted(original.entries.values(), key=lambda one: (classify(one.name).role not in _SMALL, one.name)):
        kept = artifact.entries.get(rename(source.name, old, new))
        if kept is not None and kept.dtype in WEIGHT_DTYPES and kept.shape == source.shape:
            yield kept, source


def _spans(entry: TensorEntry) -> list[tuple[int, int]]:
    """First number and count of each part that is read: all of a small tensor, three parts of a large one."""
    numel = entry.nbytes * 8 // DTYPE_BITS[entry.dtype]
    if numel <= 3 * _SPAN:
        return [(0, numel)]
    return [(0, _SPAN), (numel // 2, _SPAN), (numel - _SPAN, _SPAN)]


def _numbers(reader: Reader, entry: TensorEntry, start: int, count: int) -> NDArray[Any]:
    item = DTYPE_BITS[entry.dtype] // 8
    return reader.span(entry.name, start * item, count * item).view(NUMPY_TYPES[entry.dtype])


def _as(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Numbers in the dtype that the artifact keeps them in."""
    if stored.dtype == NUMPY_TYPES[dtype]:
        return stored
    wide = widen(stored)
    return round_to_bfloat16(wide) if dtype == "BF16" else wide.astype(NUMPY_TYPES[dtype])


def _title(source: SourceRecord) -> str:
    return f"{source.repository or source.name}{f'@{source.revision}' if source.revision else ''}"
