"""Reading an artifact's matrices back: which scheme a module has, and the weights its tensors stand for.

Any compressed-tensors artifact is read, whoever wrote it. Packed integers and FP8 go through this package's kernels,
every other format (int-quantized, nvfp4, mxfp4, activation-ordered groups) through compressed-tensors' own decompressor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from l4pack.artifact.patterns import matches, pattern
from l4pack.errors import L4packError
from l4pack.quant.dequantize import dequantize
from l4pack.quant.floats import Float32Array
from l4pack.quant.grid import NumberType
from l4pack.quant.packing import packed_columns
from l4pack.quant.quantize import Quantized
from l4pack.quant.scheme import Scheme, Strategy

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from torch import Tensor

# A quantized module has a scale; the plain weight of an FP8 module alone does not tell.
SCALE_SUFFIXES = ("weight_scale", "weight_packed")
MODULE_SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
_OWN_STRATEGIES = {"pack-quantized": ("group", "channel"), "float-quantized": ("channel", "tensor", "block")}


class Quantization:
    """The `quantization_config` of an artifact."""

    def __init__(self, raw: Mapping[str, Any], modules: Collection[str] = ()) -> None:
        """Read the stanza of a config.json; no stanza means nothing is quantized. Raises L4packError.

        `modules` are those that will be asked for: expressions are matched with them at once.
        """
        stanza = raw.get("quantization_config") or raw.get("compression_config")
        self._groups: list[QuantizationScheme] = []
        self._ignore: list[str] = []
        self._format = "dense"
        if stanza:
            self._read(stanza, modules)

    def _read(self, stanza: Mapping[str, Any], modules: Collection[str]) -> None:
        if stanza.get("quant_method") != "compressed-tensors":
            raise L4packError(
                f"quant_method is {stanza.get('quant_method')!r}; l4pack reads compressed-tensors artifacts",
                hint="quantize the original checkpoint with `l4pack quantize`",
            )
        from compressed_tensors.quantization import QuantizationConfig
        from pydantic import ValidationError

        try:
            config = QuantizationConfig.model_validate(dict(stanza))
        except (ValidationError, ValueError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise L4packError(
                f"config.json: quantization_config: {first}", hint="quantize again, or mend the config"
            ) from error
        self._groups = list(config.config_groups.values())
        self._ignore = list(config.ignore or [])
        self._format = str(config.format)
        for entry in (*self._ignore, *(target for group in self._groups for target in group.targets)):
            if entry.startswith("re:"):
                pattern(entry[3:]).prepare(modules)

    def scheme(self, module: str) -> QuantizationScheme:
        """The scheme a quantized module was written with. Raises L4packError when no group names it.

        A group that names the module comes before one that takes the whole class, wherever it stands in the list.
        """
        if not any(matches(pattern, module) for pattern in self._ignore):
            named = (group for group in self._groups if any(matches(target, module) for target in group.targets))
            whole = (group for group in self._groups if "Linear" in group.targets)
            for group in chain(named, whole):
                return group
        raise L4packError(
            f"{module} has scales, but quantization_config gives it no scheme",
            hint="runtimes would load it wrongly: quantize again",
        )

    def format_of(self, scheme: QuantizationScheme) -> str:
        """The on-disk format of a scheme's tensors."""
        return str(scheme.format or self._format)


def own_scheme(scheme: QuantizationScheme, format_name: str) -> Scheme | None:
    """A compressed-tensors scheme in this package's words, or None when its kernels don't cover it."""
    weights = scheme.weights
    strategy = str(getattr(weights.strategy, "value", weights.strategy)) if weights else ""
    if weights is None or strategy not in _OWN_STRATEGIES.get(format_name, ()):
        return None
    kind = NumberType(str(getattr(weights.type, "value", weights.type)))
    ordered = str(getattr(weights.actorder, "value", weights.actorder)) in ("group", "dynamic")
    if weights.num_bits not in (4, 8) or ordered or (kind is NumberType.FLOAT) != (format_name == "float-quantized"):
        return None
    return Scheme(
        num_bits=weights.num_bits,
        type=kind,
        strategy=Strategy(strategy),
        group_size=weights.group_size if strategy == "group" else None,
        block_structure=tuple(weights.block_structure) if strategy == "block" else None,
        symmetric=weights.symmetric,
    )


def dequantized(
    tensors: Mapping[str, NDArray[Any]], scheme: Scheme, out_features: int, in_features: int, module: str
) -> Float32Array:
    """float32 [out_features, in_features] of a module's tensors by suffix. Raises L4packError on a wrong shape."""
    values = tensors["weight_packed" if scheme.grid.even else "weight"]
    zero_point = None if scheme.symmetric else tensors.get("weight_zero_point")
    scale = tensors["weight_scale"]
    width = packed_columns(in_features, scheme.num_bits) if scheme.grid.even else in_features
    _expect(values.shape, (out_features, width), f"{module}'s values")
    _expect(scale.reshape(-1).shape if scheme.strategy is Strategy.TENSOR else scale.shape,
            _scale_shape(scheme, out_features, in_features), f"{module}.weight_scale")  # fmt: skip
    if not scheme.symmetric and zero_point is None:
        raise L4packError(f"{module} is asymmetric but has no weight_zero_point", hint="quantize again")
    flat = scale.reshape(-1) if scheme.strategy is Strategy.TENSOR else scale
    return dequantize(Quantized(values, flat, zero_point), scheme, out_features, in_features)


def _scale_shape(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, ...]:
    if scheme.strategy is Strategy.TENSOR:
        return (1,)
    height = scheme.block_structure[0] if scheme.block_structure else 1
    return (-(-out_features // height), -(-in_features // scheme.group_columns(in_features)))


def _expect(shape: tuple[int, ...], wanted: tuple[int, ...], what: str) -> None:
    if shape != wanted:
        raise L4packError(
            f"{what} have shape {list(shape)}, the scheme makes it {list(wanted)}",
            hint="config.json and the weights don't belong together: quantize again",
        )


def decompressed(tensors: Mapping[str, Tensor], scheme: QuantizationScheme, format_name: str, module: str) -> Tensor:
    """The [out, in] weight of a module's tensors by suffix, by compressed-tensors. Raises L4packError."""
    from compressed_tensors.compressors import BaseCompressor

    try:
        compressor = BaseCompressor.get_value_from_registry(format_name)
        weight: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    except (KeyError, ValueError, RuntimeError, NotImplementedError, IndexError) as error:
        raise L4packError(
            f"{module}: format {format_name} can't be read ({str(error).splitlines()[0]})",
            hint="evaluate it with the tool that wrote it",
        ) from error
    return weight
