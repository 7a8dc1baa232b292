"""Text to token sequences: for evaluation and for calibration, from files, folders, rows of data sets or named sets.

Every row is a document. A document is cut into windows that don't overlap, each begun with the beginning-of-text token
where the tokenizer has one; what is left of it is a shorter sequence. Sequences attend to themselves only, so no token
sees another document. `samples` times `sequence_length` tokens are taken at most, as whole sequences, however many.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l4pack.errors import UsageError
from l4pack.stream.hidden import TokenSequence
from l4pack.text.choice import DEFAULT_LENGTH, NAMED_SETS, TextChoice
from l4pack.text.files import UNDERSTOOD, Meter, list_files
from l4pack.text.images import ImageReader, Pictures, Seen
from l4pack.text.layouts import Left
from l4pack.text.passages import PIECE, Passage, passages
from l4pack.text.tokenizer import Template, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a text that is much larger than what is asked for, this many times as much is looked at, and never less than that.
LOOKED_AT, LEAST_LOOKED_AT = 8, 1 << 21
_BATCH = 256
_SHOWN_FILES, _SHOWN_NAME = 8, 24
_ALWAYS = (Left.EMPTY, Left.IMAGES)  # reasons that a record counts even where no row was left for them


@dataclass(frozen=True)
class RowOrigin:
    """Where sequences come from: the row of each, how many sequences each row gives, and all that was read."""

    rows: tuple[int, ...] = ()
    of_row: dict[int, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)  # rows read, and those that give nothing, by reason
    tokens: int = 0


@dataclass(frozen=True)
class TokenText:
    """Sequences and what they came from."""

    sequences: tuple[TokenSequence, ...]
    record: dict[str, Any]
    origin: RowOrigin | None = field(default=None, repr=False, compare=False)

    def only(self, numbers: Sequence[int]) -> TokenText:
        """Some of the sequences, with the record of those."""
        rows = self.origin.rows if self.origin else ()
        chosen = tuple(self.sequences[number] for number in numbers)
        origin = self.origin and RowOrigin(
            tuple(rows[number] for number in numbers), self.origin.of_row, self.origin.read, self.origin.tokens
        )
        record = {key: value for key, value in self.record.items() if key not in ("images", "image_tokens")}
        return TokenText(chosen, {**record, **_counts(chosen, origin)}, origin)


class _Pool:
    """Every sequence that documents give, in order."""

    def __init__(self, length: int, bos: int | None) -> None:
        self._start = [] if bos is None else [bos]
        self._bos, self._step = bos, length - len(self._start)
        self._tokens, self._ends, self._open = array("i"), array("q", [0]), array("i")
        self.rows, self.tails = (
            array("q"),
            bytearray(),
        )  # of each sequence: its row, and whether it is a document's rest
        self.pictures: dict[int, Pictures] = {}  # by sequence
        self.read: Counter[str] = Counter()
        self._row, self._dropped, self._whole = -1, False, False

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self._tokens)

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each sequence."""
        ends = np.array(self._ends, np.int64)
        return ends[1:] - ends[:-1]

    def sequence(self, number: int) -> tuple[int, ...]:
        """The tokens of a sequence."""
        return tuple(self._tokens[self._ends[number] : self._ends[number + 1]])

    def add(self, passage: Passage, ids: list[int]) -> None:
        """Take the next passage; a beginning-of-text token within it begins another document."""
        if passage.row != self._row:
            self.close()
            self._row, self._dropped = passage.row, False
            self.read["read"] += 1
        if passage.left:
            self._drop(passage.left)
            return
        if passage.seen is not None:
            self._add_seen(passage.seen)
            return
        while self._bos is not None and self._bos in ids:
            at = ids.index(self._bos)
            self._extend(ids[:at])
            self._end_document()
            ids = ids[at + 1 :]
        self._extend(ids)

    def _add_seen(self, seen: Seen) -> None:
        """A row with images is one sequence, or none where it is too long."""
        ids = [token for token in seen.tokens if token != self._bos]
        if len(ids) > self._step:
            self._drop(Left.LONG)
            return
        self.pictures[len(self.rows)] = seen.pictures
        self._keep(array("i", ids), tail=False)

    def close(self) -> None:
        """End the row."""
        self._end_document()
        if self._row >= 0 and not self._dropped and not self._gave():
            self.read[Left.EMPTY] += 1

    def _gave(self) -> bool:
        return bool(self.rows) and self.rows[-1] == self._row

    def _extend(self, ids: list[int]) -> None:
        self._open.extend(ids)
        full = len(self._open) // self._step * self._step
        for first in range(0, full, self._step):
            self._keep(self._open[first : first + self._step], tail=False)
        self._whole = self._whole or full > 0
        del self._open[:full]

    def _end_document(self) -> None:
        if len(self._start) + len(self._open) >= 2 and self._open:
            self._keep(self._open, tail=self._whole)
        self._open, self._whole = array("i"), False

    def _keep(self, ids: array[int], *, tail: bool) -> None:
        self._tokens.extend(self._start)
        self._tokens.extend(ids)
        self._ends.append(len(self._tokens))
        self.rows.append(self._row)
        self.tails.append(tail)

    def _drop(self, reason: Left) -> None:
        """Take back all that the row gave."""
        self._open, self._dropped = array("i"), True
        while self._gave():
            self.rows.pop()
            self.tails.pop()
            self._ends.pop()
        del self._tokens[self._ends[-1] :]
        self.read[reason] += 1


