"""On-disk formats, read from `formats/*.yaml`: which tensors stand for one quantized matrix, and who reads them.

The planner, the writer and the verifier all read the same file, so they can't disagree about a name, dtype or shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.datafile import read_yaml, validate
from l4pack.errors import RecipeError
from l4pack.model.parts import DOWN, KEY, OUTPUT, VALUE
from l4pack.model.tensors import QUANTIZABLE, Linear, Role
from l4pack.quant.dtypes import NAMES
from l4pack.quant.grid import NumberType
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.resources import data_folder

SizeText = Annotated[
    str, Field(pattern=r"^((in|out)(/(pack|group|rows|columns))?|[0-9]+)$", coerce_numbers_to_str=True)
]
Condition = Literal[
    "asymmetric", "asymmetric_attention", "attention", "block_attention", "kv_cache", "kv_cache_by_head",
    "kv_cache_vision", "mixed", "static_activations", "weight_only_experts",
]  # fmt: skip
Multiple = Annotated[int, Field(gt=0)] | Literal["pack", "group", "rows", "columns"]


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
    activations: list[str]


class TensorRule(_Data):
    """One tensor that stands for (a part of) a quantized matrix."""

    suffix: str
    dtype: str  # a safetensors dtype, or 'scale' for the scheme's scale dtype
    shape: dict[Strategy, list[SizeText]]
    when: Condition | None = None

    @model_validator(mode="after")
    def _known_dtype(self) -> TensorRule:
        if self.dtype != "scale" and self.dtype not in DTYPE_BITS:
            raise ValueError(f"dtype {self.dtype!r} is not a safetensors dtype")
        return self


class Severity(StrEnum):
    """What becomes of a case a runtime can't do: worth knowing, does not load, or loads and answers wrongly."""

    NOTE = "note"
    REFUSES = "refuses"
    MISREADS = "misreads"


class Limit(_Data):
    """A case a runtime does not read rightly."""

    when: Condition
    severity: Severity = Severity.NOTE
    says: str


class ShapeLimit(_Data):
    """A multiple that a matrix's size must be on each GPU, after tensor parallelism has cut it."""

    size: Literal["out", "in"]
    multiple: Multiple
    strategies: Annotated[list[Strategy], Field(min_length=1)] = list(Strategy)
    roles: Annotated[list[Role], Field(min_length=1)] = list(QUANTIZABLE)
    projections: Annotated[list[str], Field(min_length=1)] | None = None
    when: Condition | None = None
    severity: Severity = Severity.REFUSES
    says: str


class Reader(_Data):
    """A runtime that reads the format, and what it can't."""

    runtime: str
    version: str
    serves: bool = True  # false for one that holds the weights unpacked, to compute with and not to serve
    limits: list[Limit] = []
    shapes: list[ShapeLimit] = []


class FormatSpec(_Data):
    """One on-disk format."""

    name: str
    title: str
    accepts: Accepts
    tensors: list[TensorRule]
    readers: list[Reader]


@dataclass(frozen=True, slots=True)
class LocalMatrix:
    """The part of a matrix that one GPU holds: its projection (`down_proj`), and `[out_features, in_features]` there."""

    projection: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's suffix, safetensors dtype and shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


def format_names() -> list[str]:
    """Names of the shipped formats."""
    return sorted(path.stem for path in data_folder("formats").glob("*.yaml"))


@cache
def load_format(name: str) -> FormatSpec:
    """A shipped format by name. Raises RecipeError."""
    if name not in format_names():
        raise RecipeError(f"no format is named '{name}'", hint=f"formats: {', '.join(format_names())}")
    path = data_folder("formats") / f"{name}.yaml"
    return validate(FormatSpec, read_yaml(path), path.name)


