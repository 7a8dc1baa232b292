"""What runtimes can't do with a quantized matrix: cases they refuse or misread, sizes they have no kernel for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from l4pack.formats.format import Format, matrix_sizes
from l4pack.formats.readers import Condition, FormatReader, Severity, ShapeLimit
from l4pack.model.parts import DOWN, KEY, OUTPUT, VALUE
from l4pack.model.tensors import Linear, Role
from l4pack.quant.scheme import Scheme, Strategy

_SIZES = {"in": "{} inputs", "out": "{} outputs", "group": "groups of {}"}


@dataclass(frozen=True, slots=True)
class LocalMatrix:
    """The part of a matrix that one GPU holds: its projection (`down_proj`), and `[out_features, in_features]` there."""

    projection: str
    out_features: int
    in_features: int


def reader_limits(
    form: Format, scheme: Scheme, roles: Collection[Role], *, weight_only: bool, mixed: bool
) -> list[str]:
    """What runtimes can't do with matrices of these roles under a scheme, each as `RUNTIME VERSION what`.

    `mixed` says that the artifact has other schemes beside this one.
    """
    holds = _conditions(scheme, roles, weight_only=weight_only, mixed=mixed)
    limits = [(reader, limit) for reader in form.readers if reader.container is None for limit in reader.limits]
    return [f"{reader.runtime} {reader.version} {limit.says}" for reader, limit in limits if holds.get(limit.when)]


def hindrances(
    form: Format,
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
    for reader in form.readers:
        if reader.runtime in runtimes:
            cases = [limit for limit in reader.limits if holds.get(limit.when)]
            serious = [limit for limit in cases if limit.severity is not Severity.NOTE]
            found += [f"{reader.runtime} {reader.version} {limit.says}" for limit in serious]
            found += _shape_hindrances(reader, scheme, role, matrices, holds)
    missing = sorted(set(runtimes) - {reader.runtime for reader in form.readers})
    return found + [f"{runtime} does not read {form.name}" for runtime in missing]


def _conditions(scheme: Scheme, roles: Collection[Role], *, weight_only: bool, mixed: bool) -> dict[Condition, bool]:
    attention, experts = Role.ATTENTION in roles, Role.ROUTED_EXPERT in roles
    return {
        "asymmetric": not scheme.symmetric,
        "asymmetric_attention": attention and not scheme.symmetric,
        "asymmetric_int8": scheme.num_bits == 8 and not scheme.symmetric,
        "attention": attention,
        "block_attention": attention and scheme.strategy is Strategy.BLOCK,
        "mixed": mixed,
        "weight_only_experts": experts and weight_only,
    }


def _shape_hindrances(
    reader: FormatReader,
    scheme: Scheme,
    role: Role,
    matrices: Collection[LocalMatrix],
    holds: Mapping[Condition, bool],
) -> list[str]:
    found = []
    for limit in reader.shapes:
        broken = _broken(limit, scheme, role, matrices) if limit.when is None or holds.get(limit.when) else None
        if broken is not None:
            what = f"{role.value} {broken.projection}: {_SIZES[limit.size].format(_size(limit, scheme, broken))}"
            found.append(f"{reader.runtime} {reader.version} {limit.says} ({what})")
    return found


def _size(limit: ShapeLimit, scheme: Scheme, matrix: LocalMatrix) -> int:
    """What must be a multiple."""
    return matrix_sizes(scheme, matrix.out_features, matrix.in_features)[limit.size]


def _broken(limit: ShapeLimit, scheme: Scheme, role: Role, matrices: Collection[LocalMatrix]) -> LocalMatrix | None:
    """The first matrix that is not of the size it must be."""
    if role not in limit.roles or scheme.strategy not in limit.strategies:
        return None
    for matrix in matrices:
        sizes = matrix_sizes(scheme, matrix.out_features, matrix.in_features)
        multiple = limit.multiple if isinstance(limit.multiple, int) else sizes[limit.multiple]
        if (limit.projections is None or matrix.projection in limit.projections) and sizes[limit.size] % multiple:
            return matrix
    return None


ROW_SPLIT = (OUTPUT, DOWN)  # tensor parallelism cuts these along their inputs; all others along outputs
DEGREES = (1, 2, 4, 8)  # into which Llama 4's heads can be split


def local_matrix(linear: Linear, kv_heads: int, tp: int) -> LocalMatrix:
    """What one of `tp` GPUs holds of a matrix, rounded up; KV heads are repeated beyond their number."""
    parts = min(tp, kv_heads) if linear.projection in (KEY, VALUE) else tp
    rows, columns = (1, parts) if linear.projection in ROW_SPLIT else (parts, 1)
    return LocalMatrix(linear.projection, -(-linear.out_features // rows), -(-linear.in_features // columns))


Stored = tuple[Format, Scheme, Linear]
"""A quantized matrix, and how it is stored."""


def split_hindrances(stored: Iterable[Stored], kv_heads: int, tp: int) -> dict[str, list[str]]:
    """Why each runtime that serves these formats has no kernel for the sizes that `tp` GPUs get; an empty list: it has."""
    alike: dict[tuple[Format, Scheme, Role], set[LocalMatrix]] = {}
    for form, scheme, linear in stored:
        alike.setdefault((form, scheme, linear.role), set()).add(local_matrix(linear, kv_heads, tp))
    found: dict[str, list[str]] = {}
    for (form, scheme, role), matrices in alike.items():
        holds = _conditions(scheme, {role}, weight_only=False, mixed=False)
        ordered = sorted(matrices, key=lambda matrix: (matrix.projection, matrix.out_features, matrix.in_features))
        for reader in form.readers:
            if reader.serves and reader.container is None:
                reasons = found.setdefault(reader.runtime, [])
                reasons += _shape_hindrances(reader, scheme, role, ordered, holds)
    return found


def unservable(by_runtime: Mapping[str, list[str]]) -> bool:
    """Whether no runtime has kernels for an artifact."""
    return bool(by_runtime) and all(by_runtime.values())
