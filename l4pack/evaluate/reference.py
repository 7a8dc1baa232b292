"""The original's answers kept on disk, so that many artifacts are compared with an original that is read once.

Kept are not logits (2 bytes x 202,048 a token) but the last hidden state of every scored token, as 16-bit integers with
one scale a token (2 bytes x 5,120), and the head once. What the rounding costs is measured when they are kept:
KL(exact || kept) is in `reference.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l4pack.errors import UsageError
from l4pack.evaluate.answers import Answers
from l4pack.evaluate.scoring import TOKEN_BLOCK, VOCABULARY_CHUNK, score_pair
from l4pack.work.files import sync_folder, write_atomic

RECORD_NAME, SCHEMA_VERSION = "reference.json", 1
HIDDEN_NAME, SCALE_NAME, HEAD_NAME = "hidden.npy", "scale.npy", "head.npy"
LEVELS = 32767
MEASURED_TOKENS = 4096


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
        stored = np.array(self._array(HEAD_NAME)[tokens])
        tensor = torch.from_numpy(stored)
        return (tensor.view(torch.bfloat16) if stored.dtype == np.uint16 else tensor).float().to(self.device)

    def _array(self, name: str) -> Any:
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)


def save_reference(
    folder: Path, answers: Answers, rows: Tensor, targets: Tensor, identity: dict[str, Any]
) -> dict[str, Any]:
    """Keep a model's answers on `rows`; `identity` says of which model on which tokens. Returns the record."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_NAME).unlink(missing_ok=True)
    _save_hidden(folder, answers, rows)
    _save_head(folder, answers)
    record = {"schema_version": SCHEMA_VERSION, "vocabulary": answers.vocabulary, "rows": len(rows), **identity}
    stored = StoredReference(folder, record, torch.device("cpu"))
    count = min(MEASURED_TOKENS, len(rows))
    measured = score_pair(answers, stored, (rows[:count], torch.arange(count)), targets[:count])
    record["storage_kl_mean"] = float(measured.kl.mean())
    record["storage_kl_max"] = float(measured.kl.max())
    record["storage_measured_tokens"] = count
    write_atomic(folder / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())
    sync_folder(folder)
    return record


def load_reference(folder: Path, identity: dict[str, Any], device: torch.device) -> StoredReference:
    """Kept answers, if they are of the tokens that `identity` names. Raises UsageError."""
    try:
        record = json.loads((folder / RECORD_NAME).read_bytes())
        same = record["tokens_sha256"] == identity["tokens_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} holds no complete reference", hint="make one with --save-reference") from error
    if not same:
        raise UsageError(
            f"{folder} was kept for another text, tokenizer, --samples, --sequence-length or --seed",
            hint="repeat the options it was made with, or make another with --save-reference",
        )
    return StoredReference(folder, record, device)


def _save_hidden(folder: Path, answers: Answers, rows: Tensor) -> None:
    scales = np.empty(len(rows), np.float32)
    hidden = None
    for start in range(0, len(rows), TOKEN_BLOCK):
        block = slice(start, min(start + TOKEN_BLOCK, len(rows)))
        values = answers.normed(rows[block]).cpu()
        if hidden is None:
            shape = (len(rows), values.shape[1])
            hidden = np.lib.format.open_memmap(folder / HIDDEN_NAME, "w+", np.int16, shape)
        scale = (values.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        hidden[block] = (values / scale[:, None]).round().to(torch.int16).numpy()
        scales[block] = scale.numpy()
    assert hidden is not None
    hidden.flush()
    np.save(folder / SCALE_NAME, scales)


def _save_head(folder: Path, answers: Answers) -> None:
    """BF16 where that loses nothing, else float32."""
    chunks = [slice(first, min(first + VOCABULARY_CHUNK, answers.vocabulary))
              for first in range(0, answers.vocabulary, VOCABULARY_CHUNK)]  # fmt: skip
    narrow = all(bool((head.bfloat16().float() == head).all()) for head in map(answers.head, chunks))
    width = answers.head(slice(0, 1)).shape[1]
    kind = np.uint16 if narrow else np.float32
    stored = np.lib.format.open_memmap(folder / HEAD_NAME, "w+", kind, (answers.vocabulary, width))
    for chunk in chunks:
        head = answers.head(chunk).cpu()
        stored[chunk] = head.bfloat16().view(torch.uint16).numpy() if narrow else head.numpy()
    stored.flush()
