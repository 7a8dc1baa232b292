"""Whether a runtime has kernels for what each GPU gets of a quantized matrix, from the format files.

What a matrix's scheme is, is read from its tensors: those of an artifact and those planned say it alike.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Literal

from l4pack.budget.load import Setting
from l4pack.budget.subject import Kind, Subject
from l4pack.errors import UsageError
from l4pack.formats.float_quantized import FLOAT_QUANTIZED
from l4pack.formats.limits import DEGREES, Stored, split_hindrances
from l4pack.formats.pack_quantized import PACK_QUANTIZED
from l4pack.model.tensors import Linear, Role, catalogue
from l4pack.quant.grid import NumberType
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.quant.suffixes import Suffix

_BLOCK = (128, 128)


def check_split(subject: Subject, setting: Setting, runtime: str) -> None:
    """Raise UsageError when a runtime can't load the matrices split as the setting says, with the degrees it can."""
    reasons = _reasons(subject, setting.tp, setting.expert_parallel, runtime)
    if not reasons:
        return
    good = [str(tp) for tp in DEGREES if not _reasons(subject, tp, setting.expert_parallel, runtime)]
    hint = f"tp may be {', '.join(good)}" if good else "no number of GPUs will do: quantize with another recipe"
    raise UsageError(f"{subject.name} does not run at tp {setting.tp}: {reasons[0]}", hint=hint)


def _reasons(subject: Subject, tp: int, expert_parallel: bool, runtime: str) -> list[str]:
    stored = _stored(subject)
    whole = [item for item in stored if expert_parallel and item[2].role is Role.ROUTED_EXPERT]
    parts = [item for item in stored if item not in whole]
    heads, name = subject.config.text.num_key_value_heads, runtime.partition("-")[0]
    return [*split_hindrances(whole, heads, 1).get(name, ()), *split_hindrances(parts, heads, tp).get(name, ())]


@lru_cache(maxsize=8)
def _stored(subject: Subject) -> tuple[Stored, ...]:
    """One quantized matrix of each size, with its scheme."""
    modules: dict[tuple[Role, int | None, str], dict[str, list[Kind]]] = defaultdict(lambda: defaultdict(list))
    for kind in subject.kinds:
        modules[kind.role, kind.layer, kind.projection][kind.suffix].append(kind)
    one_expert = subject.config.text.model_copy(update={"num_local_experts": 1})  # all are of one size
    linears = {
        (linear.role, linear.layer, linear.projection): linear
        for linear in catalogue(subject.config.model_copy(update={"text": one_expert}), fused=False).linears
    }
    found: dict[tuple[object, ...], Stored] = {}
    for key, parts in modules.items():
        linear = linears.get((key[0], key[1] if key[1] is not None else -1, key[2]))
        for scale in parts.get(Suffix.SCALE, ()):
            scheme = None if linear is None else _scheme(linear, parts, scale)
            if linear is not None and scheme is not None and scale.form is not None:
                found[scheme, linear.role, linear.projection, linear.in_features] = (scale.form, scheme, linear)
    return tuple(found.values())


def _scheme(linear: Linear, parts: dict[str, list[Kind]], scale: Kind) -> Scheme | None:
    """The scheme of a matrix whose scale this is; None for one of another format, or of any size."""
    columns = scale.shape[1] if len(scale.shape) == 2 else 1
    if scale.form is FLOAT_QUANTIZED:
        if len(scale.shape) < 2 or (columns == 1 and scale.shape[0] == linear.out_features):
            return None  # a scale a channel or a matrix
        return Scheme(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.BLOCK, block_structure=_BLOCK)
    codes = PACK_QUANTIZED.values
    packed = next((kind for kind in parts.get(codes.suffix, ()) if kind.dtype == codes.dtype), None)
    if packed is None or len(packed.shape) != 2 or linear.in_features % columns:
        return None
    bits: Literal[4, 8] = 4 if packed.shape[1] <= -(-linear.in_features // 8) else 8
    group, symmetric = linear.in_features // columns, Suffix.ZERO_POINT not in parts
    if columns == 1 or group % 8 or group > 1024:
        return Scheme(num_bits=bits, strategy=Strategy.CHANNEL, symmetric=symmetric)
    return Scheme(num_bits=bits, group_size=group, symmetric=symmetric)
