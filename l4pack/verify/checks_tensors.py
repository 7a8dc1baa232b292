"""Checks of names, dtypes and shapes: every tensor the runtimes expect, and none besides.

What a module is (packed integers, FP8, plain) is read from the file alone, and then held against what the stanza makes
of it in each runtime.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l4pack.artifact.kv_cache import cache_limits, scale_names, scale_shape
from l4pack.checkpoint.exports import WEIGHT_DTYPES
from l4pack.checkpoint.header import TensorEntry
from l4pack.errors import SourceError
from l4pack.formats.format import Format
from l4pack.formats.known import format_of
from l4pack.formats.limits import reader_limits, split_hindrances, unservable
from l4pack.model.names import classify, split_suffix
from l4pack.model.parts import FUSED_MODULES, VISION_MODEL
from l4pack.model.tensors import Linear, Role, TensorSpec
from l4pack.quant.dtypes import NAMES
from l4pack.quant.scheme import Scheme
from l4pack.quant.suffixes import Suffix
from l4pack.recipe import KVStrategy
from l4pack.verify.declared import ConfigGroup, Declared, StanzaReader
from l4pack.verify.findings import Findings
from l4pack.verify.opened import OpenedArtifact

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l4pack.quant.quantized import Quantized

PLAIN = "plain"
_TOGETHER = {name: fused for fused, names in FUSED_MODULES.items() for name in names}

ModuleTensors = Mapping[str, TensorEntry]  # suffix -> tensor


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix whose tensors have the names, dtypes and shapes they should."""

    linear: Linear
    form: Format
    scheme: Scheme
    parts: ModuleTensors

    @property
    def values(self) -> str:
        """The tensor with the codes."""
        return self.parts[self.form.values.suffix].name

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> Quantized:
        """Codes, scales and zero points of its arrays by suffix."""
        linear = self.linear
        return self.form.decode(arrays, self.scheme, linear.out_features, linear.in_features, linear.module)


@dataclass(frozen=True)
class FoundTensors:
    """What there is to read: quantized matrices, plain matrices, and all other tensors by name."""

    matrices: tuple[Matrix, ...]
    plain: tuple[Linear, ...]
    others: tuple[TensorSpec, ...]
    kv_scales: tuple[str, ...]
    modules: int


