"""Files of llama.cpp and MLX, anybody's: what each tensor is and weighs, from headers that are not believed unchecked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from l4pack.budget.subject import Subject
from l4pack.checkpoint.foreign import states_mlx
from l4pack.checkpoint.header import read_header
from l4pack.containers.gguf_check import gguf_files, holds_gguf
from l4pack.containers.gguf_header import read_model
from l4pack.containers.gguf_model import TOWER, placed, text_config
from l4pack.datafile import small_object
from l4pack.errors import SourceError, UsageError
from l4pack.model import parts
from l4pack.model.config import Llama4Config, parse_config
from l4pack.model.names import classify
from l4pack.model.tensors import Role

LLAMA_CPP, MLX = "llama.cpp", "mlx"
CONTAINERS = {LLAMA_CPP: "gguf", MLX: "mlx"}
"""What `export` puts an artifact into for a runtime that loads files of its own."""
_USUAL = "vllm"  # what a runtime is where none is named
_MAX_CONFIG, _MAX_FILES = 4 * 1024**2, 1000
_LAYER = re.compile(r"\.(\d{1,4})\.")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its role, its layer, its bytes."""

    role: Role
    layer: int | None
    nbytes: int


@dataclass(frozen=True, eq=False)
class FileSubject(Subject):
    """A model in files of the one runtime that loads them; `tower` is the vision tower's own file."""

    runtime: str = ""
    path: Path = Path()
    tower: Path | None = None
    stored: tuple[Stored, ...] = ()

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def kv_dtype(self) -> str:
        """What the runtime keeps keys and values in by itself."""
        return "float16" if self.runtime == LLAMA_CPP else "bfloat16"


def runtime_of(subject: Subject, named: str) -> str:
    """The runtime that a subject is budgeted for. Raises UsageError for one that does not load it."""
    if isinstance(subject, FileSubject):
        if named not in (_USUAL, subject.runtime):
            raise UsageError(
                f"{named} does not load {subject.name}", hint=f"leave --runtime out: it is {subject.runtime}'s"
            )
        return subject.runtime
    if named in CONTAINERS:
        raise UsageError(
            f"{subject.name} is not in {named}'s files",
            hint=f"l4pack export ARTIFACT --to {CONTAINERS[named]} --out DIR makes them; l4pack fit plans them",
        )
    return named


def open_files(place: Path) -> FileSubject | None:
    """The model in a GGUF file or in a folder of GGUF or MLX; None where a path is neither. Raises SourceError."""
    if holds_gguf(place):
        return _gguf(place)
    return _mlx(place) if _is_mlx(place) else None


def _gguf(place: Path) -> FileSubject:
    files = [read_model(path) for path in gguf_files(place)]
    towers = [file for file in files if file.architecture == TOWER]
    models = [file for file in files if file.architecture != TOWER] or towers
    if len(models) > 1:
        raise SourceError(f"{place} holds {len(models)} models", hint="name one of its files")
    config = text_config(models[0])
    found = [(*placed(tensor), tensor.nbytes) for tensor in models[0].tensors]
    found += [(Role.VISION, None, tensor.nbytes) for file in towers[:1] for tensor in file.tensors]
    tower = towers[0].path if towers else None
    return _subject(models[0].path, place, config, LLAMA_CPP, (Stored(*one) for one in found), tower)


def _subject(
    path: Path, place: Path, config: Llama4Config, runtime: str, stored: Iterable[Stored], tower: Path | None = None
) -> FileSubject:
    tensors = tuple(stored)
    for tensor in tensors:
        if tensor.layer is not None and tensor.layer >= config.text.num_hidden_layers:
            raise SourceError(
                f"{place}: a tensor is of layer {tensor.layer}, beyond the last", hint="download it again"
            )
    return FileSubject(place.name or str(place), config, (), runtime=runtime, path=path, tower=tower, stored=tensors)


def _is_mlx(place: Path) -> bool:
    """Whether a folder's configuration states MLX's quantization."""
    if not (place / "config.json").is_file():
        return False
    return states_mlx(small_object(place / "config.json", _MAX_CONFIG))


def _mlx(place: Path) -> FileSubject:
    config = parse_config(small_object(place / "config.json", _MAX_CONFIG), str(place / "config.json"))
    files = sorted(place.glob("*.safetensors"))[: _MAX_FILES + 1]
    if not 0 < len(files) <= _MAX_FILES:
        raise SourceError(f"{place} holds {len(files):,} safetensors files", hint="download the model again")
    return _subject(place, place, config, MLX, _mlx_tensors(files))


def _mlx_tensors(files: Iterable[Path]) -> Iterator[Stored]:
    """The text model's, which is what mlx-lm loads."""
    for file in files:
        for entry in read_header(file, file.name).values():
            role = _mlx_role(entry.name)
            layer = _LAYER.search(entry.name)
            if role not in (Role.VISION, Role.PROJECTOR):
                yield Stored(role, int(layer[1]) if layer else None, entry.nbytes)


def _mlx_role(name: str) -> Role:
    module = name.rpartition(".")[0]
    if f".{parts.EXPERTS}." in module:
        return Role.ROUTED_EXPERT
    return classify(f"{module}.{parts.WEIGHT}").role