def check_accepts(spec: FormatSpec, scheme: Scheme, activations: str, where: str) -> None:
    """Refuse a scheme the format can't hold. Raises RecipeError naming the key."""
    accepts = spec.accepts
    wrong: list[tuple[str, object, object]] = []
    if scheme.type is not accepts.type:
        wrong.append(("type", scheme.type.value, [accepts.type.value]))
    if scheme.num_bits not in accepts.num_bits:
        wrong.append(("num_bits", scheme.num_bits, accepts.num_bits))
    if scheme.strategy not in accepts.strategies:
        wrong.append(("strategy", scheme.strategy.value, [strategy.value for strategy in accepts.strategies]))
    if scheme.group_size is not None and scheme.group_size not in accepts.group_sizes:
        wrong.append(("group_size", scheme.group_size, accepts.group_sizes))
    if scheme.block_structure is not None and scheme.block_structure not in accepts.block_structures:
        wrong.append(("block_structure", list(scheme.block_structure), [list(b) for b in accepts.block_structures]))
    if scheme.symmetric not in accepts.symmetric:
        wrong.append(("symmetric", scheme.symmetric, accepts.symmetric))
    if activations not in accepts.activations:
        wrong.append(("activations", activations, accepts.activations))
    if wrong:
        key, value, allowed = wrong[0]
        raise RecipeError(f"{where}.{key}: format {spec.name} can't hold {value}", hint=f"it takes {allowed}")


def stored_tensors(
    spec: FormatSpec, scheme: Scheme, out_features: int, in_features: int, source_dtype: str, *, static: bool = False
) -> list[StoredTensor]:
    """The tensors that stand for one matrix `[out_features, in_features]`, in the order they are written."""
    holds = {"asymmetric": not scheme.symmetric, "static_activations": static}
    sizes = _sizes(scheme, out_features, in_features)
    scale_dtype = NAMES.get(scheme.scale_dtype, source_dtype)
    return [
        StoredTensor(
            suffix=rule.suffix,
            dtype=scale_dtype if rule.dtype == "scale" else rule.dtype,
            shape=tuple(_size(text, sizes) for text in rule.shape[scheme.strategy]),
        )
        for rule in spec.tensors
        if rule.when is None or holds.get(rule.when, False)
    ]


def reader_limits(
    spec: FormatSpec, scheme: Scheme, roles: Collection[Role], *, weight_only: bool, mixed: bool
) -> list[str]:
    """What runtimes can't do with matrices of these roles under a scheme, each as `RUNTIME VERSION what`.

    `mixed` says that the artifact has other schemes beside this one.
    """
    holds = _conditions(scheme, roles, weight_only=weight_only, mixed=mixed)
    limits = [(reader, limit) for reader in spec.readers for limit in reader.limits]
    return [f"{reader.runtime} {reader.version} {limit.says}" for reader, limit in limits if holds.get(limit.when)]


def hindrances(
    spec: FormatSpec,
    scheme: Scheme,
    role: Role,
    matrices: Collection[LocalMatrix],
    runtimes: Collection[str],
    *,
    weight_only: bool,
) -> list[str]:
    """Why a runtime of these can't load `matrices` of one role under a scheme, or would answer wrongly; empty: it can."""
    holds = _conditions(scheme, {role}, weight_only=weight_only, mixed=False)
    found = []
    for reader in spec.readers:
        if reader.runtime in runtimes:
            cases = [limit for limit in reader.limits if holds.get(limit.when)]
            serious = [limit for limit in cases if limit.severity is not Severity.NOTE]
            found += [f"{reader.runtime} {reader.version} {limit.says}" for limit in serious]
            found += _shape_hindrances(reader, scheme, role, matrices, holds)
    missing = sorted(set(runtimes) - {reader.runtime for reader in spec.readers})
    return found + [f"{runtime} does not read {spec.name}" for runtime in missing]


def _conditions(scheme: Scheme, roles: Collection[Role], *, weight_only: bool, mixed: bool) -> dict[Condition, bool]:
    attention, experts = Role.ATTENTION in roles, Role.ROUTED_EXPERT in roles
    return {
        "asymmetric": not scheme.symmetric,
        "asymmetric_attention": attention and not scheme.symmetric,
        "attention": attention,
        "block_attention": attention and scheme.strategy is Strategy.BLOCK,
        "mixed": mixed,
        "weight_only_experts": experts and weight_only,
    }


