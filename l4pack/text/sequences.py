"""Text to token sequences: for evaluation and for calibration, from files, folders, chats or named sets.

A plain text is cut into windows that don't overlap, each begun with the beginning-of-text token where the tokenizer has
one. A conversation (a JSONL line with `messages`) is rendered by the chat template and is one sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l4pack.errors import UsageError
from l4pack.stream.hidden import TokenSequence
from l4pack.text.choice import DEFAULT_LENGTH, DEMO_CALIBRATION, DEMO_TEXT, NAMED_SETS, TEXT_SUFFIXES, TextChoice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenText:
    """Sequences and what they came from."""

    sequences: tuple[TokenSequence, ...]
    record: dict[str, Any]


@dataclass(frozen=True)
class _Document:
    """A text, or a rendered conversation, which is not cut up."""

    text: str
    conversation: bool = False


def load_text(choice: TextChoice, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> TokenText:
    """Token sequences of the chosen text. Raises UsageError for text that is missing, empty or too short."""
    length = choice.sequence_length or min(DEFAULT_LENGTH, max_positions)
    _check(choice, length, max_positions)
    if choice.source in NAMED_SETS and not Path(choice.source).exists():
        return _named_set(choice, tokenizer, length)
    documents, digest = _documents(choice.source, tokenizer)
    return _sequences(choice, length, documents, digest, tokenizer)


def _check(choice: TextChoice, length: int, max_positions: int) -> None:
    if length < 2 or length > max_positions:
        raise UsageError(
            f"--sequence-length {length} is outside 2 to {max_positions}", hint="the model's context is the limit"
        )
    if choice.samples < 1:
        raise UsageError(f"--samples {choice.samples} is no number of sequences", hint="take at least 1")


def _sequences(
    choice: TextChoice, length: int, documents: Sequence[_Document], digest: str, tokenizer: PreTrainedTokenizerBase
) -> TokenText:
    if not any(document.text.strip() for document in documents):
        raise UsageError(f"{choice.source} holds no text", hint="give a text file, a folder of them, or JSONL")
    found: list[list[int]] = []
    tokens = 0
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += len(ids)
        found += [ids[:length]] if document.conversation else _windows(ids, length, tokenizer.bos_token_id)
    found = [ids for ids in found if len(ids) >= 2]
    if not found:
        raise UsageError(
            f"{choice.source} has {tokens} tokens, fewer than one sequence of {length}",
            hint="give more text, or a smaller --sequence-length",
        )
    chosen = _choose(found, choice.samples, choice.seed)
    return TokenText(tuple(TokenSequence(tuple(ids)) for ids in chosen), _record(choice, length, chosen, digest))


def _windows(ids: list[int], length: int, bos: int | None) -> list[list[int]]:
    start = [] if bos is None else [bos]
    step = length - len(start)
    return [start + ids[first : first + step] for first in range(0, len(ids) - step + 1, step)]


def _choose(found: list[list[int]], samples: int, seed: int) -> list[list[int]]:
    if samples >= len(found):
        return found
    picked = np.random.default_rng(seed).choice(len(found), samples, replace=False)
    return [found[index] for index in sorted(picked)]


def _record(choice: TextChoice, length: int, chosen: Sequence[Sequence[int]], digest: str) -> dict[str, Any]:
    return {
        "source": Path(choice.source).name,
        "sha256": digest,
        "sequences": len(chosen),
        "tokens": sum(len(ids) for ids in chosen),
        "sequence_length": length,
        "seed": choice.seed,
        "tokens_sha256": token_digest(chosen),
    }


def token_digest(sequences: Sequence[Sequence[int]]) -> str:
    """Hex SHA-256 of token ids as little-endian int32, each sequence after its length."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], "<i4").tobytes())
    return digest.hexdigest()


def _documents(source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[_Document], str]:
    """All documents of a source, and the hex SHA-256 of its files' bytes."""
    digest = hashlib.sha256()
    documents: list[_Document] = []
    for path in _files(source):
        try:
            raw = path.read_bytes()
            text = raw.decode("utf-8")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", hint="check the file's name") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text", hint="convert it first") from error
        digest.update(raw)
        if path.suffix == ".jsonl":
            documents += _conversations(text, path, tokenizer)
        else:
            documents.append(_Document(text))
    return documents, digest.hexdigest()


def _files(source: str) -> list[Path]:
    path = Path(source)
    if not path.exists() and source in (DEMO_TEXT, DEMO_CALIBRATION):
        from l4pack import demo

        return [demo.heldout_path() if source == DEMO_TEXT else demo.calibration_path()]
    if not path.exists():
        raise UsageError(
            f"there is no text {source}",
            hint=f"give a file, a folder, or one of: {', '.join((DEMO_TEXT, *NAMED_SETS))}",
        )
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in TEXT_SUFFIXES)
    if not files:
        raise UsageError(f"{source} holds no {', '.join(TEXT_SUFFIXES)} files", hint="give a folder with text")
    return files


def _conversations(text: str, path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Document]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match _json(line, path, number):
            case {"messages": list(messages)}:
                yield _Document(_rendered(messages, path, number, tokenizer), conversation=True)
            case {"text": str(plain)}:
                yield _Document(plain)
            case _:
                raise UsageError(
                    f"{path}, line {number}: neither 'messages' nor 'text'", hint='write {"messages": [{"role": …}]}'
                )


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}, line {number}: not JSON", hint="JSONL has one object a line") from error


def _rendered(messages: list[Any], path: Path, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise UsageError(
            f"{path} holds conversations, and the tokenizer has no chat template",
            hint="take plain text, or a checkpoint with a chat template",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of its own: whatever it raises is about this line
        raise UsageError(
            f"{path}, line {number}: the chat template refuses it ({str(error).splitlines()[0]})",
            hint="each message needs a role and a content the template knows",
        ) from error


def _named_set(choice: TextChoice, tokenizer: PreTrainedTokenizerBase, length: int) -> TokenText:
    """Optimum's sets, as its GPTQ quantizer takes them: the validation split, so that calibration is held apart."""
    try:
        from optimum.gptq.data import get_dataset

        rows = get_dataset(
            choice.source, tokenizer, nsamples=choice.samples, seqlen=length, seed=choice.seed, split="validation"
        )
    except Exception as error:  # datasets, huggingface_hub and the network raise all kinds
        raise UsageError(
            f"the set {choice.source} can't be had ({str(error).splitlines()[0]})",
            hint="it needs the network and `pip install l4pack[eval]`; a text file works without",
        ) from error
    chosen = [row["input_ids"].reshape(-1).tolist() for row in rows]
    digest = token_digest(chosen)
    return TokenText(tuple(TokenSequence(tuple(ids)) for ids in chosen), _record(choice, length, chosen, digest))
