"""The original's answers kept on disk, so that many artifacts are compared with an original that is read once.

Kept are not logits (2 bytes x 202,048 a token) but the last hidden state of every scored token, as 16-bit integers with
one scale a token (2 bytes x 5,120), and the head once. What the rounding costs is measured when they are kept:
KL(exact || kept) is in `reference.json`, with the size and digest of each file: it is written last and removed first.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from l4pack.datafile import Finite, PositiveCount, parse_json
from l4pack.errors import BudgetError, UsageError
from l4pack.evaluate.answers import Answers
from l4pack.evaluate.scoring import score_pair
from l4pack.quant.torch_ops import from_array, to_array
from l4pack.stream.rows import HEAD_ROWS, TOKENS_SCORED
from l4pack.units import human_bytes
from l4pack.work.files import open_own, read_own, sync_folder, write_atomic
from l4pack.work.folder import check_writable, claim, owned
from l4pack.work.seal import Seal, Span, seal, unbroken

KIND = "reference"
RECORD_NAME, SCHEMA_VERSION = "reference.json", 2
MAX_RECORD_BYTES = 4 * 1024 * 1024
HIDDEN_NAME, SCALE_NAME, HEAD_NAME = "hidden.npy", "scale.npy", "head.npy"
LEVELS = 32767
MEASURED_TOKENS = 4096
_NAMES = (HIDDEN_NAME, SCALE_NAME, HEAD_NAME)


class _Record(BaseModel):
    """`reference.json`; keys beside these say which original on which tokens."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    schema_version: Literal[2]
    vocabulary: PositiveCount
    width: PositiveCount
    rows: PositiveCount
    storage_kl_mean: Finite
    storage_kl_max: Finite
    storage_measured_tokens: PositiveCount
    files: list[Seal]


@dataclass(frozen=True)
class StoredReference:
    """Kept answers; see `answers.Answers`. Row r is the r-th scored token."""

    folder: Path
    record: dict[str, Any]
    device: torch.device

    @property
    def vocabulary(self) -> int:
        """Tokens the model knows."""
        return int(self.record["vocabulary"])

    def normed(self, rows: Tensor) -> Tensor:
        """float32 [rows, hidden] as kept."""
        levels = torch.from_numpy(self._array(HIDDEN_NAME)[rows.numpy()].astype(np.float32))
        scale = torch.from_numpy(self._array(SCALE_NAME)[rows.numpy()])
        return (levels * scale[:, None]).to(self.device)

    def head(self, tokens: slice) -> Tensor:
        """float32 [tokens, hidden] of the original's head, exact."""
        return from_array(np.array(self._array(HEAD_NAME)[tokens])).float().to(self.device)

    def fits(self) -> bool:
        """Whether the arrays have the shapes and types that the record says."""
        rows, width, vocabulary = self.record["rows"], self.record["width"], self.record["vocabulary"]
        try:
            hidden, scale, head = map(self._array, _NAMES)
        except (OSError, ValueError):
            return False
        shapes = hidden.shape == (rows, width) and scale.shape == (rows,) and head.shape == (vocabulary, width)
        kinds = hidden.dtype == np.int16 and scale.dtype == np.float32 and head.dtype in (np.uint16, np.float32)
        return bool(shapes and kinds)

    def _array(self, name: str) -> Any:
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)


def claim_reference(folder: Path) -> None:
    """Make or take the folder that answers will be kept in, before any work. Raises UsageError for somebody else's."""
    try:
        claim(folder, KIND)
    except UsageError as error:
        raise UsageError(
            f"{folder} holds something that --save-reference did not write", hint="give a new folder's name"
        ) from error
    check_writable(folder)