def load_text(
    choice: TextChoice,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int,
    reader: ImageReader | None = None,
) -> TokenText:
    """Token sequences of the chosen text; without a `reader`, rows with images are left.

    Raises UsageError for text that is missing, empty or not understood.
    """
    length = choice.sequence_length or min(DEFAULT_LENGTH, max_positions)
    _check(choice, length, max_positions)
    if choice.source in NAMED_SETS and not Path(choice.source).exists():
        return _named_set(choice, tokenizer, length)
    listing, meter = list_files(choice.source), Meter()
    pool, ended = _pool(passages(listing.files, Template(tokenizer), meter, reader), tokenizer, choice, length)
    if not pool.rows:
        raise _nothing(choice.source, pool)
    taken = _draw(pool.lengths(), np.array(pool.tails, bool), choice, length)
    rows = tuple(pool.rows[number] for number in taken)
    given = Counter(pool.rows)
    origin = RowOrigin(rows, {row: given[row] for row in rows}, dict(pool.read), pool.tokens)
    sequences = [_sequence(pool, number, reader) for number in taken]
    record = {
        **_record(choice, length, sequences, meter.digest.hexdigest(), origin),
        "read_to_end": ended,
        "files": {"read": len(listing.files), "left": len(listing.left), "left_names": _shown(listing.left)},
    }
    return TokenText(tuple(sequences), record, origin)


def _sequence(pool: _Pool, number: int, reader: ImageReader | None) -> TokenSequence:
    tokens, pictures = pool.sequence(number), pool.pictures.get(number)
    if pictures is None or reader is None:
        return TokenSequence(tokens)
    return TokenSequence(tokens, unscored=reader.tokens, images=pictures)


def _check(choice: TextChoice, length: int, max_positions: int) -> None:
    if length < 2 or length > max_positions:
        raise UsageError(
            f"--sequence-length {length} is outside 2 to {max_positions}", hint="the model's context is the limit"
        )
    if choice.samples < 1:
        raise UsageError(f"--samples {choice.samples} is no number of sequences", hint="take at least 1")


def _pool(
    found: Iterator[Passage], tokenizer: PreTrainedTokenizerBase, choice: TextChoice, length: int
) -> tuple[_Pool, bool]:
    """What documents give, and whether all of them were read."""
    pool = _Pool(length, tokenizer.bos_token_id)
    enough = max(LOOKED_AT * choice.samples * length, LEAST_LOOKED_AT)
    batches = _batches(found)
    for batch in batches:
        for passage, ids in zip(batch, _tokenized(batch, tokenizer), strict=True):
            pool.add(passage, ids)
        if pool.tokens >= enough:
            break
    pool.close()
    return pool, next(batches, None) is None


