"""Where an adapter's tensors belong in a model: which tensor each pair of matrices changes, which are given anew.

Modules are matched by their full paths below the model's own prefixes: the vision tower has modules with the same tails.
Source: peft `utils/save_and_load.py`; `tuners/lora/layer.py`, `ParamWrapper`, whose names lack the parameter's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from l4pack.checkpoint.adapter import Adapter
from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.merged import Factor, LowRank
from l4pack.errors import SourceError
from l4pack.model import parts
from l4pack.model.names import below_prefix
from l4pack.model.tensors import Catalogue, Linear
from l4pack.quant.layout import Layout

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)*")
_PAIR = re.compile(r"(?P<module>.+?)\.(?P<kind>lora|lora_embedding)_(?P<half>[AB])(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"(?:modules_to_save\.(?:default\.)?|base_layer\.)")
_EXPERTS = f".{parts.FEED_FORWARD}.{parts.EXPERTS}"
_SWAPPED_SINCE = (0, 19, 1)
_HINT = "was the adapter trained on this model?"


@dataclass
class Changes:
    """What an adapter does to a model, by the tensor's name: changes to be added, and tensors that take its place."""

    added: defaultdict[str, list[LowRank]] = field(default_factory=lambda: defaultdict(list))
    replaced: dict[str, TensorEntry] = field(default_factory=dict)


class _Region(NamedTuple):
    """A matrix within a tensor: columns from `first_column` on, of one expert, or (None) of all or the only matrix."""

    tensor: str
    rows: int
    columns: int
    expert: int | None = None
    first_column: int = 0


@dataclass(frozen=True)
class _Pair:
    """The two matrices of one module: lora_A and lora_B, or those of an embedding."""

    path: str  # as the adapter has it, below its wrappers
    module: str  # below the model's prefix
    first: TensorEntry
    second: TensorEntry
    embedding: bool


def changes_of(adapter: Adapter, layout: Catalogue) -> Changes:
    """What an adapter changes in a model of this layout. Raises SourceError for anything that has no place there."""
    return _Placing(adapter, layout).run()


