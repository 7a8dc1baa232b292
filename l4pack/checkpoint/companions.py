"""Which files beside the weights belong to a model, and which are left behind: an allow-list, and what is asked for.

A folder that a model was trained or kept in holds what nobody means to publish: keys, scripts, logs, optimizer states.
So only what a runtime or a reader needs goes into an artifact, and from there to the Hub: tokenizer, processor, chat
template, generation config, licence. `--include` adds a file by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from l4pack.datafile import refuse_lfs_pointer
from l4pack.errors import SourceError, UsageError

TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
GENERATION = "generation_config.json"
_RUNTIME_FILES = {
    *TOKENIZERS, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", *PROCESSORS, "video_preprocessor_config.json", *TEMPLATES, GENERATION,
}  # fmt: skip
_TEMPLATE = re.compile(rf"{TEMPLATE_FOLDER}/\w[\w.\-]*\.jinja")
_LICENCE = re.compile(
    r"(llama[-_ ]?[\d.]*[-_ ])?(licen[cs]es?|notices?|use[-_ ]policy|acceptable[-_ ]use([-_ ]policy)?|copying|copyright"
    r"|attribution|third[-_ ]?party[-_ ](licen[cs]es|notices))(?P<rest>[-_.][\w.\-]*)?",
    re.IGNORECASE,
)
_LICENCE_TYPES = ("", ".txt", ".md", ".rst", ".pdf", ".html")
_SECRET = re.compile(
    r"key|token|secret|passw|credential|server|private|internal|confidential|[rd]sa|25519", re.IGNORECASE
)
# What l4pack itself writes into an artifact's folder; config.json and the weights as runtimes look for them.
_RECORD = re.compile(
    r"l4pack-(manifest|calibration|dequantized)\.json|l4pack-files\.sha256(\.sig)?|accuracy\.json|README\.md"
)
_WEIGHT_FILE = re.compile(
    r"config\.json|model\.safetensors|model-\d{5,}-of-\d{5,}\.safetensors|model\.safetensors\.index\.json"
)
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".pkl", ".npz", ".tflite",
)  # fmt: skip
# A runtime that finds one of these reads the artifact as something else.
_MISLEADING = {"adapter_config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json"}
_UNREMARKABLE = {".git", ".gitattributes", ".gitignore", ".cache", ".huggingface"}
_POINTER_BYTES = 1024
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Beside:
    """The files beside a checkpoint's weights."""

    carried: Mapping[str, int]  # name within the folder -> bytes
    left_behind: tuple[str, ...]  # a folder ends in /
    included: tuple[str, ...]  # carried because they were asked for


@dataclass(frozen=True)
class Missing:
    """A file that is not there, and what does not work without it."""

    file: str
    breaks: str


def is_companion(name: str) -> bool:
    """Whether a file of a source goes into its artifact unasked (tokenizer, processor, template, licence)."""
    return name in _RUNTIME_FILES or _TEMPLATE.fullmatch(name) is not None or is_licence(name)


def is_licence(name: str) -> bool:
    """Whether a file's name is one that licences, notices and use policies have."""
    match = _LICENCE.fullmatch(name)
    return match is not None and Path(name).suffix.lower() in _licence_types(match) and not _SECRET.search(name)


def _licence_types(match: re.Match[str]) -> tuple[str, ...]:
    """A version such as `LICENSE-2.0` looks like a suffix and is none."""
    suffix = Path(match["rest"] or "").suffix.lower()
    return (*_LICENCE_TYPES, suffix) if re.fullmatch(r"\.\d+", suffix) else _LICENCE_TYPES


def belongs(name: str, included: Collection[str] = ()) -> bool:
    """Whether a file may lie in an artifact and be published with it; `included` were asked for when it was made."""
    return is_companion(name) or is_own(name) or name in included


def is_own(name: str) -> bool:
    """Whether a file is one that l4pack writes into an artifact itself, weights and configuration included."""
    return _RECORD.fullmatch(name) is not None or _WEIGHT_FILE.fullmatch(name) is not None


def choose(files: Mapping[str, int], used: Collection[str], include: Sequence[str] = ()) -> Beside:
    """Sort a folder's files (name within it -> bytes; a folder not looked into ends in /) into carried and left behind.

    `used` are the files that make up the checkpoint itself. Raises UsageError for an `include` that matches nothing or
    may not.
    """
    included = {name for pattern in include for name in _matching(pattern, files, used)}
    carried = {name: size for name, size in sorted(files.items()) if is_companion(name) or name in included}
    rest = {_shown(name) for name in files if name not in carried and name not in used}
    inside = {f"{name.partition('/')[0]}/" for name in carried if "/" in name}
    left = sorted(name for name in rest - inside if not _unremarkable(name))
    return Beside(carried, tuple(left), tuple(sorted(included - {name for name in carried if is_companion(name)})))


def _unremarkable(name: str) -> bool:
    """Version control's own files, and what l4pack writes anew or wrote."""
    return name.rstrip("/") in _UNREMARKABLE or _RECORD.fullmatch(name) is not None


