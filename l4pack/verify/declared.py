"""What a quantization_config says of every module, read by each runtime's own matching rule.

transformers (compressed-tensors `utils/match.py`): exact name, `re:` from the start, or class name; a target by name
comes before one by class. vLLM (`compressed_tensors/utils.py`): exact name or `re:` from the start; a target may also
be contained in the class name. SGLang: as vLLM, and a dotted suffix of the name is enough to ignore a module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from l4pack.artifact.kv_cache import declared_strategy
from l4pack.artifact.patterns import PatternError, pattern
from l4pack.artifact.stanza import Stanza, StanzaGroup
from l4pack.datafile import first_fault
from l4pack.errors import RecipeError
from l4pack.formats.configuration import read_inputs, read_scheme
from l4pack.formats.format import Format
from l4pack.formats.known import format_names, load_format
from l4pack.quant.scheme import Scheme
from l4pack.quant.suffixes import Suffix
from l4pack.recipe import KVStrategy
from l4pack.verify.findings import Findings

PATTERN_SECONDS = 20  # that all expressions of a stanza may take together
CLASSES = frozenset((
    "Linear", "Embedding", "LayerNorm", "SequentialLlama4TextExperts", "Llama4TextAttention", "Llama4TextDecoderLayer",
    "Llama4TextExperts", "Llama4TextMLP", "Llama4TextMoe", "Llama4TextRMSNorm", "Llama4TextL2Norm", "Llama4Router",
    "Llama4VisionModel", "Llama4VisionAttention", "Llama4VisionEncoder", "Llama4VisionEncoderLayer", "Llama4VisionMLP",
    "Llama4VisionMLP2", "Llama4VisionPixelShuffleMLP", "Llama4MultiModalProjector", "Llama4UnfoldConvolution",
))  # fmt: skip
"""Classes of modules in transformers, which an entry may name too."""


class StanzaReader(StrEnum):
    """Who reads the stanza."""

    TRANSFORMERS = "transformers"
    VLLM = "vLLM"
    SGLANG = "SGLang"


@dataclass(frozen=True)
class ConfigGroup:
    """One config group: the modules it targets, and the scheme and format it gives them (None: not verifiable)."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme | None
    format: Format | None
    observed: bool  # activations have scales in the file
    weight_only: bool  # activations are not quantized

    @property
    def kind(self) -> Suffix | Literal[""]:
        """The suffix that holds the weights, or nothing known."""
        return self.format.values.suffix if self.format else ""


@dataclass(frozen=True)
class Declared:
    """The parts of a stanza that say what is quantized, and how."""

    groups: tuple[ConfigGroup, ...]
    ignore: tuple[str, ...]
    kv_cache: bool
    kv_strategy: KVStrategy | None  # None where there is no KV cache scheme, or none that runtimes take

    def group(self, runtime: StanzaReader, module: str, classes: tuple[str, ...] = ("Linear",)) -> ConfigGroup | None:
        """The group whose scheme a runtime gives a module, or None where it takes the module as it is."""
        if self.ignored(runtime, module, classes):
            return None
        names, by_class = self._targets
        exact_first = names.exact.get(module)
        by_pattern = next((group for regex, group in names.patterns if regex.match(module)), None)
        if exact_first or by_pattern:
            return exact_first or by_pattern
        wanted: Callable[[str], bool] = (
            classes.__contains__
            if runtime is StanzaReader.TRANSFORMERS
            else lambda target: target.lower() in "parallellinear"
        )
        return next((group for target, group in by_class if wanted(target)), None)

    def ignored(self, runtime: StanzaReader, module: str, classes: tuple[str, ...] = ("Linear",)) -> bool:
        """Whether an ignore entry names the module."""
        names = self._ignored
        if module in names.exact or any(regex.match(module) for regex, _ in names.patterns):
            return True
        if runtime is StanzaReader.TRANSFORMERS:
            return any(name in names.exact for name in classes)
        if runtime is StanzaReader.SGLANG:
            parts = module.split(".")
            return any(".".join(parts[start:]) in names.exact for start in range(1, len(parts)))
        return False

    def idle(self, modules: Iterable[str]) -> list[tuple[str, str]]:
        """Entries, each with the list it stands in, that name no module and no class in any runtime."""
        modules = list(modules)
        suffixes = {
            ".".join(parts[start:]) for parts in (name.split(".") for name in modules) for start in range(len(parts))
        }
        lists = [
            ("ignore", self.ignore),
            *((f"config_groups.{group.name}.targets", group.targets) for group in self.groups),
        ]

        def names_something(entry: str) -> bool:
            if entry.startswith("re:"):
                return any(map(pattern(entry[3:]).match, modules))
            return entry in suffixes or entry in CLASSES

        return [(where, entry) for where, entries in lists for entry in entries if not names_something(entry)]

    @cached_property
    def _targets(self) -> tuple[_Names, list[tuple[str, ConfigGroup]]]:
        pairs = [(target, group) for group in self.groups for target in group.targets]
        return _Names(pairs), [(target, group) for target, group in pairs if "." not in target and ":" not in target]

    @cached_property
    def _ignored(self) -> _Names:
        return _Names([(entry, None) for entry in self.ignore])


