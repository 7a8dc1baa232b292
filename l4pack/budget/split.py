"""Whether a runtime has kernels for what each GPU gets of a quantized matrix, from the format files.

What a matrix's scheme is, is read from its tensors: those of an artifact and those planned say it alike.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

from l4pack.budget.load import Setting
from l4pack.budget.subject import Subject
from l4pack.errors import UsageError
from l4pack.formats.format import Format
from l4pack.formats.limits import DEGREES, Stored, split_hindrances
from l4pack.model.tensors import Role, catalogue


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
    modules: dict[tuple[Role, int | None, str, Format], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for kind in subject.kinds:
        if kind.form is not None:
            modules[kind.role, kind.layer, kind.projection, kind.form][kind.suffix] = kind.shape
    one_expert = subject.config.text.model_copy(update={"num_local_experts": 1})  # all are of one size
    linears = {
        (linear.role, linear.layer, linear.projection): linear
        for linear in catalogue(subject.config.model_copy(update={"text": one_expert}), fused=False).linears
    }
    found: dict[tuple[object, ...], Stored] = {}
    for (role, layer, projection, form), shapes in modules.items():
        linear = linears.get((role, -1 if layer is None else layer, projection))
        scheme = None if linear is None else form.told_by(shapes, linear.out_features, linear.in_features)
        if linear is not None and scheme is not None:
            found[scheme, role, projection, linear.in_features] = (form, scheme, linear)
    return tuple(found.values())
