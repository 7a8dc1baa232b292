"""Reading an artifact's matrices back: which scheme a module has, and the weights its tensors stand for.

Any compressed-tensors artifact is read, whoever wrote it. Packed integers, FP8 and FP4 go through this package's kernels,
every other format (int-quantized, mxfp8, activation-ordered groups) through compressed-tensors' own decompressor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from l4pack.artifact.patterns import matches, pattern
from l4pack.artifact.stanza import METHOD, MIXED, StanzaGroup, read_stanza
from l4pack.errors import L4packError
from l4pack.formats.configuration import SCHEME_KEYS, as_compressed_tensors, read_scheme
from l4pack.formats.format import Format
from l4pack.formats.known import FORMATS
from l4pack.formats.super_blocks import GGML_Q4_K
from l4pack.quant.scheme import Scheme, Strategy

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from torch import Tensor


@dataclass(frozen=True)
class Given:
    """What a config group gives its modules: the format on disk, and the scheme as l4pack has it."""

    group: str
    format: str
    own: tuple[Format, Scheme] | None  # None where l4pack does not read the tensors itself
    schemes: Callable[[], Mapping[str, QuantizationScheme]]

    @property
    def scheme(self) -> QuantizationScheme:
        """The scheme as compressed-tensors has it, which brings torch along. Raises L4packError."""
        return self.schemes()[self.group]


class Quantization:
    """What a stanza makes of each module."""

    def __init__(self, given: Mapping[str, Any], modules: Collection[str] = ()) -> None:
        """Read a stanza; an empty one means that nothing is quantized. Raises L4packError.

        `modules` are those that will be asked for: expressions are matched with them at once. What a group says of a
        format that is read here need not be asked of compressed-tensors; `check` does that of all.
        """
        stanza = read_stanza(given)
        self._ignore = [str(entry) for entry in stanza.ignore]
        self._groups: list[tuple[list[str], Given]] = []
        self._schemes = cache(lambda: _schemes(given))
        if given:
            _check_method(given)
            self._groups = [([str(one) for one in group.targets], self._given(group)) for group in stanza.groups]
        for entry in (*self._ignore, *(target for targets, _ in self._groups for target in targets)):
            if entry.startswith("re:"):
                pattern(entry[3:]).prepare(modules)

    def _given(self, group: StanzaGroup) -> Given:
        form = group.format or "dense"
        own = _own_as_stated(form, group.weights) or own_format(self._schemes()[group.name], form)
        return Given(group.name, form, own, self._schemes)

    def check(self) -> None:
        """Raise L4packError for a stanza that compressed-tensors does not take."""
        if self._groups:
            self._schemes()

    @property
    def reads_all(self) -> bool:
        """Whether this package reads every group's matrices itself."""
        return all(given.own is not None for _, given in self._groups)

    def scheme(self, module: str) -> Given:
        """The scheme a quantized module was written with. Raises L4packError when no group names it.

        A group that names the module comes before one that takes the whole class, wherever it stands in the list.
        """
        if not any(matches(entry, module) for entry in self._ignore):
            named = (given for targets, given in self._groups if any(matches(target, module) for target in targets))
            whole = (given for targets, given in self._groups if "Linear" in targets)
            for given in chain(named, whole):
                return given
        raise L4packError(
            f"{module} has scales, but quantization_config gives it no scheme",
            hint="runtimes would load it wrongly: quantize again",
        )


def _check_method(given: Mapping[str, Any]) -> None:
    if given.get("quant_method") != METHOD:
        raise L4packError(
            f"quant_method is {given.get('quant_method')!r}; l4pack reads compressed-tensors artifacts",
            hint="quantize the original checkpoint with `l4pack quantize`",
        )


def _schemes(given: Mapping[str, Any]) -> dict[str, QuantizationScheme]:
    """Every group's scheme by compressed-tensors' own rules, what the file leaves out filled in. Raises L4packError."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return dict(QuantizationConfig.model_validate(_as_checked(given)).config_groups)
    except (ValidationError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise L4packError(
            f"config.json: quantization_config: {first}", hint="quantize again, or mend the config"
        ) from error


def _as_checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """A stanza in words that compressed-tensors has; l4pack's own format is not among them."""
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping):
        return dict(given)
    form = {"format": MIXED} if given.get("format") == GGML_Q4_K.name else {}
    named = {
        name: as_compressed_tensors(group) if _is_own(group, given.get("format")) else group
        for name, group in groups.items()
    }
    return {**given, **form, "config_groups": named}


def _is_own(group: Any, form: Any) -> bool:
    return isinstance(group, Mapping) and (group.get("format") or form) == GGML_Q4_K.name and "weights" in group


def _own_as_stated(format_name: str, weights: Mapping[str, Any] | None) -> tuple[Format, Scheme] | None:
    """The same as `own_format` of weights that leave nothing to be filled in, as l4pack writes them; None of others."""
    if weights is None or not weights.keys() >= {"actorder", *SCHEME_KEYS}:
        return None
    return _own(format_name, weights)


def own_format(scheme: QuantizationScheme, format_name: str) -> tuple[Format, Scheme] | None:
    """The format and scheme of matrices that this package reads back itself; None where it doesn't."""
    return None if scheme.weights is None else _own(format_name, scheme.weights.model_dump(mode="json"))


def _own(format_name: str, weights: Mapping[str, Any]) -> tuple[Format, Scheme] | None:
    form, given = FORMATS.get(format_name), dict(weights)
    if form is None or given.get("actorder") in ("group", "dynamic"):
        return None
    if form.accepts.scale_dtype is not None:
        given["scale_dtype"] = form.accepts.scale_dtype.value
    if given.get("strategy") not in (Strategy.GROUP, Strategy.TENSOR_GROUP):
        given["group_size"] = None  # compressed-tensors has -1 for whole rows
    try:
        own = read_scheme(given)
    except ValidationError:
        return None
    return (form, own) if form.decodes(own) else None


def decompressed(tensors: Mapping[str, Tensor], given: Given, module: str) -> Tensor:
    """The [out, in] weight of a module's tensors by suffix, by compressed-tensors. Raises L4packError."""
    from compressed_tensors.compressors import BaseCompressor

    try:
        compressor = BaseCompressor.get_value_from_registry(given.format)
        weight: Tensor = compressor.decompress(dict(tensors), given.scheme)["weight"]
    except (KeyError, ValueError, RuntimeError, NotImplementedError, IndexError) as error:
        raise L4packError(
            f"{module}: format {given.format} can't be read ({str(error).splitlines()[0]})",
            hint="evaluate it with the tool that wrote it",
        ) from error
    return weight