class _Names:
    """Entries of an ignore or target list, exact names apart from regular expressions."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        pairs = list(pairs)
        self.exact: dict[str, Any] = {}
        for entry, value in pairs:
            self.exact.setdefault(entry, value)
        self.patterns = [(pattern(entry[3:]), value) for entry, value in pairs if entry.startswith("re:")]


def read_declared(stanza: Stanza, modules: Collection[str], found: Findings) -> Declared:
    """What a stanza declares; what can't be understood becomes findings of rules `stanza` and `scheme`.

    `modules` are all names that will be asked for: expressions are matched with them at once, within limits.
    """
    entries = _Entries(modules, found)
    groups = tuple(_group(group, entries, found) for group in stanza.groups)
    ignore = entries.read(stanza.ignore, "ignore")
    return Declared(groups, ignore, bool(stanza.kv_cache), declared_strategy(stanza.kv_cache))


def _group(group: StanzaGroup, entries: _Entries, found: Findings) -> ConfigGroup:
    where = f"config_groups.{group.name}"
    targets = entries.read(group.targets, f"{where}.targets")
    given = group.format
    form = load_format(given) if given in format_names() else None
    if form is None:
        found.error("scheme", where, f"format {given!r} is not one l4pack knows ({', '.join(format_names())})")
    scheme = _scheme(group.weights, where, found)
    activations = group.inputs
    observed = activations is not None and activations.get("dynamic") in (False, None, "local")
    if form is not None and scheme is not None and not _accepted(form, scheme, activations, where, found):
        scheme = None
    return ConfigGroup(group.name, targets, scheme, form, observed, weight_only=activations is None)


def _scheme(weights: Mapping[str, Any] | None, where: str, found: Findings) -> Scheme | None:
    if weights is None:
        found.error("scheme", where, "has no weights")
        return None
    try:
        return read_scheme(weights)
    except ValidationError as error:
        key, message = first_fault(error)
        found.error("scheme", f"{where}.weights{'.' * bool(key)}{key}", message)
        return None


def _accepted(form: Format, scheme: Scheme, activations: Mapping[str, Any] | None, where: str, found: Findings) -> bool:
    try:
        form.check_accepts(scheme, read_inputs(activations), where)
    except RecipeError as error:
        found.error("scheme", where, f"{error.message}; {error.hint}")
        return False
    return True


class _Entries:
    """Reads lists of names and regular expressions, until these have taken too long."""

    def __init__(self, modules: Collection[str], found: Findings) -> None:
        self._modules, self._found, self._taken = modules, found, 0.0

    def read(self, values: Iterable[Any], where: str) -> tuple[str, ...]:
        """The entries that are names, or expressions that can be matched; the others become findings."""
        good = []
        for value in values:
            try:
                self._check(value)
                good.append(value)
            except PatternError as error:
                self._found.error("stanza", where, f"{value!r:.80} {error.why}")
        return tuple(good)

    def _check(self, value: Any) -> None:
        if not isinstance(value, str):
            raise PatternError(str(value), "is no name and no regular expression")
        if value.startswith("re:"):
            if self._taken > PATTERN_SECONDS:
                raise PatternError(value, "was not tried: those before it took too long")
            begun = time.monotonic()
            try:
                pattern(value[3:]).prepare(self._modules)
            finally:
                self._taken += time.monotonic() - begun