def _shape_hindrances(
    reader: Reader,
    scheme: Scheme,
    role: Role,
    matrices: Collection[LocalMatrix],
    holds: Mapping[Condition, bool],
) -> list[str]:
    found = []
    for limit in reader.shapes:
        broken = _broken(limit, scheme, role, matrices) if limit.when is None or holds.get(limit.when) else None
        if broken is not None:
            size = f"{broken.in_features} inputs" if limit.size == "in" else f"{broken.out_features} outputs"
            found.append(f"{reader.runtime} {reader.version} {limit.says} ({role.value} {broken.projection}: {size})")
    return found


def _broken(limit: ShapeLimit, scheme: Scheme, role: Role, matrices: Collection[LocalMatrix]) -> LocalMatrix | None:
    """The first matrix that is not of the size it must be."""
    if role not in limit.roles or scheme.strategy not in limit.strategies:
        return None
    for matrix in matrices:
        sizes = _sizes(scheme, matrix.out_features, matrix.in_features)
        multiple = limit.multiple if isinstance(limit.multiple, int) else sizes[limit.multiple]
        if (limit.projections is None or matrix.projection in limit.projections) and sizes[limit.size] % multiple:
            return matrix
    return None


ROW_SPLIT = (OUTPUT, DOWN)  # matrices that tensor parallelism cuts along their inputs; all others along outputs
DEGREES = (1, 2, 4, 8)  # into which Llama 4's heads can be split


def local_matrix(linear: Linear, kv_heads: int, tp: int) -> LocalMatrix:
    """What one of `tp` GPUs holds of a matrix, rounded up; KV heads are repeated beyond their number."""
    parts = min(tp, kv_heads) if linear.projection in (KEY, VALUE) else tp
    rows, columns = (1, parts) if linear.projection in ROW_SPLIT else (parts, 1)
    return LocalMatrix(linear.projection, -(-linear.out_features // rows), -(-linear.in_features // columns))


Stored = tuple[FormatSpec, Scheme, Linear]
"""A quantized matrix, and how it is stored."""


def split_hindrances(stored: Iterable[Stored], kv_heads: int, tp: int) -> dict[str, list[str]]:
    """Why each runtime that serves these formats has no kernel for the sizes that `tp` GPUs get; an empty list: it has."""
    alike: dict[tuple[str, Scheme, Role], set[LocalMatrix]] = {}
    for spec, scheme, linear in stored:
        alike.setdefault((spec.name, scheme, linear.role), set()).add(local_matrix(linear, kv_heads, tp))
    found: dict[str, list[str]] = {}
    for (name, scheme, role), matrices in alike.items():
        holds = _conditions(scheme, {role}, weight_only=False, mixed=False)
        ordered = sorted(matrices, key=lambda matrix: (matrix.projection, matrix.out_features, matrix.in_features))
        for reader in load_format(name).readers:
            if reader.serves:
                reasons = found.setdefault(reader.runtime, [])
                reasons += _shape_hindrances(reader, scheme, role, ordered, holds)
    return found


def unservable(by_runtime: Mapping[str, list[str]]) -> bool:
    """Whether no runtime has kernels for an artifact."""
    return bool(by_runtime) and all(by_runtime.values())


def _sizes(scheme: Scheme, out_features: int, in_features: int) -> dict[str, int]:
    rows, columns = scheme.block_structure or (1, in_features)
    return {
        "out": out_features,
        "in": in_features,
        "pack": scheme.pack_factor,
        "group": scheme.group_columns(in_features),
        "rows": rows,
        "columns": columns,
    }


def _size(text: str, sizes: dict[str, int]) -> int:
    if text.isdigit():
        return int(text)
    dimension, _, divisor = text.partition("/")
    return -(-sizes[dimension] // (sizes[divisor] if divisor else 1))