def _shown(name: str) -> str:
    """Files of a folder are told as one; those in the folder of templates one by one."""
    top, slash, _ = name.partition("/")
    return name if not slash or top == TEMPLATE_FOLDER else f"{top}/"


def _matching(pattern: str, files: Mapping[str, int], used: Collection[str]) -> list[str]:
    check_pattern(pattern)
    parts = pattern.split("/")
    found = [name for name in files if not name.endswith("/") and _fits(name.split("/"), parts)]
    allowed = [name for name in found if not _forbidden(name, used)]
    if not allowed:
        why = f"matches {found[0]}, which is not for an artifact to carry" if found else "matches no file of the source"
        raise UsageError(
            f"--include '{pattern}' {why}", hint="name a file, or a pattern such as 'docs/*.md'; see l4pack inspect"
        )
    return allowed


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(name) == len(pattern) and all(
        fnmatchcase(part, glob) and not part.startswith(".") for part, glob in zip(name, pattern, strict=True)
    )


def check_pattern(pattern: str) -> None:
    """Raise UsageError for a pattern that could lead out of the folder, or that names what is never carried."""
    parts = pattern.split("/")
    if "\\" in pattern or not pattern.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise UsageError(f"--include '{pattern}' does not stay in the source's folder", hint="name a file inside it")
    if any(part.startswith((".", "~")) for part in parts):
        raise UsageError(f"--include '{pattern}' names a hidden file", hint="those are never published: rename it")
    if not _WILD.search(pattern) and _forbidden(pattern, ()):
        raise UsageError(
            f"--include '{pattern}': an artifact has its own, or runtimes would read it as something else",
            hint="leave it out",
        )


def _forbidden(name: str, used: Collection[str]) -> bool:
    last = name.rpartition("/")[2].lower()
    return is_own(name) or last in _MISLEADING or name in used or last.endswith(_WEIGHT_SUFFIXES)


def folder_files(folder: Path, include: Sequence[str] = ()) -> dict[str, int]:
    """Files of a folder by their names within it; subfolders are looked into only where a companion may lie."""
    depth = max((pattern.count("/") for pattern in include), default=0)
    found: dict[str, int] = {}
    _walk(folder, "", depth, found)
    return dict(sorted(found.items()))


def _walk(folder: Path, prefix: str, depth: int, found: dict[str, int]) -> None:
    for path in folder.iterdir():
        name = prefix + path.name
        hidden = path.name.startswith(".")
        if path.is_dir():
            looked_into = name == TEMPLATE_FOLDER or (prefix.count("/") < depth and not hidden)
            if looked_into and not path.is_symlink():
                _walk(path, f"{name}/", depth, found)
            else:
                found[f"{name}/"] = 0
        elif path.is_file():
            found[name] = path.stat().st_size
        elif path.is_symlink() and is_companion(name):
            raise SourceError(f"{name} in {folder} is a link to nothing", hint="download it again")


def check_companions(folder: Path, names: Collection[str]) -> None:
    """Refuse names that can't be published, links that lead out of the folder, and what Git LFS left in place of files.

    Raises SourceError.
    """
    home = folder.resolve()
    if home.parent.name == "snapshots":  # a Hub cache keeps the contents in a folder beside the snapshots
        home = home.parent.parent
    for name in names:
        path = folder / name
        if not name.isprintable():
            raise SourceError(
                f"{name!a} in {folder} is no name for a published file", hint="rename the file, or remove it"
            )
        real = path.resolve()
        if path.is_symlink() and real.parent == folder.resolve() and real.name not in names:
            raise SourceError(
                f"{name} in {folder} is a link to {real.name}, which is not to be published",
                hint="put the file itself there, or remove the link",
            )
        if not real.is_relative_to(home):
            raise SourceError(
                f"{name} is a link that leaves {folder}, and would be published with the artifact",
                hint="put the file itself there, or remove the link",
            )
        if path.stat().st_size <= _POINTER_BYTES:
            refuse_lfs_pointer(path.read_bytes(), str(path))


def missing_files(names: Collection[str], *, vision: bool, template: bool, temperature_tuning: bool) -> list[Missing]:
    """What a checkpoint lacks among `names`, its companions, and what each absence breaks."""
    found = []
    if TOKENIZERS[0] not in names:
        found.append(Missing(TOKENIZERS[0], "without it l4pack can't calibrate or evaluate, and no runtime can serve"))
    if TOKENIZER_CONFIG not in names:
        found.append(Missing(TOKENIZER_CONFIG, "transformers and vLLM find no special tokens without it"))
    if vision and not any(name in names for name in PROCESSORS):
        breaks = "there is no image processor: vLLM and transformers can't take images"
        found.append(Missing(PROCESSORS[0], breaks))
    if not template:
        found.append(
            Missing(TEMPLATES[0], "there is no chat template: no chat can be rendered (base models have none)")
        )
    if GENERATION not in names:
        breaks = "end-of-turn tokens and sampling fall back to defaults"
        tuned = "; vLLM 0.33 takes attn_temperature_tuning from it alone, and computes long contexts otherwise"
        found.append(Missing(GENERATION, breaks + (tuned if temperature_tuning else "")))
    return found