class _Examiner:
    def __init__(self, artifact: OpenedArtifact, declared: Declared, found: Findings) -> None:
        self.artifact, self.declared, self.found = artifact, declared, found
        self.left: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
        for entry in artifact.entries.values():
            module, suffix = split_suffix(entry.name)
            self.left[module][suffix] = entry
        self.matrices: list[Matrix] = []
        self.plain: list[Linear] = []
        self.shown: dict[str, tuple[Linear, str]] = {}
        self.fused: set[str] = set()  # modules `...experts` with fused tensors

    def linear(self, linear: Linear) -> None:
        """A matrix that may be quantized."""
        parts = self.left.pop(linear.module, {})
        bias = parts.pop("bias", None)
        if bias is not None:
            self.left[linear.module]["bias"] = bias  # checked with the other tensors
        kind = _kind(parts)
        self._agree(linear.module, kind)
        if kind == PLAIN:
            self._plain(linear, parts)
        elif kind is None:
            self._absent(linear, parts)
        else:
            self._quantized(linear, kind, parts)

    def _plain(self, linear: Linear, parts: ModuleTensors) -> None:
        self.shown[linear.module] = (linear, PLAIN)
        self.unexpected(entry.name for suffix, entry in parts.items() if suffix != Suffix.WEIGHT)
        if self.right(parts[Suffix.WEIGHT], WEIGHT_DTYPES, (linear.out_features, linear.in_features)):
            self.plain.append(linear)

    def _absent(self, linear: Linear, parts: ModuleTensors) -> None:
        if not self.artifact.unreadable and _experts(linear) not in self.fused:
            group = self.declared.group(StanzaReader.TRANSFORMERS, linear.module)
            suffix = group.kind if group else Suffix.WEIGHT
            self.found.error("missing", f"{linear.module}.{suffix}", "the matrix is not in the artifact")
        self.unexpected(entry.name for entry in parts.values())

    def _quantized(self, linear: Linear, kind: str, parts: ModuleTensors) -> None:
        group = self._group(linear.module, kind)
        self.shown[linear.module] = (linear, group.name if group else kind)
        if group is None or group.format is None or group.scheme is None:
            return
        scheme = group.scheme
        size = linear.out_features, linear.in_features
        expert = linear.role is Role.ROUTED_EXPERT
        expected = group.format.stored(scheme, *size, "BF16", observed=group.observed, expert=expert)
        floats = {piece.suffix for piece in group.format.pieces if piece.dtype == "scale"}
        suffixes = {tensor.suffix for tensor in expected}
        good = not self.unexpected(entry.name for suffix, entry in parts.items() if suffix not in suffixes)
        for tensor in expected:
            dtypes = WEIGHT_DTYPES if tensor.suffix in floats else (tensor.dtype,)
            good &= self._stored(
                f"{linear.module}.{tensor.suffix}", parts.get(tensor.suffix), dtypes, tensor.shape, group
            )
        if good:
            self.matrices.append(Matrix(linear, group.format, scheme, parts))

    def _stored(
        self, name: str, entry: TensorEntry | None, dtypes: tuple[str, ...], shape: tuple[int, ...], group: ConfigGroup
    ) -> bool:
        """Whether a tensor of a quantized matrix is there and right."""
        if entry is not None:
            return self.right(entry, dtypes, shape, f" ({_told(group)})")
        if not self.artifact.unreadable:
            self.found.error("missing", name, f"config_groups.{group.name} needs it")
        return False

    def _group(self, module: str, kind: str) -> ConfigGroup | None:
        """The group to check a quantized module by: what its runtimes take, else any that writes such tensors."""
        for runtime in StanzaReader:
            group = self.declared.group(runtime, module)
            if group is not None:
                if group.format is not None and group.format.name != kind:
                    self.found.error("ignore", module, f"is {kind} in the file, {group.format.name} in {group.name}")
                    return None
                return group
        return next((group for group in self.declared.groups if group.format and group.format.name == kind), None)

    def _agree(self, module: str, kind: str | None) -> None:
        """Hold the file against what each runtime makes of the stanza."""
        if kind is None or not self.declared.groups:
            return
        quantized = kind != PLAIN
        wrong = [runtime for runtime in StanzaReader if (self.declared.group(runtime, module) is not None) != quantized]
        if not wrong:
            return
        if not quantized:
            why = "is not quantized, but no ignore entry names it"
        elif self.declared.ignored(wrong[0], module):
            why = "is quantized, but an ignore entry names it"
        else:
            why = "is quantized, but no target names it"
        self.found.error("ignore", module, f"{why} ({_runtimes(wrong)})")

    def kept(self, spec: TensorSpec) -> bool:
        """A tensor that is never quantized; returns whether it can be read as such."""
        module, suffix = split_suffix(spec.name)
        parts = self.left.get(module, {})
        entry = parts.pop(suffix, None)
        if suffix == Suffix.WEIGHT and len(spec.shape) == 2 and spec.role is not Role.EMBEDDING:
            self._never_quantized(spec, module, entry, parts)
        if entry is None:
            if not self.artifact.unreadable and Suffix.PACKED not in parts:
                self.found.error("missing", spec.name, f"{spec.role.value} tensor is not in the artifact")
            return False
        return self.right(entry, WEIGHT_DTYPES, spec.shape)

    def _never_quantized(self, spec: TensorSpec, module: str, entry: TensorEntry | None, parts: ModuleTensors) -> None:
        held = {**parts, Suffix.WEIGHT: entry} if entry else parts
        if Suffix.SCALE in parts or _format_of(held) is not None:
            self.found.error("ignore", module, f"is quantized, no runtime reads a quantized {spec.role.value}")
        classes = ("Llama4Router", "Linear") if spec.role is Role.ROUTER else ("Linear",)
        readers = [(StanzaReader.TRANSFORMERS, classes)]
        if spec.role is Role.VISION and ".mlp." in module:
            readers.append((StanzaReader.SGLANG, ("Linear",)))
        wrong = [runtime for runtime, names in readers if self.declared.group(runtime, module, names) is not None]
        if wrong:
            self.found.error("ignore", module, f"is not quantized, but no ignore entry names it ({_runtimes(wrong)})")

    def right(self, entry: TensorEntry, dtypes: tuple[str, ...], shape: tuple[int, ...], note: str = "") -> bool:
        """Whether dtype and shape are as they should be; a finding each when not."""
        if entry.dtype not in dtypes:
            self.found.error("dtype", entry.name, f"is {entry.dtype}, should be {' or '.join(dtypes)}{note}")
        if entry.shape != shape:
            self.found.error("shape", entry.name, f"is {list(entry.shape)}, should be {list(shape)}{note}")
        return entry.dtype in dtypes and entry.shape == shape

    def unexpected(self, names: Iterable[str]) -> bool:
        """Findings for names no runtime expects; returns whether there were any."""
        found = False
        for name in names:
            found = True
            self.found.error("unexpected", name, _why_unexpected(name))
        return found


