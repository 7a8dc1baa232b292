"""The tokenizer in a GGUF file's keys, from the files of a Hugging Face tokenizer.

llama.cpp splits text by rules of its own that a file only names (`tokenizer.ggml.pre`), so the expression that the
tokenizer has must be one that it knows. Special tokens, merges and the chat template are read by gguf-py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from l4pack.checkpoint.companions import TOKENIZERS
from l4pack.datafile import read_json
from l4pack.errors import UsageError

TOKENIZER = TOKENIZERS[0]
MAX_BYTES = 256 * 1024**2
_AGAIN = "download the tokenizer again"
_MODEL = "gpt2"  # llama.cpp's word for byte-level byte pairs
# The expression of GPT-4o's tokenizer, and so of Llama 4's. llama.cpp `src/llama-vocab.cpp`, LLAMA_VOCAB_PRE_TYPE_GPT4O.
_LLAMA4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL, _SPLIT, _SEQUENCE = "ByteLevel", "Split", "Sequence"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer that can be in a file: llama.cpp loads none that merges nothing."""
    path = folder / TOKENIZER
    model = read_json(path, MAX_BYTES, _AGAIN).get("model") if path.is_file() else None
    return isinstance(model, dict) and bool(model.get("merges"))


def describe_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Write the keys of the tokenizer in a folder, of a model with so many rows of embeddings.

    A model without one is written as such: it takes token ids. Raises UsageError for a tokenizer that llama.cpp has not.
    """
    path = folder / TOKENIZER
    if not has_tokenizer(folder):
        writer.add_tokenizer_model("none")
        return
    found = read_json(path, MAX_BYTES, _AGAIN)
    try:
        tokens, kinds = _tokens(found, vocabulary)
        rule = _rule(found)
        special = SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{path}: not a byte-pair tokenizer ({error})", hint="give Llama 4's own tokenizer") from error
    if rule is None:
        raise UsageError(
            f"{path}: it splits text by a rule that llama.cpp has no name for", hint="give Llama 4's own tokenizer"
        )
    writer.add_tokenizer_model(_MODEL)
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special.add_to_gguf(writer, quiet=True)


def _tokens(found: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every row's token and its kind; rows that the tokenizer doesn't know are unused."""
    tokens = [f"[PAD{row}]" for row in range(vocabulary)]
    kinds = [int(TokenType.UNUSED)] * vocabulary
    for token, row in found["model"]["vocab"].items():
        tokens[_row(row, vocabulary)], kinds[row] = token, int(TokenType.NORMAL)
    for added in found.get("added_tokens") or []:
        row = _row(added["id"], vocabulary)
        tokens[row] = added["content"]
        kinds[row] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, kinds


def _row(row: int, vocabulary: int) -> int:
    if not 0 <= row < vocabulary:
        raise ValueError(f"token {row} is beyond the {vocabulary} rows of the embedding")
    return row


def _rule(found: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the way text is split before pairs are merged; None where it has none."""
    if found["model"].get("type", "BPE") != "BPE" or found.get("normalizer"):
        return None
    steps = list(_steps(found["pre_tokenizer"]))
    kinds = [step["type"] for step in steps]
    if kinds == [_BYTE_LEVEL] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    splits = kinds == [_SPLIT, _BYTE_LEVEL] and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert")
    if splits and not steps[1].get("use_regex", True) and steps[0]["pattern"].get("Regex") == _LLAMA4:
        return "llama4"
    return None


def _steps(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if value["type"] == _SEQUENCE:
        for step in value["pretokenizers"]:
            yield from _steps(step)
    else:
        yield value
