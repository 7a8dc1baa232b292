"""A quantized checkpoint as a source: its matrices are the exact products of codes and scales, everything else is as it is.

Read are compressed-tensors checkpoints in the formats of `formats/`, whoever wrote them, and transformers' `fbgemm_fp8`
layout (`integrations/fbgemm_fp8.py`: fused experts in x out, one float32 scale an output channel). Other methods are named
and refused. A release in FP8 is a source like any other; what was quantized further, or by l4pack, is one only where that
is asked for, because its rounding stays in what is made of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from l4pack.artifact.codes import FP8_CHANNEL, CodedExperts, CodedMatrix, codes_of, stored_shapes
from l4pack.artifact.kv_cache import scale_names
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.patterns import matches, pattern
from l4pack.artifact.stanza import METHOD, StanzaGroup, read_stanza
from l4pack.checkpoint.exports import WEIGHT_DTYPES, without_stanza
from l4pack.checkpoint.header import TensorEntry, tensor_bytes
from l4pack.checkpoint.open import open_source, with_lora
from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.datafile import first_fault
from l4pack.errors import SourceError
from l4pack.formats.configuration import read_scheme
from l4pack.formats.float_quantized import FLOAT_QUANTIZED
from l4pack.formats.format import Format, Holds
from l4pack.formats.known import FORMATS
from l4pack.model import parts
from l4pack.model.names import detect_layout, split_suffix
from l4pack.model.tensors import Role
from l4pack.quant.grid import E2M1, E4M3
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.quant.suffixes import Suffix

FBGEMM = "fbgemm_fp8"
_REFUSED = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "modelopt": "NVIDIA ModelOpt",
    "fp8": "transformers' fine-grained FP8",
}
_ORIGINAL = "start from the original checkpoint, or from a compressed-tensors or FP8 one of the same model"
_AGAIN = "config.json and the weights don't belong together: download both again"
_CODES = (Suffix.PACKED, Suffix.SCALE)
_SCALE = f"_{Suffix.SCALE.removeprefix('weight_')}"  # how fbgemm_fp8 names the scales of a fused tensor


def open_original(
    text: str,
    *,
    fetch_folder: Path | None = None,
    include: Sequence[str] = (),
    companions: str | None = None,
    requantize: bool = False,
    lora: Sequence[str] = (),
) -> Checkpoint:
    """`open_source`, and a quantized checkpoint as a source. With `requantize`, of any kind that is read, else FP8 releases.

    Raises what `open_source` does, and SourceError for a checkpoint that is quantized already.
    """
    opened = open_source(text, fetch_folder=fetch_folder, include=include, companions=companions)
    if not opened.config.quantized:
        return with_lora(opened, lora)
    source = as_source(opened)
    if not requantize and not is_release(source):
        raise SourceError(
            f"{opened.name} is quantized already ({source.dequantized})",
            hint="start from the original BF16 checkpoint; plan, quantize and build take --allow-requantize",
        )
    return with_lora(source, lora)


def as_source(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with its quantized matrices as float32 numbers; one that is not quantized as it is.

    Reads no weights: scales are checked as they are read. Raises SourceError for a method that is not read, tensors that
    are not what the configuration says, or a configuration without weights.
    """
    if not checkpoint.config.quantized:
        return checkpoint
    schemes = _schemes(checkpoint)
    if checkpoint.bare:
        raise SourceError(f"{checkpoint.name} is quantized already, and has no weights", hint=_ORIGINAL)
    made = _Products(checkpoint, schemes)
    words = " and ".join(dict.fromkeys(map(describe, made.used)))
    note = (
        f"its matrices are {words}: they are read as the exact products of code and scale, in float32, and what is measured "
        "against this source is measured against those, not against what it was quantized from"
    )
    return replace(
        checkpoint,
        entries=made.entries,
        config=without_stanza(checkpoint.config),
        notes=(*checkpoint.notes, note),
        dequantized=words,
        reopen=checkpoint.reopen and partial(_reopened, checkpoint.reopen),
    )


def describe(scheme: Scheme) -> str:
    """A scheme of weights in words."""
    shares = {
        Strategy.TENSOR: "one scale a matrix",
        Strategy.CHANNEL: "one scale an output channel",
        Strategy.GROUP: f"groups of {scheme.group_size}",
        Strategy.BLOCK: f"blocks of {' x '.join(map(str, scheme.block_structure or ()))}",
    }
    if scheme.grid is E2M1:
        return "NVFP4" if scheme.strategy is Strategy.TENSOR_GROUP else "MXFP4"
    kind = "FP8" if scheme.grid is E4M3 else f"{scheme.num_bits}-bit integers"
    return f"{kind} ({shares[scheme.strategy]})"


