"""Reading an artifact's matrices back: which scheme a module has, and the weights its tensors stand for.

Any compressed-tensors artifact is read, whoever wrote it. Packed integers and FP8 go through this package's kernels,
every other format (int-quantized, nvfp4, mxfp4, activation-ordered groups) through compressed-tensors' own decompressor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from l4pack.artifact.patterns import matches, pattern
from l4pack.errors import L4packError
from l4pack.formats.configuration import read_scheme
from l4pack.formats.format import Format
from l4pack.formats.known import FORMATS
from l4pack.quant.scheme import Scheme, Strategy

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from torch import Tensor


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


def own_format(scheme: QuantizationScheme, format_name: str) -> tuple[Format, Scheme] | None:
    """The format and scheme of matrices that this package reads back itself; None where it doesn't."""
    form, weights = FORMATS.get(format_name), scheme.weights
    if form is None or weights is None:
        return None
    given = weights.model_dump(mode="json")
    if given.get("actorder") in ("group", "dynamic"):
        return None
    if given.get("strategy") != Strategy.GROUP:
        given["group_size"] = None  # compressed-tensors has -1 for whole rows
    try:
        own = read_scheme(given)
    except ValidationError:
        return None
    return (form, own) if form.decodes(own) else None


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
