"""What a budget is made for: the tensors of one model, on disk or to come, with its configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

from l4pack.artifact.kv_cache import SUFFIXES as KV_SUFFIXES
from l4pack.artifact.stanza import read_stanza
from l4pack.checkpoint.header import TensorEntry, TypedTensor, tensor_bytes
from l4pack.formats.format import Format
from l4pack.formats.known import format_of
from l4pack.formats.readers import FormatReader
from l4pack.model.config import Llama4Config
from l4pack.model.names import classify, split_suffix
from l4pack.model.tensors import Role, catalogue


class ArtifactTensor(TypedTensor, Protocol):
    """A tensor of an artifact: written, or planned."""

    @property
    def role(self) -> Role: ...
    @property
    def layer(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor, placed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None


@dataclass(frozen=True, slots=True)
class TensorKind:
    """Tensors that a runtime treats alike: same role, layer, place in the module, dtype and shape."""

    role: Role
    layer: int | None
    projection: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]
    form: Format | None  # of the quantized matrix that the tensor belongs to

    @property
    def nbytes(self) -> int:
        """Bytes of one such tensor in its file."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to budget for. Compared by identity, so that sums over its tensors are made once."""

    name: str
    config: Llama4Config
    tensors: tuple[ArtifactTensor, ...]
    recipe: str | None = None

    @cached_property
    def kinds(self) -> dict[TensorKind, int]:
        """How many tensors there are of each kind."""
        named = [(tensor, *split_suffix(tensor.name)) for tensor in self.tensors]
        dtypes: dict[str, list[tuple[str, str]]] = {}
        for tensor, module, suffix in named:
            dtypes.setdefault(module, []).append((suffix, tensor.dtype))
        forms = {module: _told(tuple(found)) for module, found in dtypes.items()}
        return Counter(_kind(tensor, module, suffix, forms.get(module)) for tensor, module, suffix in named)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors on disk, without headers."""
        return sum(kind.nbytes * count for kind, count in self.kinds.items())

    @property
    def quantized(self) -> bool:
        """Whether any matrix is stored in fewer bits than the model's dtype."""
        return any(kind.form is not None for kind in self.kinds)

    @cached_property
    def exported_for(self) -> FormatReader | None:
        """The one runtime that reads a format among its own by export alone; None where each is read as it lies."""
        forms = {kind.form for kind in self.kinds if kind.form is not None}
        return next((form.readers[0] for form in forms if form.exported), None)

    @property
    def kv_dtype(self) -> str:
        """What a runtime's `auto` makes of the KV cache: FP8 when the artifact has, or will have, a scheme for it."""
        scheme = read_stanza(self.config.stanza).kv_cache
        to_come = self.recipe is not None and any(kind.suffix in KV_SUFFIXES for kind in self.kinds)
        return "fp8" if scheme or to_come else "bfloat16"


def from_entries(name: str, config: Llama4Config, entries: Iterable[TensorEntry]) -> Subject:
    """A subject from the headers of an artifact or checkpoint. Raises SourceError for a tensor that is not Llama 4's."""
    weights = [(entry, classify(entry.name)) for entry in entries]
    tensors = tuple(Weight(entry.name, entry.dtype, entry.shape, place.role, place.layer) for entry, place in weights)
    return Subject(name, config, tensors)


def from_config(name: str, config: Llama4Config) -> Subject:
    """The BF16 checkpoint that a configuration describes."""
    specs = catalogue(config, fused=True).tensors
    return Subject(name, config, tuple(Weight(spec.name, "BF16", spec.shape, spec.role, spec.layer) for spec in specs))


@cache
def _told(dtypes: tuple[tuple[str, str], ...]) -> Format | None:
    """The format that a module's tensors, dtypes by suffix, show it to be in, asked once for modules alike."""
    return format_of(dict(dtypes))


def _kind(tensor: ArtifactTensor, module: str, suffix: str, form: Format | None) -> TensorKind:
    projection = module.rpartition(".")[2]
    return TensorKind(tensor.role, tensor.layer, projection, suffix, tensor.dtype, tensor.shape, form)
