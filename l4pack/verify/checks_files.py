"""Checks of the files beside the weights: tokenizer, chat template, processor, generation config, licence."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from l4pack.artifact.policy import duty_files, written_files
from l4pack.checkpoint.companions import (
    GENERATION,
    PROCESSORS,
    TEMPLATES,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    is_companion,
    is_own,
)
from l4pack.checkpoint.source import Checkpoint
from l4pack.datafile import json_or_none
from l4pack.verify.findings import Findings
from l4pack.verify.opened import OpenedArtifact

# What runs, or is unpickled, when a runtime is told to trust a repository, or makes it read the artifact as another.
_DANGEROUS = re.compile(
    r".*\.(py|pyc|so|dll|sh|bin|pt|pth|pkl|pickle|ckpt|h5|msgpack|onnx|gguf|npz|keras)"
    r"|(.*/)?(adapter_config|hf_quant_config|quantize_config|quant_config|quantization_config)\.json",
    re.IGNORECASE,
)
# Keys that say who wrote a file, and where.
_MEANINGLESS = ("transformers_version", "_from_model_config", "name_or_path")
_SMALL = 64 * 1024**2


def check_files(artifact: OpenedArtifact, source: Checkpoint | None, covered: Collection[str], found: Findings) -> None:
    """The files every runtime needs, and none besides; with a source, that every file of it is here and says the same.

    `covered` are the files of the manifest, which holds them by their digests.
    """
    for names, message in absent_files(artifact.files, vision=artifact.config.vision is not None):
        asked = source is None or any(name in source.companions for name in names)
        (found.error if asked else found.warning)("companion", names[0], message)
    if not _has_template(artifact):
        found.warning("companion", TEMPLATES[0], "there is no chat template; a base model has none, others need it")
    if GENERATION not in artifact.files:
        found.warning("companion", GENERATION, "is missing: end-of-turn tokens and sampling fall back to defaults")
    for name in artifact.files:
        if name in (TOKENIZERS[0], TOKENIZER_CONFIG, GENERATION, TEMPLATES[1], *PROCESSORS):
            _check_json(artifact.folder / name, name, found)
    _check_strange(artifact, source, covered, found)
    if source is not None:
        _check_kept(artifact, source, found)


def absent_files(files: Collection[str], *, vision: bool) -> list[tuple[tuple[str, ...], str]]:
    """What no runtime does without and is not among `files`: the names it may have, and what is wrong then."""
    needed = [(TOKENIZERS, "there is no tokenizer"), ((TOKENIZER_CONFIG,), "is missing")]
    if vision:
        needed.append((PROCESSORS, "there is no image processor, and the model has a vision tower"))
    return [(names, message) for names, message in needed if not any(name in files for name in names)]


def _check_kept(artifact: OpenedArtifact, source: Checkpoint, found: Findings) -> None:
    for name in source.companions:
        if name not in artifact.files:
            matters = is_companion(name)
            (found.error if matters else found.warning)("companion", name, "is in the source and not here")
        elif source.store is not None and name not in written_files():
            _compare(artifact.folder / name, source.store.path(name), name, found)


def _check_strange(
    artifact: OpenedArtifact, source: Checkpoint | None, covered: Collection[str], found: Findings
) -> None:
    """Files that neither the manifest nor the source has; `covered` are those of the manifest.

    Beside the source, the manifest's word is good for what `--include` added, and not for what runtimes look for.
    """
    known = set(covered)
    if source is not None:
        known = {*source.companions, *(name for name in covered if not is_companion(name))}
    duties = {name.lower() for name in duty_files()}
    for name in artifact.files:
        alone = not covered and source is None
        if name in known or is_own(name) or name.lower() in duties or (alone and is_companion(name)):
            continue
        if _DANGEROUS.fullmatch(name):
            found.error("strange", name, "no Llama 4 needs it, and a runtime may run, unpickle or be misled by it")
        elif covered or source is not None:
            level = found.error if is_companion(name) or covered else found.warning
            whose = "the source" if name in covered or not covered else "the manifest"
            level("strange", name, f"was added: {whose} has no such file")
        else:
            found.warning("strange", name, "is no file that a runtime or a reader needs")


def _compare(mine: Path, theirs: Path, name: str, found: Findings) -> None:
    if mine.stat().st_size == theirs.stat().st_size and mine.read_bytes() == theirs.read_bytes():
        return
    new, old = (_loaded(mine), _loaded(theirs)) if name.endswith(".json") else (None, None)
    if not isinstance(new, dict) or not isinstance(old, dict):
        found.error("companion", name, "differs from the source's")
        return
    keys = sorted(key for key in {*new, *old} if _differ(new.get(key), old.get(key)) and key not in _MEANINGLESS)
    if keys:
        found.error("companion", name, f"differs from the source's in {', '.join(keys[:5])}")


def _differ(new: Any, old: Any) -> bool:
    """Whether JSON would write two values differently: true is not 1."""
    return json.dumps(new, sort_keys=True) != json.dumps(old, sort_keys=True)


def _has_template(artifact: OpenedArtifact) -> bool:
    if any(name in artifact.files for name in TEMPLATES):
        return True
    settings = _loaded(artifact.folder / TOKENIZER_CONFIG) if TOKENIZER_CONFIG in artifact.files else None
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _check_json(path: Path, name: str, found: Findings) -> None:
    if _loaded(path) is None:
        found.error("companion", name, "is not JSON")


def _loaded(path: Path) -> Any:
    """The parsed file, or None when it is no JSON of a sane size."""
    try:
        return json_or_none(path.read_bytes()) if path.stat().st_size <= _SMALL else None
    except OSError:
        return None
