"""Where a checkpoint keeps its chat template: four places, of which transformers' tokenizer reads three."""

from __future__ import annotations

from typing import Any

from l4pack.checkpoint.companions import TEMPLATE_FOLDER, TEMPLATES, TOKENIZER_CONFIG
from l4pack.checkpoint.source import Checkpoint
from l4pack.datafile import parse_json
from l4pack.errors import HubError, SourceError

LEGACY = "chat_template.json"
_MAX_BYTES = 50_000_000


def legacy_template(checkpoint: Checkpoint) -> str | dict[str, str] | None:
    """The template in `chat_template.json`, which processors read and tokenizers don't; None without one.

    Raises SourceError when the file holds none.
    """
    if checkpoint.store is None or LEGACY not in checkpoint.companions:
        return None
    template = _template(checkpoint.store.small(LEGACY, _MAX_BYTES))
    if template is None:
        raise SourceError(f"{checkpoint.name}: {LEGACY} holds no chat template", hint="download it again, or remove it")
    return template


def has_template(checkpoint: Checkpoint) -> bool:
    """Whether any of the places holds a chat template; one that can't be read counts as none."""
    names = checkpoint.companions
    if any(name in names for name in TEMPLATES) or any(name.startswith(f"{TEMPLATE_FOLDER}/") for name in names):
        return True
    if checkpoint.store is None or TOKENIZER_CONFIG not in names:
        return False
    try:
        return _template(checkpoint.store.small(TOKENIZER_CONFIG, _MAX_BYTES)) is not None
    except (SourceError, HubError):
        return False


def _template(raw: bytes) -> str | dict[str, str] | None:
    """The value of `chat_template`: a text, or several as a list of names and templates."""
    try:
        value: Any = parse_json(raw)["chat_template"]
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(value, list):
        value = {
            item["name"]: item["template"]
            for item in value
            if isinstance(item, dict) and {"name", "template"} <= item.keys()
        }
    if isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair):
        return value or None
    return value if isinstance(value, str) and value else None
