"""Opening an artifact to be checked: as far as it can be read, everything else becomes a finding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from l4pack.checkpoint.foreign import refuse_mlx
from l4pack.checkpoint.header import TensorEntry, read_header
from l4pack.checkpoint.source import MAX_INDEX_BYTES, parse_index
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.datafile import parse_json
from l4pack.errors import SourceError
from l4pack.model.config import MULTIMODAL, Llama4Config, load_config
from l4pack.model.names import TOWER_MODULES, detect_layout, split_suffix
from l4pack.model.parts import FUSED_MODULES
from l4pack.model.tensors import MULTIMODAL_NAMING, TEXT_ONLY_NAMING, Catalogue, Naming, catalogue
from l4pack.verify.findings import Findings


@dataclass(frozen=True)
class OpenedArtifact:
    """An artifact's configuration, every tensor that can be found, and the names of all its files."""

    folder: Path
    config: Llama4Config
    entries: Mapping[str, TensorEntry]
    files: Mapping[str, int]  # name within the folder -> bytes
    unreadable: frozenset[str]  # shards whose header can't be believed

    @property
    def stanza(self) -> Mapping[str, Any]:
        """The quantization_config, empty when there is none."""
        value = self.config.raw.get("quantization_config")
        return value if isinstance(value, Mapping) else {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @cached_property
    def canonical(self) -> Naming:
        """The prefixes runtimes expect of this architecture."""
        return MULTIMODAL_NAMING if self.config.raw.get("model_type") == MULTIMODAL else TEXT_ONLY_NAMING

    @cached_property
    def layout(self) -> Catalogue:
        """What the model holds when nothing is quantized, experts unfused, under the prefixes found."""
        try:
            naming = detect_layout(self.config, self.entries).naming
        except SourceError:
            naming = self.canonical
        return catalogue(self.config, naming, fused=False)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every name that an entry of the stanza may mean: modules, those that runtimes fuse, and all they lie in."""
        names = {split_suffix(name)[0] for name in self.layout.by_name} | {self.layout.naming.head}
        names |= {linear.module for linear in self.layout.linears} | {*TOWER_MODULES}
        for fused, held in FUSED_MODULES.items():
            names |= {name.removesuffix(part) + fused for name in names for part in held if name.endswith(f".{part}")}
        for name in list(names):
            pieces = name.split(".")
            names |= {".".join(pieces[:end]) for end in range(1, len(pieces))}
        return tuple(sorted(names))


def open_artifact(folder: Path, found: Findings, *, ask_library: bool = True) -> OpenedArtifact:
    """Read config.json, the index and every header, and ask the safetensors library to open the files too.

    Raises SourceError when there is no folder, no Llama 4 config.json or no weight file at all; damage within becomes
    findings of rules `shard` and `index`.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder", hint="give the folder of an artifact")
    if not (folder / CONTAINER.config_name).is_file():
        raise SourceError(f"{folder} has no config.json", hint="give the folder that holds config.json and the weights")
    config = load_config(folder / CONTAINER.config_name)
    refuse_mlx(str(folder), config.raw)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _hidden(path.relative_to(folder))
    }
    shards = [name for name in files if CONTAINER.is_weights(name) and "/" not in name]
    if not shards:
        raise SourceError(f"{folder} holds no safetensors files", hint="l4pack verifies safetensors artifacts only")
    headers: dict[str, dict[str, TensorEntry]] = {}
    for file in shards:
        try:
            headers[file] = read_header(folder / file, file)
            if ask_library:
                _check_library(folder / file, file)
        except SourceError as error:
            headers.pop(file, None)
            found.error("shard", file, error.message)
    entries = _merge(headers, found)
    _check_index(folder, shards, headers, found)
    return OpenedArtifact(folder, config, entries, files, frozenset(shards) - frozenset(headers))


def _hidden(path: Path) -> bool:
    """Whether a file is of version control or a cache, which no runtime looks into."""
    return path.parts[0].startswith(".")


def _check_library(path: Path, file: str) -> None:
    """Every runtime opens weights with the safetensors library, so it has the last word. Raises SourceError."""
    from safetensors import SafetensorError, safe_open  # needs NumPy, which the core does without

    try:
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{file}: safetensors refuses it ({error})", hint="download it again") from error


def _merge(headers: Mapping[str, Mapping[str, TensorEntry]], found: Findings) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file, header in headers.items():
        for name, entry in header.items():
            if name in entries:
                found.error("index", name, f"is both in {entries[name].file} and in {file}")
            else:
                entries[name] = entry
    return entries


def _check_index(
    folder: Path, shards: list[str], headers: Mapping[str, Mapping[str, TensorEntry]], found: Findings
) -> None:
    index = _read_index(folder, shards, found)
    if index is None:
        return
    weight_map, total_size = index
    for file in sorted(set(weight_map.values()) - set(shards)):
        found.error("shard", file, f"is missing, {CONTAINER.index_name} names it")
    for file in sorted(set(shards) - set(weight_map.values())):
        found.error(
            "shard", file, f"is not named by {CONTAINER.index_name}: runtimes that load every file get other tensors"
        )
    for name, file in weight_map.items():
        if file in headers and name not in headers[file]:
            found.error("index", name, f"is not in {file}, where {CONTAINER.index_name} places it")
    for file, header in headers.items():
        for name in header:
            if file in weight_map.values() and name not in weight_map:
                found.error("index", name, f"is in {file}, but {CONTAINER.index_name} does not name it")
    real = sum(entry.nbytes for header in headers.values() for entry in header.values())
    if len(headers) == len(shards) and total_size != real:
        found.error("index", CONTAINER.index_name, f"total_size is {total_size}, the tensors have {real} bytes")


def _read_index(folder: Path, shards: list[str], found: Findings) -> tuple[dict[str, str], Any] | None:
    path = folder / CONTAINER.index_name
    if not path.is_file():
        if len(shards) > 1:
            found.error("index", CONTAINER.index_name, f"is missing, and there are {len(shards)} weight files")
        elif shards != [CONTAINER.single_name]:
            found.error("index", shards[0], f"without an index, transformers looks for {CONTAINER.single_name} only")
        return None
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise SourceError(f"{CONTAINER.index_name} is implausibly large")
        raw = path.read_bytes()
        weight_map = parse_index(raw)
    except SourceError as error:
        found.error("index", CONTAINER.index_name, error.message)
        return None
    metadata = parse_json(raw).get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None
