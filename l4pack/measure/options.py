"""What a matrix may be given: every scheme that a target runtime reads, under the name a recipe would call it by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from l4pack.errors import UsageError
from l4pack.formats.configuration import Activations
from l4pack.formats.float_quantized import FLOAT_QUANTIZED
from l4pack.formats.fp4 import MXFP4_PACK_QUANTIZED, NVFP4_PACK_QUANTIZED
from l4pack.formats.known import load_format
from l4pack.formats.limits import reader_limits, split_hindrances, unservable
from l4pack.formats.pack_quantized import PACK_QUANTIZED
from l4pack.formats.super_blocks import GGML_Q4_K
from l4pack.model.config import Llama4Config
from l4pack.model.tensors import QUANTIZABLE, Linear, Role, catalogue
from l4pack.quant.grid import NumberType, ScaleDtype
from l4pack.quant.scheme import Observer, Strategy
from l4pack.recipe import GptqOptions, Method, RecipeScheme

GROUPS = (32, 64, 128)
ROUNDED = "-rtn"  # ends the name of an option that is only rounded where the usual one is solved
RUNTIME = "vllm"


def _int4(group: int, *, calibrated: bool) -> RecipeScheme:
    return RecipeScheme(
        format=PACK_QUANTIZED.name,
        num_bits=4,
        group_size=group,
        observer=Observer.MSE,
        method=Method.GPTQ if calibrated else Method.RTN,
        gptq=GptqOptions(sweeps=4) if calibrated else None,
    )


def _int8(group: int) -> RecipeScheme:
    return RecipeScheme(format=PACK_QUANTIZED.name, num_bits=8, group_size=group)


def _fp4(form: str, strategy: Strategy, group: int) -> RecipeScheme:
    return RecipeScheme(
        format=form,
        num_bits=4,
        type=NumberType.FLOAT,
        strategy=strategy,
        group_size=group,
        observer=Observer.MSE,
        method=Method.GPTQ,
        gptq=GptqOptions(sweeps=4),
    )


def _q4_k(*, calibrated: bool) -> RecipeScheme:
    return RecipeScheme(
        format=GGML_Q4_K.name,
        num_bits=4,
        scale_dtype=ScaleDtype.Q4_K,
        method=Method.GPTQ if calibrated else Method.RTN,
        gptq=GptqOptions(sweeps=4) if calibrated else None,
    )


_FP8 = RecipeScheme(
    format=FLOAT_QUANTIZED.name,
    num_bits=8,
    type=NumberType.FLOAT,
    strategy=Strategy.CHANNEL,
    activations=Activations.DYNAMIC_TOKEN,
)
_FP8_BLOCK = RecipeScheme(
    format=FLOAT_QUANTIZED.name,
    num_bits=8,
    type=NumberType.FLOAT,
    strategy=Strategy.BLOCK,
    block_structure=(128, 128),
    activations=Activations.DYNAMIC_GROUP,
)
OPTIONS: dict[str, RecipeScheme] = {
    **{f"int4-g{group}": _int4(group, calibrated=True) for group in GROUPS},
    **{f"int4-g{group}{ROUNDED}": _int4(group, calibrated=False) for group in GROUPS},
    **{f"int8-g{group}": _int8(group) for group in GROUPS},
    "fp8": _FP8,
    "fp8-block": _FP8_BLOCK,
    "nvfp4": _fp4(NVFP4_PACK_QUANTIZED.name, Strategy.TENSOR_GROUP, 16),
    "mxfp4": _fp4(MXFP4_PACK_QUANTIZED.name, Strategy.GROUP, 32),
    "q4_k": _q4_k(calibrated=True),
    f"q4_k{ROUNDED}": _q4_k(calibrated=False),
}
"""Every option by name, BF16 aside, which costs nothing."""
NAMED_ONLY = ("nvfp4", "mxfp4", "q4_k", *(name for name in OPTIONS if name.endswith(ROUNDED)))
"""Options that are measured where they are named, because each takes its time: 4-bit floats are for Blackwell, and
llama.cpp and MLX load MXFP4 too; Q4_K is llama.cpp's alone. What is only rounded is for attention, in recipes that do without
a calibration."""
FOR_CONTAINERS = {
    "gguf": ("mxfp4", "q4_k", "int4-g32", "int8-g32"),
    "mlx": (
        "mxfp4",
        *(f"int4-g{group}" for group in reversed(GROUPS)),
        *(f"int8-g{group}" for group in reversed(GROUPS)),
    ),
}
"""What is worth measuring for the runtimes of a container: larger groups take as many bytes in ggml's blocks."""


@dataclass(frozen=True)
class MeasureOptions:
    """The options of one measurement: schemes by name, and the names each role is given."""

    schemes: Mapping[str, RecipeScheme]
    by_role: Mapping[Role, tuple[str, ...]]

    @property
    def calibrated(self) -> bool:
        """Whether any is solved for a text."""
        return any(scheme.calibrated for scheme in self.schemes.values())


def options_for(config: Llama4Config, wanted: Sequence[str] = ()) -> MeasureOptions:
    """The options that the matrices of a model can be given; `wanted` names some, none means all but `NAMED_ONLY`.

    Raises UsageError.
    """
    unknown = [name for name in wanted if name not in OPTIONS]
    if unknown:
        raise UsageError(f"'{unknown[0]}' is not an option", hint=f"options: {', '.join(OPTIONS)}")
    chosen = {
        name: scheme for name, scheme in OPTIONS.items() if (not wanted and name not in NAMED_ONLY) or name in wanted
    }
    by_role = {role: _of_role(config, role, chosen) for role in QUANTIZABLE}
    by_role = {role: names for role, names in by_role.items() if names}
    used = {name for names in by_role.values() for name in names}
    if not used:
        raise UsageError(
            f"no matrix of this model can be given {', '.join(chosen)}", hint="its shapes don't divide into the groups"
        )
    return MeasureOptions({name: scheme for name, scheme in chosen.items() if name in used}, by_role)


def family(option: str) -> str:
    """The kind of number: `int4`, `int8`, `fp8`, `nvfp4`."""
    return option.partition("-")[0]


def bits(scheme: RecipeScheme) -> float:
    """Bits a weight, scales of groups included."""
    scale = 8 if scheme.coded_scales else 16  # of Q4_K: 16 bytes for eight groups
    return scheme.num_bits + (scale / scheme.group_size if scheme.group_size else 0)


def _of_role(config: Llama4Config, role: Role, chosen: Mapping[str, RecipeScheme]) -> tuple[str, ...]:
    linears = [linear for linear in catalogue(config).linears if linear.role is role]
    if not linears:
        return ()
    heads = config.text.num_key_value_heads
    return tuple(name for name, scheme in chosen.items() if _fits(name, scheme, linears, heads))


def _fits(name: str, scheme: RecipeScheme, linears: Sequence[Linear], kv_heads: int) -> bool:
    """Whether a role's matrices can be given an option that some runtime could serve on one GPU."""
    role = linears[0].role
    if role is not Role.ATTENTION and name.endswith(ROUNDED):
        return False
    if any(linear.in_features % scheme.column_multiple() for linear in linears):
        return False
    form, weight_only = load_format(scheme.format), scheme.activations is Activations.NONE
    if unservable(split_hindrances(((form, scheme, linear) for linear in linears), kv_heads, tp=1)):
        return False
    limits = reader_limits(form, scheme, {role}, weight_only=weight_only, mixed=False)
    return not any(limit.startswith(RUNTIME) for limit in limits)