class _Placing:
    def __init__(self, adapter: Adapter, layout: Catalogue) -> None:
        self._adapter, self._layout = adapter, layout
        self._tensors = {below_prefix(spec.name) or spec.name: spec for spec in layout.tensors}
        self._linears = {below_prefix(linear.module) or linear.module: linear for linear in layout.linears}
        self._experts: defaultdict[str, list[Linear]] = defaultdict(list)
        for module, linear in self._linears.items():
            if linear.expert is not None:
                self._experts[module[: module.index(f"{_EXPERTS}.") + len(_EXPERTS)]].append(linear)
        self._changes = Changes()
        self._nested: list[_Pair] = []

    def run(self) -> Changes:
        pairs, saved = self._sorted()
        for name, entry in saved.items():
            self._replace(name, entry)
        self._nested = [pair for pair in pairs if _whole(pair.module) in self._experts]
        for pair in pairs:
            if _whole(pair.module) not in self._experts:
                self._matrix(pair)
        self._all_experts(self._nested)
        if not self._changes.added and not self._changes.replaced:
            raise SourceError(f"the adapter {self._adapter.title} holds no tensor", hint="save it again")
        return self._changes

    def _sorted(self) -> tuple[list[_Pair], dict[str, TensorEntry]]:
        """The pairs of the adapter's file, and its other tensors by the name they have in the model."""
        halves: defaultdict[tuple[str, str], dict[str, TensorEntry]] = defaultdict(dict)
        saved: dict[str, TensorEntry] = {}
        for key, entry in self._adapter.entries.items():
            name = _WRAPPERS.sub("", key)
            match = _PAIR.fullmatch(name)
            if match is not None:
                found, half = halves[match["module"], match["kind"]], match["half"]
            elif "lora_" in name:
                raise SourceError(
                    f"{_short(key)} of the adapter is not of W + scale * B A (DoRA, a bias, or unknown)",
                    hint="merge it with peft's own merge_and_unload, and give the merged model",
                )
            else:
                found, half = saved, _SAVED.sub("", name)
            if half in found:
                raise SourceError(f"the adapter holds {_short(key)} under two names", hint="save it again with peft")
            found[half] = entry
        return [self._pair(*key, found) for key, found in halves.items()], saved

    def _pair(self, path: str, kind: str, found: Mapping[str, TensorEntry]) -> _Pair:
        if len(found) != 2:
            there = next(iter(found.values()))
            raise SourceError(f"{_short(there.name)} of the adapter has no counterpart", hint="save the adapter again")
        for entry in found.values():
            if len(entry.shape) != 2:
                raise self._misshapen(entry, "two axes")
        return _Pair(path, below_prefix(path) or path, found["A"], found["B"], kind == "lora_embedding")

    def _replace(self, name: str, entry: TensorEntry) -> None:
        spec = self._tensors.get(below_prefix(name) or name)
        if spec is None:
            raise self._no_place(entry)
        if entry.shape != spec.shape:
            raise self._misshapen(entry, f"{list(spec.shape)} as the model")
        self._changes.replaced[spec.name] = entry

    def _matrix(self, pair: _Pair) -> None:
        """A pair that changes one matrix."""
        spec = self._tensors.get(f"{pair.module}.{parts.WEIGHT}")
        linear = self._linears.get(pair.module)
        target = self._target(pair)
        rank = self._rank(pair, target, 1)
        ranked, other = Factor(pair.first, rank, rank_first=True), Factor(pair.second, rank, rank_first=False)
        if spec is not None and len(spec.shape) == 2:
            region = _Region(spec.name, spec.shape[0], spec.shape[1])
            self._add(pair, target, region, ranked if pair.embedding else other, other if pair.embedding else ranked)
        elif linear is not None and linear.layout is Layout.IN_OUT and not pair.embedding:
            region = _Region(linear.tensor, linear.in_features, linear.out_features, linear.expert, linear.column)
            self._add(pair, target, region, ranked, other)
        else:
            raise self._no_place(pair.first)

    def _target(self, pair: _Pair) -> str:
        """What patterns of ranks and scales are matched with: the module, or its weight where that is what was named."""
        weight = f".{pair.path}.{parts.WEIGHT}"
        named = self._adapter.config.target_parameters or ()
        return weight[1:] if any(weight.endswith(f".{one}") for one in named) else pair.path

    def _add(self, pair: _Pair, target: str, region: _Region, row: Factor, column: Factor) -> None:
        """Note a change of a region, if the factors have as many rows and columns."""
        found = row.count - row.offset, column.count - column.offset
        if found != (region.rows, region.columns):
            raise SourceError(
                f"{_short(pair.first.name)} of the adapter and its counterpart make a change of {list(found)}, "
                f"{region.tensor} takes {[region.rows, region.columns]}",
                hint=_HINT,
            )
        scale = self._adapter.config.scale(target)
        change = LowRank(row, column, scale, region.expert, region.first_column, region.columns)
        self._changes.added[region.tensor].append(change)

    def _rank(self, pair: _Pair, target: str, experts: int) -> int:
        """The rank of a pair, which the configuration and both shapes must agree on."""
        rank = self._adapter.config.rank(target)
        found = pair.first.shape[0], pair.second.shape[1]
        if found != (rank * experts, rank * experts):
            raise SourceError(
                f"{_short(pair.first.name)} and its counterpart have {' and '.join(map(str, sorted(set(found))))} vectors, "
                f"a rank of {rank}{f' for {experts} experts' if experts > 1 else ''} makes it {rank * experts}",
                hint=f"do both files belong together? {_HINT}",
            )
        return rank

    def _all_experts(self, pairs: list[_Pair]) -> None:
        """Pairs that change all experts of a layer: which tensor, and which of its axes is which, is told by sizes."""
        taken: dict[tuple[str, str], _Pair] = {}
        for pair in pairs:
            name, sides = self._fused(pair)
            module = _whole(pair.module)
            if (module, name) in taken:
                raise SourceError(f"the adapter holds two changes of {module}.{name}", hint="save it again with peft")
            taken[module, name] = pair
            self._fused_pair(pair, module, name, sides)

    def _fused_pair(self, pair: _Pair, module: str, name: str, sides: tuple[int, int]) -> None:
        """Note the change of one fused tensor, or of each matrix that it stands for where experts lie one by one."""
        experts = self._layout.config.text.num_local_experts
        target = f"{_whole(pair.path)}.{name}"
        rank = self._rank(pair, target, experts)
        ranked = Factor(pair.first, rank, rank_first=True, experts=experts)
        other = Factor(pair.second, rank, rank_first=False, experts=experts)
        row, column = (other, ranked) if self._swapped(pair, sides) else (ranked, other)
        spec = self._tensors.get(f"{module}.{name}")
        if spec is not None:
            self._add(pair, target, _Region(spec.name, *sides), row, column)
            return
        for linear in self._experts[module]:
            if linear.projection in parts.FUSED_MODULES.get(name, (name,)):
                offset = linear.out_features if linear.projection == parts.UP else 0
                there = _Region(linear.tensor, linear.out_features, linear.in_features, linear.expert)
                part = replace(column, offset=offset, last=offset + linear.out_features)
                self._add(pair, target, there, part, row)

    def _fused(self, pair: _Pair) -> tuple[str, tuple[int, int]]:
        """The fused tensor that a pair has the sizes of, and its rows and columns."""
        found = {pair.first.shape[1], pair.second.shape[0]}
        for name, (_, rows, columns) in parts.fused_shapes(self._layout.config.text).items():
            if found == {rows, columns}:
                return name, (rows, columns)
        raise self._misshapen(pair.first, f"{sorted(found)} as no tensor of the model's experts")

    def _swapped(self, pair: _Pair, sides: tuple[int, int]) -> bool:
        """Whether lora_A runs over the tensor's last axis, as peft has it since 0.19.1, and not over the one before.

        Sizes tell, of a square tensor those of the adapter's others, or the version of peft that wrote it.
        """
        for other in (pair, *self._nested):
            rows, columns = sides if other is pair else self._fused(other)[1]
            if rows != columns:
                return other.first.shape[1] == columns
        version = _version(self._adapter.config.peft_version)
        if version is None or _SWAPPED_SINCE[:2] <= version < _SWAPPED_SINCE:
            raise SourceError(
                f"{_short(pair.first.name)} changes square matrices of experts, and nothing tells their axes apart",
                hint=f"save the adapter with peft {'.'.join(map(str, _SWAPPED_SINCE))} or later, which says so",
            )
        return version >= _SWAPPED_SINCE

    def _no_place(self, entry: TensorEntry) -> SourceError:
        return SourceError(
            f"{_short(entry.name)} of the adapter has no place in the model",
            hint=f"{_HINT} Its base is {self._adapter.config.base_model_name_or_path or 'not named'}"[:300],
        )

    def _misshapen(self, entry: TensorEntry, wanted: str) -> SourceError:
        return SourceError(
            f"{_short(entry.name)} of the adapter is {list(entry.shape)}, and not of {wanted}", hint=_HINT
        )


def _whole(module: str) -> str:
    """A module's path without the names that peft nests its wrappers by."""
    return re.sub(r"(\.base_layer)+$", "", module)


def _version(text: str | None) -> tuple[int, ...] | None:
    match = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", text or "")
    return None if match is None else tuple(int(part or 0) for part in match.groups())


def _short(name: str) -> str:
    return name if len(name) <= 200 and name.isprintable() else f"{ascii(name)[1:-1]:.200}"