def _batches(found: Iterator[Passage]) -> Iterator[list[Passage]]:
    """Passages that are tokenized at once."""
    batch: list[Passage] = []
    for passage in found:
        batch.append(passage)
        if len(batch) == _BATCH or sum(len(one.text) for one in batch) >= PIECE:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenized(batch: Sequence[Passage], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each passage's text, of none where it has its tokens."""
    ids: list[list[int]] = tokenizer([one.text for one in batch], add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _nothing(source: str, pool: _Pool) -> UsageError:
    images = pool.read[Left.IMAGES]
    if images:
        return UsageError(
            f"{source} holds no row that is read: {images} of {pool.read['read']} have images in no file, or sound",
            hint="name image files in the rows, or take rows without",
        )
    if long := pool.read[Left.LONG]:
        return UsageError(
            f"{source} holds no row that fits: {long} of {pool.read['read']} have images and are longer than a sequence",
            hint="raise --sequence-length",
        )
    return UsageError(f"{source} holds no text", hint=f"what is read: {UNDERSTOOD}")


def _draw(
    lengths: np.ndarray[Any, np.dtype[np.int64]], tails: np.ndarray[Any, np.dtype[np.bool_]], choice: TextChoice,
    length: int,
) -> list[int]:  # fmt: skip
    """Numbers of the sequences that are taken, ascending: drawn while they fit, a long document's rest after all others."""
    room = choice.samples * length
    if int(lengths.sum()) <= room:
        return list(range(len(lengths)))
    rng = np.random.default_rng(choice.seed)
    whole, rests = np.flatnonzero(~tails), np.flatnonzero(tails)
    first = rng.choice(len(whole), min(choice.samples, len(whole)), replace=False)
    order = np.concatenate([whole[first], rng.permutation(np.delete(whole, first)), rng.permutation(rests)])
    taken = []
    for number in order.tolist():
        if lengths[number] <= room:
            taken.append(number)
            room -= int(lengths[number])
    return sorted(taken)


def _record(
    choice: TextChoice, length: int, chosen: Sequence[TokenSequence], digest: str, origin: RowOrigin | None
) -> dict[str, Any]:
    return {
        "source": Path(choice.source).name,
        "sha256": digest,
        "sequence_length": length,
        "seed": choice.seed,
        **_counts(chosen, origin),
    }


def _counts(chosen: Sequence[TokenSequence], origin: RowOrigin | None) -> dict[str, Any]:
    """What is taken, and of what."""
    ids = [sequence.tokens for sequence in chosen]
    tokens = sum(map(len, ids))
    counts = {"sequences": len(chosen), "tokens": tokens, "tokens_sha256": token_digest(ids), **_seen(chosen)}
    if origin is None:
        return counts
    used = Counter(origin.rows)
    left = {reason.value: origin.read.get(reason, 0) for reason in Left if reason in _ALWAYS or reason in origin.read}
    rows = {
        "read": origin.read["read"],
        "used": len(used),
        "used_in_part": sum(origin.of_row[row] > count for row, count in used.items()),
        "not_drawn": origin.read["read"] - len(used) - sum(left.values()),
        **left,
    }
    return {**counts, "tokens_left": origin.tokens - tokens, "rows": rows}


def _seen(chosen: Sequence[TokenSequence]) -> dict[str, int]:
    """Images and their tokens, where there are any."""
    with_images = [sequence for sequence in chosen if isinstance(sequence.images, Pictures)]
    if not with_images:
        return {}
    tokens = sum(token in sequence.unscored for sequence in with_images for token in sequence.tokens)
    images = sum(len(sequence.images.files) for sequence in with_images if isinstance(sequence.images, Pictures))
    return {"images": images, "image_tokens": tokens}


def _shown(names: Sequence[str]) -> list[str]:
    return [name[-_SHOWN_NAME:] for name in names[:_SHOWN_FILES]]


def token_digest(sequences: Sequence[Sequence[int]]) -> str:
    """Hex SHA-256 of token ids as little-endian int32, each sequence after its length."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], "<i4").tobytes())
    return digest.hexdigest()


def _named_set(choice: TextChoice, tokenizer: PreTrainedTokenizerBase, length: int) -> TokenText:
    """Optimum's sets, as its GPTQ quantizer takes them: the validation split, so that calibration is held apart."""
    try:
        from optimum.gptq.data import get_dataset

        rows = get_dataset(
            choice.source, tokenizer, nsamples=choice.samples, seqlen=length, seed=choice.seed, split="validation"
        )
    except Exception as error:  # datasets, huggingface_hub and the network raise all kinds
        raise UsageError(
            f"the set {choice.source} can't be had ({first_line(error)})",
            hint="it needs the network and `pip install l4pack[eval]`; a text file works without",
        ) from error
    chosen = [row["input_ids"].reshape(-1).tolist() for row in rows]
    sequences = tuple(TokenSequence(tuple(ids)) for ids in chosen)
    return TokenText(sequences, _record(choice, length, sequences, token_digest(chosen), None))