def examine(artifact: OpenedArtifact, declared: Declared, found: Findings) -> FoundTensors:
    """Check every name, dtype and shape, and list what can be read for a closer look."""
    layout = artifact.layout
    if layout.naming != artifact.canonical:
        message = f"names begin with '{layout.naming.text}', runtimes expect '{artifact.canonical.text}'"
        found.error("naming", f"{layout.naming.text}*", message)
    examiner = _Examiner(artifact, declared, found)
    _check_fused(examiner)
    for linear in layout.linears:
        examiner.linear(linear)
    weights = {linear.tensor for linear in layout.linears}
    others = tuple(spec for spec in layout.tensors if spec.name not in weights and examiner.kept(spec))
    kv_scales = _take_kv_scales(examiner)
    examiner.unexpected(sorted(entry.name for parts in examiner.left.values() for entry in parts.values()))
    _check_together(examiner.shown, found)
    for where, entry in declared.idle(artifact.modules):
        found.error("ignore", where, f"{entry!r:.80} names nothing in this model: is it misspelt?")
    _check_readers(examiner, declared, found)
    _check_sizes(examiner, declared, found)
    _check_dtypes(artifact, examiner.plain, others, found)
    return FoundTensors(tuple(examiner.matrices), tuple(examiner.plain), others, kv_scales, len(layout.linears))


def _kind(parts: ModuleTensors) -> str | None:
    """What the file shows a module to be: a format's name, `plain`, or None when its weights are not there."""
    form = _format_of(parts)
    if form is not None:
        return form.name
    return PLAIN if Suffix.WEIGHT in parts else None


def _format_of(parts: ModuleTensors) -> Format | None:
    return format_of({suffix: entry.dtype for suffix, entry in parts.items()})


def _check_fused(examiner: _Examiner) -> None:
    """Fused experts are told once for a tensor; their experts are then not missed one by one."""
    for module in [module for module in examiner.left if _is_fused(module)]:
        examiner.fused.add(module.rpartition(".")[0])
        for entry in examiner.left.pop(module).values():
            message = "experts are fused: transformers runs on random experts, vLLM can't read them packed"
            examiner.found.error("fused", entry.name, message)


def _is_fused(module: str) -> bool:
    try:
        place = classify(module)
    except SourceError:
        return False
    return place.role is Role.ROUTED_EXPERT and place.expert is None


def _experts(linear: Linear) -> str:
    """The module that a routed expert lies in."""
    return linear.module.rpartition(f".{linear.expert}.")[0]


def _take_kv_scales(examiner: _Examiner) -> tuple[str, ...]:
    """KV-cache scales of the text model's attention, when the stanza has a scheme for them."""
    if not examiner.declared.kv_cache:
        return ()
    names = []
    text = examiner.artifact.config.text
    shape = scale_shape(examiner.declared.kv_strategy or KVStrategy.TENSOR, text.num_key_value_heads)
    for layer in range(text.num_hidden_layers):
        for name in scale_names(examiner.artifact.layout.naming, layer):
            module, suffix = split_suffix(name)
            entry = examiner.left.get(module, {}).pop(suffix, None)
            if entry is None and not examiner.artifact.unreadable:
                examiner.found.warning("kv-scale", name, "is missing: runtimes take 1.0")
            elif entry is not None and examiner.right(entry, WEIGHT_DTYPES, shape):
                names.append(name)
    return tuple(names)


