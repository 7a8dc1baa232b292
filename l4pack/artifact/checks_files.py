"""Checks of the files beside the weights: tokenizer, chat template, processor, generation config, licence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from l4pack.artifact.findings import Findings
from l4pack.artifact.opened import Artifact
from l4pack.checkpoint.source import Checkpoint

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MUST_STAY = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template.*|(pre)?processor_config\.json"
    r"|generation_config\.json|.*(licen[cs]e|notice|use_policy|acceptable_use).*",
    re.IGNORECASE,
)
# What transformers writes anew whenever it saves, without a change of meaning.
_REWRITTEN = {_TOKENIZER_CONFIG, "special_tokens_map.json", _GENERATION, *_PROCESSORS}
_SMALL = 256 * 1024**2


def check_files(artifact: Artifact, source: Checkpoint | None, found: Findings) -> None:
    """The files every runtime needs; with a source, that every file of it is here and says the same."""
    needed = [(_TOKENIZERS, "there is no tokenizer"), ((_TOKENIZER_CONFIG,), "is missing")]
    if artifact.config.vision is not None:
        needed.append((_PROCESSORS, "there is no image processor, and the model has a vision tower"))
    for names, message in needed:
        if not any(name in artifact.files for name in names):
            asked = source is None or any(name in source.companions for name in names)
            (found.error if asked else found.warning)("companion", names[0], message)
    if not _has_template(artifact):
        found.warning("companion", _TEMPLATES[0], "there is no chat template; a base model has none, others need it")
    if _GENERATION not in artifact.files:
        found.warning("companion", _GENERATION, "is missing: end-of-turn tokens and sampling fall back to defaults")
    for name in artifact.files:
        if name in (_TOKENIZERS[0], _TOKENIZER_CONFIG, _GENERATION, _TEMPLATES[1], *_PROCESSORS):
            _check_json(artifact.folder / name, name, found)
    if source is not None:
        _check_kept(artifact, source, found)


def _check_kept(artifact: Artifact, source: Checkpoint, found: Findings) -> None:
    for name in source.companions:
        matters = _MUST_STAY.fullmatch(name) is not None
        if name not in artifact.files:
            (found.error if matters else found.warning)("companion", name, "is in the source and not here")
        elif matters and source.store is not None:
            _compare(artifact.folder / name, source.store.path(name), name, found)


def _compare(mine: Path, theirs: Path, name: str, found: Findings) -> None:
    if mine.stat().st_size == theirs.stat().st_size and mine.read_bytes() == theirs.read_bytes():
        return
    if name.endswith(".json"):
        new, old = _loaded(mine), _loaded(theirs)
        if new == old and new is not None:
            return
        if isinstance(new, dict) and isinstance(old, dict):
            keys = sorted(key for key in {*new, *old} if new.get(key) != old.get(key))
            level = found.warning if name in _REWRITTEN else found.error
            level("companion", name, f"differs from the source's in {', '.join(keys[:5])}")
            return
    found.error("companion", name, "differs from the source's")


def _has_template(artifact: Artifact) -> bool:
    if any(name in artifact.files for name in _TEMPLATES):
        return True
    settings = _loaded(artifact.folder / _TOKENIZER_CONFIG) if _TOKENIZER_CONFIG in artifact.files else None
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _check_json(path: Path, name: str, found: Findings) -> None:
    if _loaded(path) is None:
        found.error("companion", name, "is not JSON")


def _loaded(path: Path) -> Any:
    """The parsed file, or None when it is no JSON of a sane size."""
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= _SMALL else None
    except (ValueError, OSError, RecursionError):
        return None