def _reopened(reopen: Callable[[], Checkpoint]) -> Checkpoint:
    return as_source(reopen())


def is_release(source: Checkpoint) -> bool:
    """Whether a quantized source is FP8 throughout, and not l4pack's own: a release that stands for an original."""
    codes = (codes_of(entry) for entry in source.entries.values())
    return not is_own(source) and all(code is None or code.scheme.grid is E4M3 for code in codes)


def is_own(checkpoint: Checkpoint) -> bool:
    """Whether its folder is that of an artifact that l4pack made."""
    return isinstance(checkpoint.store, LocalStore) and (checkpoint.store.folder / MANIFEST_NAME).is_file()


@dataclass(frozen=True)
class _Group:
    """What a group of a stanza gives its targets; `fault` says why its matrices are not read."""

    targets: tuple[str, ...]
    given: tuple[Format, Scheme] | None
    fault: str


class _Schemes:
    """The format and scheme of each module that has codes."""

    def __init__(self, groups: Sequence[_Group], where: str) -> None:
        self._groups, self._where = groups, where

    def prepare(self, modules: Sequence[str]) -> None:
        """Match every expression with the modules that will be asked for, at once."""
        for target in (target for group in self._groups for target in group.targets):
            if target.startswith("re:"):
                pattern(target.removeprefix("re:")).prepare(modules)

    def of(self, module: str) -> tuple[Format, Scheme]:
        """A group that names the module comes before one of the class. Raises SourceError."""
        named = [group for group in self._groups if any(matches(target, module) for target in group.targets)]
        whole = [group for group in self._groups if "Linear" in group.targets]
        for group in (*named, *whole):
            if group.given is None:
                raise SourceError(f"{self._where}: {module} can't be read: {group.fault}", hint=_ORIGINAL)
            return group.given
        raise SourceError(
            f"{self._where}: {module} has codes and scales, and quantization_config gives it no scheme", hint=_AGAIN
        )


def _schemes(checkpoint: Checkpoint) -> _Schemes:
    stanza = checkpoint.config.stanza
    method = str(stanza.get("quant_method") or "")
    if method == FBGEMM:
        return _Schemes([_Group(("Linear",), (FLOAT_QUANTIZED, FP8_CHANNEL), "")], checkpoint.name)
    if method != METHOD:
        title = _REFUSED.get(method.lower(), repr(method)) if method else "a method that config.json does not name"
        raise SourceError(
            f"{checkpoint.name} is quantized already, by {title}, whose layout l4pack does not read", hint=_ORIGINAL
        )
    return _Schemes([_group(group) for group in read_stanza(stanza).groups], checkpoint.name)