def _why_unexpected(name: str) -> str:
    if name.endswith(("k_scale", "v_scale")):
        where = f"vLLM refuses it under {VISION_MODEL}" if VISION_MODEL in name else "kv_cache_scheme is null"
        return f"a KV-cache scale, and {where}"
    return "no runtime expects it"


def _check_together(shown: Mapping[str, tuple[Linear, str]], found: Findings) -> None:
    """Matrices that vLLM holds in one parameter must share one scheme."""
    schemes: dict[str, dict[str, str]] = defaultdict(dict)
    for module, (linear, scheme) in shown.items():
        if linear.role is Role.ROUTED_EXPERT:
            schemes[_experts(linear)].setdefault(scheme, module)
        elif linear.projection in _TOGETHER:
            schemes[f"{module.rpartition('.')[0]}.{_TOGETHER[linear.projection]}"].setdefault(scheme, module)
    for where, by_scheme in schemes.items():
        if len(by_scheme) > 1:
            says = ", ".join(
                f"{module.rpartition(where)[2] or module} {scheme}" for scheme, module in by_scheme.items()
            )
            found.error("mixed", where, f"vLLM needs one scheme for all: {says}")


def _check_readers(examiner: _Examiner, declared: Declared, found: Findings) -> None:
    """What a runtime can't do with the schemes the file really uses, from the format files."""
    mixed = len(declared.groups) > 1
    for group in declared.groups:
        using = [linear for linear, name in examiner.shown.values() if name == group.name]
        if group.scheme is None or group.format is None or not using:
            continue
        roles = {linear.role for linear in using}
        for text in reader_limits(group.format, group.scheme, roles, weight_only=group.weight_only, mixed=mixed):
            found.warning("runtime", f"config_groups.{group.name}", text)
        if declared.kv_strategy is not None:
            vision = examiner.artifact.config.vision is not None
            for text in cache_limits(group.format, declared.kv_strategy, vision=vision):
                found.warning("runtime", "kv_cache_scheme", text)


def _check_sizes(examiner: _Examiner, declared: Declared, found: Findings) -> None:
    """Whether runtimes have kernels for the sizes of the quantized matrices, on one GPU."""
    groups = {group.name: group for group in declared.groups}
    stored = []
    for linear, name in examiner.shown.values():
        group = groups.get(name)
        if group is not None and group.format is not None and group.scheme is not None:
            stored.append((group.format, group.scheme, linear))
    reasons = split_hindrances(stored, examiner.artifact.config.text.num_key_value_heads, 1)
    tell = found.error if unservable(reasons) else found.warning
    for text in dict.fromkeys(text for texts in reasons.values() for text in texts):
        tell("runtime", "config_groups", text)


def _check_dtypes(
    artifact: OpenedArtifact, plain: list[Linear], others: tuple[TensorSpec, ...], found: Findings
) -> None:
    wanted = NAMES.get(artifact.config.dtype or "")
    names = [linear.tensor for linear in plain] + [spec.name for spec in others]
    for name in names:
        if wanted and artifact.entries[name].dtype != wanted:
            dtype = artifact.entries[name].dtype
            found.warning("dtype", name, f"is {dtype}, config.json says {artifact.config.dtype}: runtimes convert it")


def _told(group: ConfigGroup) -> str:
    """The numbers of a group that decide shapes."""
    scheme = group.scheme
    assert scheme is not None
    size = scheme.group_size or scheme.block_structure or ""
    return f"{group.name}: {scheme.num_bits} bits, {scheme.strategy.value} {size}".rstrip()


def _runtimes(runtimes: Iterable[StanzaReader]) -> str:
    return ", ".join(runtime.value for runtime in runtimes)
