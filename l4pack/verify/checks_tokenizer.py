"""Checks of token ids: none may lie beyond the embedding, where runtimes read other memory or stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from l4pack.datafile import json_or_none
from l4pack.verify.findings import Findings
from l4pack.verify.opened import OpenedArtifact

MAX_BYTES = 64 * 1024**2
_SPECIAL = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "image_token_index", "boi_token_index",
    "eoi_token_index", "image_token_id",
)  # fmt: skip

Ids = Iterator[tuple[str, Any]]  # what it is, and its id


def check_tokenizer(artifact: OpenedArtifact, found: Findings) -> None:
    """The ids of the tokenizer's vocabulary and of special tokens, wherever they are written."""
    size = artifact.config.text.vocab_size
    raw = artifact.config.raw
    text = raw.get("text_config")
    places: list[tuple[str, Ids]] = [
        ("config.json", _special(raw)),
        ("config.json", _special(text if isinstance(text, Mapping) else {}, "text_config.")),
    ]
    for name, ids in (
        ("generation_config.json", _special),
        ("tokenizer.json", _vocabulary),
        ("tokenizer_config.json", _added),
        ("added_tokens.json", _by_name),
    ):
        value = _loaded(artifact, name)
        if isinstance(value, Mapping):
            places.append((name, ids(value)))
    for name, found_ids in places:
        _check(name, found_ids, size, found)


def _check(name: str, ids: Ids, size: int, found: Findings) -> None:
    wrong = [(what, number) for what, number in ids if not _is_id(number, size)]
    if wrong:
        what, number = wrong[0]
        more = f", and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        message = f"{what:.60} has the id {number!r:.20}, the embedding has rows 0 to {size - 1:,}{more}"
        found.error("tokenizer", name, message)


def _is_id(number: Any, size: int) -> bool:
    return type(number) is int and 0 <= number < size


def _loaded(artifact: OpenedArtifact, name: str) -> Any:
    """A JSON file; None when it is absent, too large, or no JSON, which is a finding elsewhere."""
    if artifact.files.get(name, MAX_BYTES + 1) > MAX_BYTES:
        return None
    try:
        return json_or_none((artifact.folder / name).read_bytes())
    except OSError:
        return None


def _special(values: Mapping[str, Any], prefix: str = "") -> Ids:
    """Ids of special tokens; null means that there is none, and so does -1 for padding."""
    for key in _SPECIAL:
        value = values.get(key)
        for number in value if isinstance(value, list) else (value,):
            if number is not None and not (key == "pad_token_id" and number == -1):
                yield f"{prefix}{key}", number


def _vocabulary(value: Mapping[str, Any]) -> Ids:
    """Of the tokenizers library: texts with ids, or a list of texts whose places are their ids; and added tokens."""
    model = value.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        yield from ((repr(text), number) for text, number in vocabulary.items())
    elif isinstance(vocabulary, list):
        yield from (("its last token", len(vocabulary) - 1) for _ in vocabulary[:1])
    added = value.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping):
            yield repr(token.get("content")), token.get("id")


def _added(value: Mapping[str, Any]) -> Ids:
    decoder = value.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, Mapping) else ():
        text = token.get("content") if isinstance(token, Mapping) else token
        yield repr(text), int(number) if number.isascii() and number.isdigit() and len(number) < 10 else number


def _by_name(value: Mapping[str, Any]) -> Ids:
    return ((repr(text), number) for text, number in value.items())
