"""A format: the tensors that stand for one quantized matrix, their exact sizes, and the numbers in and out of them.

The planner, the writer, the reader and the verifier ask the same object, so they can't disagree about a name, dtype or
shape. What a runtime can't read is data, in `formats/NAME.yaml`. Encoding and decoding are inverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.errors import L4packError, RecipeError
from l4pack.formats.configuration import Activations, input_arguments, weight_arguments
from l4pack.formats.readers import FormatReader, read_readers
from l4pack.quant.dtypes import FLOATS, NAMES
from l4pack.quant.grid import NumberType, ScaleDtype
from l4pack.quant.scheme import HEADER_COLUMNS, Scheme, Strategy
from l4pack.quant.suffixes import Suffix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l4pack.quant.quantized import Quantized

SizeText = Annotated[
    str, Field(pattern=r"^((in|out)(/(byte|pack|group|header|rows|columns))?|[0-9]+)$", coerce_numbers_to_str=True)
]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Accepts(_Data):
    """The schemes a format can hold."""

    type: NumberType
    num_bits: list[int]
    strategies: list[Strategy]
    group_sizes: list[int] = []
    block_structures: list[tuple[int, int]] = []
    symmetric: list[bool]
    scale_dtype: ScaleDtype | None = None  # what scales are; None: floats, or what the grid has
    activations: list[Activations]


class Holds(StrEnum):
    """What a piece holds: codes, scales or zero points of the matrix, its size, or the scale of its inputs.

    `unit_input_scale` is a scale of inputs that are not rounded: 1, for a runtime that asks for one all the same.
    """

    VALUES = "values"
    SCALE = "scale"
    GLOBAL_SCALE = "global_scale"
    ZERO_POINT = "zero_point"
    SHAPE = "shape"
    INPUT_SCALE = "input_scale"
    UNIT_INPUT_SCALE = "unit_input_scale"


NUMBERS = (Holds.VALUES, Holds.SCALE, Holds.GLOBAL_SCALE, Holds.ZERO_POINT)  # what a matrix is decoded from


class Piece(_Data):
    """One tensor that stands for (a part of) a quantized matrix."""

    suffix: Suffix
    holds: Annotated[Holds, Field(exclude=True)]
    dtype: str  # a safetensors dtype, or 'scale' for the scheme's scale dtype
    shape: dict[Strategy, list[SizeText]]
    when: Literal["asymmetric", "static_activations", "weight_only_expert"] | None = None

    @model_validator(mode="after")
    def _known_dtype(self) -> Piece:
        if self.dtype != "scale" and self.dtype not in DTYPE_BITS:
            raise ValueError(f"dtype {self.dtype!r} is not a safetensors dtype")
        return self

    def rows_in_one(self, scheme: Scheme) -> int:
        """How many output rows of the matrix share one row of the tensor; 0 for all of them."""
        dimension, _, divisor = self.shape[scheme.strategy][0].partition("/")
        if dimension != "out":
            return 0
        return matrix_sizes(scheme, 0, 0)[divisor] if divisor else 1


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's suffix, safetensors dtype and shape."""

    suffix: Suffix
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Format:
    """One on-disk format; `pieces` in the order they are written."""

    name: str
    title: str
    accepts: Accepts
    pieces: tuple[Piece, ...]

    @cached_property
    def readers(self) -> tuple[FormatReader, ...]:
        """The runtimes that read it, and what each can't."""
        return read_readers(self.name)

    @property
    def exported(self) -> bool:
        """Whether it is read out of another container alone, into which `export` puts it."""
        return all(reader.container is not None for reader in self.readers)

    def describe(self, *, exclude_none: bool = False) -> dict[str, Any]:
        """The format as JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "accepts": self.accepts.model_dump(mode="json"),
            "tensors": [piece.model_dump(mode="json", exclude_none=exclude_none) for piece in self.pieces],
            "readers": [reader.model_dump(mode="json", exclude_none=exclude_none) for reader in self.readers],
        }

    @property
    def values(self) -> Piece:
        """The piece with the codes."""
        return next(piece for piece in self.pieces if piece.holds is Holds.VALUES)

    def has_dtypes(self, dtypes: Mapping[str, str]) -> bool:
        """Whether a module's codes, and scales of one dtype, are those of the format; `dtypes` are by suffix."""
        scale = next(piece for piece in self.pieces if piece.holds is Holds.SCALE)
        wanted = FLOATS if scale.dtype == "scale" else (scale.dtype,)
        return dtypes.get(self.values.suffix) == self.values.dtype and dtypes.get(scale.suffix, min(wanted)) in wanted

    def check_accepts(self, scheme: Scheme, activations: str, where: str) -> None:
        """Refuse a scheme the format can't hold. Raises RecipeError naming the key."""
        accepts = self.accepts
        taken: list[tuple[str, object, list[Any]]] = [
            ("type", scheme.type.value, [accepts.type.value]),
            ("num_bits", scheme.num_bits, accepts.num_bits),
            ("strategy", scheme.strategy.value, [strategy.value for strategy in accepts.strategies]),
            ("symmetric", scheme.symmetric, accepts.symmetric),
            ("activations", activations, [way.value for way in accepts.activations]),
        ]
        if scheme.super_blocked != (accepts.scale_dtype is ScaleDtype.Q4_K):
            taken.append(("scale_dtype", scheme.scale_dtype.value, [str(accepts.scale_dtype or "floats")]))
        if scheme.group_size is not None:
            taken.insert(3, ("group_size", scheme.group_size, accepts.group_sizes))
        if scheme.block_structure is not None:
            structures = [list(structure) for structure in accepts.block_structures]
            taken.insert(3, ("block_structure", list(scheme.block_structure), structures))
        for key, value, allowed in taken:
            if value not in allowed:
                raise RecipeError(f"{where}.{key}: format {self.name} can't hold {value}", hint=f"it takes {allowed}")

    def decodes(self, scheme: Scheme) -> bool:
        """Whether a matrix of such a scheme can be read back, whoever wrote it and of whatever size its groups are."""
        return scheme.type is self.accepts.type and scheme.strategy in self.accepts.strategies

    def stored(
        self,
        scheme: Scheme,
        out_features: int,
        in_features: int,
        source_dtype: str,
        *,
        observed: bool = False,
        expert: bool = False,
    ) -> tuple[StoredTensor, ...]:
        """The tensors that stand for one matrix `[out_features, in_features]`, in the order they are written.

        `observed`: the file has a scale of its inputs; `expert`: it is a routed expert's.
        """
        return _stored(self, scheme, out_features, in_features, source_dtype, observed, expert)

    def told_by(self, shapes: Mapping[str, tuple[int, ...]], out_features: int, in_features: int) -> Scheme | None:
        """The scheme of a matrix whose tensors have these shapes, by suffix; None when no scheme makes such tensors."""
        for scheme in self._schemes(shapes, in_features):
            wanted = {tensor.suffix: tensor.shape for tensor in self.stored(scheme, out_features, in_features, "")}
            if all(shapes.get(suffix, shape) == shape for suffix, shape in wanted.items()):
                return scheme
        return None

    def _schemes(self, shapes: Mapping[str, tuple[int, ...]], in_features: int) -> Iterator[Scheme]:
        """Every scheme that such tensors may be of; one scale a row is a channel's, even where it is a whole group's."""
        accepts, scale = self.accepts, shapes.get(Suffix.SCALE, ())
        symmetric = Suffix.ZERO_POINT not in shapes
        for bits, strategy in product(accepts.num_bits, accepts.strategies):
            numbers = {"num_bits": bits, "type": accepts.type, "strategy": strategy, "symmetric": symmetric}
            if accepts.scale_dtype is not None:
                yield Scheme.model_validate({**numbers, "symmetric": False, "scale_dtype": accepts.scale_dtype})
                continue
            if strategy is Strategy.BLOCK:
                choices: list[dict[str, object]] = [{"block_structure": one} for one in accepts.block_structures]
            elif strategy in (Strategy.GROUP, Strategy.TENSOR_GROUP):
                several = len(scale) == 2 and scale[1] > (Strategy.CHANNEL in accepts.strategies)
                choices = [{"group_size": in_features // scale[1]}] if several else []
            else:
                choices = [{}]
            for choice in choices:
                with suppress(ValidationError):  # groups that no scheme has
                    yield Scheme.model_validate({**numbers, **choice})

    def rows_in_one(self, scheme: Scheme) -> dict[str, int]:
        """How many output rows of a matrix share one row of each tensor, by suffix; 0 for all of them."""
        return {piece.suffix: piece.rows_in_one(scheme) for piece in self.pieces}

    def encode(
        self, quantized: Quantized, out_features: int, in_features: int, *, expert: bool = False
    ) -> dict[str, NDArray[Any]]:
        """The arrays of a matrix, or of a slice of its rows, by suffix; the size is that of the whole matrix, and `expert`
        says that it is a routed expert's.

        A scale of its inputs that calibration finds is not among them.
        """
        import numpy as np

        held = {
            Holds.VALUES: quantized.values,
            Holds.SCALE: quantized.scale,
            Holds.GLOBAL_SCALE: quantized.global_scale,
            Holds.UNIT_INPUT_SCALE: np.ones(1, np.float32) if expert else None,
            Holds.ZERO_POINT: quantized.zero_point,
            Holds.SHAPE: np.array([out_features, in_features], np.int64),
        }
        found = ((piece.suffix, held.get(piece.holds)) for piece in self.pieces)
        return {suffix: array for suffix, array in found if array is not None}

    def decode(
        self, arrays: Mapping[str, NDArray[Any]], scheme: Scheme, out_features: int, in_features: int, module: str
    ) -> Quantized:
        """The matrix whose tensors by suffix these are. Raises L4packError for one that is missing or of another shape."""
        from l4pack.quant.quantized import Quantized

        wanted = {tensor.suffix: tensor.shape for tensor in self.stored(scheme, out_features, in_features, "")}
        found: dict[Holds, NDArray[Any]] = {}
        for piece in self.pieces:
            if piece.holds in NUMBERS and piece.suffix in wanted:
                found[piece.holds] = _shaped(arrays, piece, wanted[piece.suffix], module)
        zero_point, over = found.get(Holds.ZERO_POINT), found.get(Holds.GLOBAL_SCALE)
        return Quantized(found[Holds.VALUES], found[Holds.SCALE], zero_point, over)

    def configuration(self, scheme: Scheme, activations: Activations, targets: list[str]) -> dict[str, Any]:
        """The group of a `quantization_config` that gives the targets a scheme."""
        return {
            "targets": targets,
            "format": self.name,
            "weights": weight_arguments(scheme),
            "input_activations": input_arguments(activations),
            "output_activations": None,
        }


@lru_cache(maxsize=4096)  # the experts of a model are thousands, and all alike
def _stored(
    form: Format, scheme: Scheme, out_features: int, in_features: int, source_dtype: str, observed: bool, expert: bool
) -> tuple[StoredTensor, ...]:
    holds = {
        "asymmetric": not scheme.symmetric,
        "static_activations": observed,
        "weight_only_expert": expert and not observed,
    }
    sizes = matrix_sizes(scheme, out_features, in_features)
    scale_dtype = NAMES.get(scheme.scale_dtype, source_dtype)
    return tuple(
        StoredTensor(
            piece.suffix,
            scale_dtype if piece.dtype == "scale" else piece.dtype,
            tuple(_size(text, sizes) for text in piece.shape[scheme.strategy]),
        )
        for piece in form.pieces
        if piece.when is None or holds[piece.when]
    )


def _shaped(arrays: Mapping[str, NDArray[Any]], piece: Piece, wanted: tuple[int, ...], module: str) -> NDArray[Any]:
    array = arrays.get(piece.suffix)
    if array is None:
        why = f"is {piece.when} but " if piece.when else ""
        raise L4packError(f"{module} {why}has no {piece.suffix}", hint="quantize again")
    if wanted == (1,):
        array = array.reshape(-1)  # a scale of a whole matrix may have no dimension
    if array.shape != wanted:
        what = f"{module}'s values" if piece.holds is Holds.VALUES else f"{module}.{piece.suffix}"
        raise L4packError(
            f"{what} have shape {list(array.shape)}, the scheme makes it {list(wanted)}",
            hint="config.json and the weights don't belong together: quantize again",
        )
    return array


def matrix_sizes(scheme: Scheme, out_features: int, in_features: int) -> dict[str, int]:
    """What the shapes of pieces, and the limits of runtimes on them, are told in."""
    rows, columns = scheme.block_structure or (1, in_features)
    return {
        "out": out_features,
        "in": in_features,
        "byte": 8 // scheme.num_bits,
        "pack": scheme.pack_factor,
        "group": scheme.group_columns(in_features),
        "header": HEADER_COLUMNS,
        "rows": rows,
        "columns": columns,
    }


def _size(text: str, sizes: dict[str, int]) -> int:
    if text.isdigit():
        return int(text)
    dimension, _, divisor = text.partition("/")
    return -(-sizes[dimension] // (sizes[divisor] if divisor else 1))