def save_reference(
    folder: Path, answers: Answers, rows: Tensor, targets: Tensor, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Keep a model's answers on `rows` and the tokens that follow, int64 [tokens] both; returns the record.

    `identity` says of which model on which tokens.

    Raises BudgetError when the disk is too full, UsageError for a folder that is somebody else's.
    """
    claim_reference(folder)
    with owned(folder, KIND):
        for name in (RECORD_NAME, *_NAMES):
            (folder / name).unlink(missing_ok=True)
            sync_folder(folder)
        first = answers.head(slice(0, 1))
        width, device = first.shape[1], first.device
        try:
            _save_hidden(folder, answers, rows, width)
            _save_head(folder, answers, width)
        except BaseException:
            for name in _NAMES:  # must not stay on a full disk
                (folder / name).unlink(missing_ok=True)
            raise
        record = {"schema_version": SCHEMA_VERSION, **identity}
        record |= {"vocabulary": answers.vocabulary, "width": width, "rows": len(rows)}
        stored = StoredReference(folder, record, device)
        count = min(MEASURED_TOKENS, len(rows))
        measured = score_pair(answers, stored, (rows[:count], torch.arange(count)), targets[:count])
        record["storage_kl_mean"] = float(measured.kl.mean())
        record["storage_kl_max"] = float(measured.kl.max())
        record["storage_measured_tokens"] = count
        record["files"] = [one.model_dump() for one in seal(folder, _spans(folder))]
        write_atomic(folder / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())
    return record


def load_reference(folder: Path, identity: Mapping[str, Any], device: torch.device) -> StoredReference:
    """Kept answers, if they are whole and of the tokens that `identity` names; reads them once. Raises UsageError."""
    record = _read_record(folder)
    if any(record.get(key) != identity.get(key) for key in ("tokens_sha256", "scored_sha256", "images_sha256")):
        raise UsageError(
            f"{folder} was kept for another text, tokenizer, task, --samples, --sequence-length or --seed",
            hint="repeat the options it was made with, or make another with --save-reference",
        )
    stored = StoredReference(folder, record, device)
    if not (_whole(folder, record) and stored.fits()):
        raise UsageError(
            f"{folder} was changed since it was kept: a file is not what {RECORD_NAME} says",
            hint="make another with --save-reference",
        )
    return stored


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_own(folder / RECORD_NAME, MAX_RECORD_BYTES))
        return _Record.model_validate(value).model_dump()
    except (OSError, UsageError, ValueError) as error:
        raise UsageError(f"{folder} holds no complete reference", hint="make one with --save-reference") from error


def _spans(folder: Path) -> list[Span]:
    return [Span(name, 0, (folder / name).stat().st_size) for name in _NAMES]


def _whole(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether every file is as it was written, byte for byte."""
    try:
        return unbroken(folder, _spans(folder), map(Seal.model_validate, record["files"]))
    except OSError:
        return False


def _save_hidden(folder: Path, answers: Answers, rows: Tensor, width: int) -> None:
    with (
        _written(folder / HIDDEN_NAME, np.int16, (len(rows), width)) as hidden,
        _written(folder / SCALE_NAME, np.float32, (len(rows),)) as scales,
    ):
        for start in range(0, len(rows), TOKENS_SCORED):
            values = answers.normed(rows[start : start + TOKENS_SCORED]).cpu()
            scale = (values.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
            _put(hidden, (values / scale[:, None]).round().to(torch.int16).numpy())
            _put(scales, scale.numpy())


def _save_head(folder: Path, answers: Answers, width: int) -> None:
    """BF16 where that loses nothing, else float32."""
    chunks = [slice(first, min(first + HEAD_ROWS, answers.vocabulary))
              for first in range(0, answers.vocabulary, HEAD_ROWS)]  # fmt: skip
    narrow = all(bool((head.bfloat16().float() == head).all()) for head in map(answers.head, chunks))
    with _written(folder / HEAD_NAME, np.uint16 if narrow else np.float32, (answers.vocabulary, width)) as stored:
        for chunk in chunks:
            head = answers.head(chunk).cpu()
            _put(stored, to_array(head.bfloat16() if narrow else head))


@contextmanager
def _written(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Iterator[io.BufferedWriter]:
    """An array file to be filled in order, its room taken before, on disk when the block ends."""
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    nbytes = len(header.getvalue()) + int(np.prod(shape)) * np.dtype(dtype).itemsize
    with open(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as stream:
        _allocate(path, stream.fileno(), nbytes)
        stream.write(header.getvalue())
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _allocate(path: Path, descriptor: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise BudgetError(
            f"{path.parent} has no room for {human_bytes(nbytes)} of the original's answers, {human_bytes(free)} are free",
            hint="free some space, or choose another folder for --save-reference; what is computed so far is kept",
        ) from error


def _put(stream: io.BufferedWriter, values: NDArray[Any]) -> None:
    stream.write(np.ascontiguousarray(values).data)