def _group(group: StanzaGroup) -> _Group:
    targets = tuple(target for target in group.targets if isinstance(target, str))
    given = dict(group.weights or {})
    if given.get("actorder") in ("group", "dynamic"):
        return _Group(targets, None, "its groups are in activation order")
    if not given.get("strategy"):
        size = given.get("group_size")
        given["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    if given["strategy"] not in (Strategy.GROUP, Strategy.TENSOR_GROUP):
        given["group_size"] = None  # compressed-tensors has -1 for whole rows
    try:
        scheme = read_scheme(given)
    except ValidationError as error:
        key, message = first_fault(error)
        return _Group(targets, None, f"config_groups.{group.name}.weights{'.' * bool(key)}{key}: {message}")
    form = FORMATS.get(group.format or "", FLOAT_QUANTIZED if scheme.grid is E4M3 else None)
    if form is None or not form.decodes(scheme):
        return _Group(targets, None, f"format {group.format} is not one of {', '.join(sorted(FORMATS))}")
    return _Group(targets, (form, scheme), "")


class _Products:
    """The entries of a quantized checkpoint's source: one tensor of products for the tensors of each coded matrix."""

    def __init__(self, checkpoint: Checkpoint, schemes: _Schemes) -> None:
        self._name, self._schemes = checkpoint.name, schemes
        self._layout = detect_layout(checkpoint.config, checkpoint.entries)
        self.entries: dict[str, TensorEntry] = dict(checkpoint.entries)
        self.used: list[Scheme] = []
        held: defaultdict[str, dict[str, TensorEntry]] = defaultdict(dict)
        for entry in checkpoint.entries.values():
            module, suffix = split_suffix(entry.name)
            held[module][suffix] = entry
        coded = [module for module, tensors in held.items() if _is_coded(tensors)]
        schemes.prepare(coded)
        for module in coded:
            self._matrix(module, held[module])
        for name in self._fused(checkpoint.entries):
            self._experts(checkpoint.entries[name])
        for layer in range(checkpoint.config.text.num_hidden_layers):
            for name in scale_names(self._layout.naming, layer):
                self.entries.pop(name, None)
        if not self.used:
            raise SourceError(f"{self._name} is quantized already, and holds no codes that are read", hint=_ORIGINAL)

    def _matrix(self, module: str, tensors: Mapping[str, TensorEntry]) -> None:
        name = f"{module}.{Suffix.WEIGHT}"
        spec = self._layout.by_name.get(name)
        if spec is None or len(spec.shape) != 2:
            raise SourceError(f"{module} has codes and scales, and is no matrix of this Llama 4", hint=_AGAIN)
        form, scheme = self._schemes.of(module)
        size = (spec.shape[0], spec.shape[1])
        pieces = _pieces(module, tensors, form, scheme, size)
        codes = dict(pieces)[form.values.suffix]
        for suffix in Suffix:
            self.entries.pop(f"{module}.{suffix}", None)
        self.entries[name] = _product(name, size, codes, CodedMatrix(module, form.name, scheme, size, pieces))
        self.used.append(scheme)

    def _fused(self, entries: Iterable[str]) -> list[str]:
        fused = {spec.name for spec in self._layout.tensors if spec.role is Role.ROUTED_EXPERT and len(spec.shape) == 3}
        return [name for name in entries if name in fused and f"{name}{_SCALE}" in self.entries]

    def _experts(self, codes: TensorEntry) -> None:
        scale = self.entries.pop(f"{codes.name}{_SCALE}")
        spec = self._layout.by_name[codes.name]
        count, _, outputs = spec.shape
        _check_dtype(codes, FLOAT_QUANTIZED.values.dtype)
        _check_dtype(scale, *WEIGHT_DTYPES)
        if codes.shape != spec.shape:
            raise _wrong_shape(codes, spec.shape)
        wanted = (count, outputs, 1) if codes.name.endswith(parts.DOWN) else (count, 1, outputs)
        if scale.shape not in (wanted, (count, 1, outputs)):
            raise _wrong_shape(scale, wanted)
        coded = CodedExperts(codes, replace(scale, shape=(count, 1, outputs)))
        self.entries[codes.name] = _product(codes.name, spec.shape, codes, coded)
        self.used.append(coded.scheme)


def _is_coded(tensors: Mapping[str, TensorEntry]) -> bool:
    codes = tensors.get(Suffix.WEIGHT)
    return any(suffix in tensors for suffix in _CODES) or (codes is not None and codes.dtype.startswith("F8"))


def _pieces(
    module: str, tensors: Mapping[str, TensorEntry], form: Format, scheme: Scheme, size: tuple[int, int]
) -> tuple[tuple[Suffix, TensorEntry], ...]:
    """The tensors that a matrix is decoded from, each of the dtype and shape that its scheme makes. Raises SourceError."""
    found = []
    dtypes = {piece.suffix: _dtypes(piece.dtype) for piece in form.pieces}
    holds = {piece.suffix: piece.holds for piece in form.pieces}
    for suffix, shape in stored_shapes(form, scheme, size).items():
        entry = tensors.get(suffix)
        if entry is None and holds[suffix] is Holds.SHAPE:
            continue
        if entry is None:
            raise SourceError(f"{module} is quantized and has no {suffix}", hint=_AGAIN)
        _check_dtype(entry, *dtypes[suffix])
        if entry.shape != shape and not (shape == (1,) and entry.shape == ()):
            raise _wrong_shape(entry, shape)
        found.append((suffix, entry))
    if Suffix.ORDER in tensors:
        raise SourceError(f"{module} has its groups in activation order, which l4pack does not read", hint=_ORIGINAL)
    return tuple(found)


def _dtypes(given: str) -> tuple[str, ...]:
    return WEIGHT_DTYPES if given == "scale" else (given,)


def _check_dtype(entry: TensorEntry, *wanted: str) -> None:
    if entry.dtype not in wanted:
        raise SourceError(f"{entry.file}: {entry.name} is {entry.dtype}, should be {' or '.join(wanted)}", hint=_AGAIN)


def _wrong_shape(entry: TensorEntry, wanted: tuple[int, ...]) -> SourceError:
    return SourceError(
        f"{entry.file}: {entry.name} has shape {list(entry.shape)}, its scheme makes it {list(wanted)}", hint=_AGAIN
    )


def _product(name: str, shape: tuple[int, ...], codes: TensorEntry, derived: Any) -> TensorEntry:
    return TensorEntry(name, codes.file, "F32", shape, codes.start, tensor_bytes("F32", shape), derived)
