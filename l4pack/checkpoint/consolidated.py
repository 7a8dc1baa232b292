"""Meta's own release: `consolidated.NN.pth` beside `params.json`, opened as the checkpoint that transformers would have
of it.

Model parallelism split every weight over the files. Its pieces are put together when they are read: an expert's matrix
is one read of each file. What every shard has a copy of is read of all and compared.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack.checkpoint.companions import check_companions, choose, folder_files
from l4pack.checkpoint.exports import WEIGHT_DTYPES
from l4pack.checkpoint.given import Given, beside
from l4pack.checkpoint.header import DTYPE_BITS, Box, Numbers, TensorEntry, tensor_bytes
from l4pack.checkpoint.pieces import Piece, Pieces
from l4pack.checkpoint.pth import PthHeader, StoredTensor, read_pth
from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.errors import SourceError
from l4pack.model.config import STANZA_KEYS, Llama4Config, parse_config
from l4pack.model.original import ALWAYS_SPLIT, Placed, Split, is_dropped, placed, widths
from l4pack.model.params import PARAMS_NAME, Params, configuration, load_params, refuse_other_model
from l4pack.model.tensors import Catalogue, canonical_naming, catalogue
from l4pack.quant.dtypes import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHARD = re.compile(r"consolidated(?:\.(\d{1,4}))?\.pth")
_SCALES = re.compile(r"(fp8|int4)_scales_\d+\.pt")
_SAMPLE = 4096
_WORDS: Mapping[str, str] = {name: one.word for name, one in FLOATS.items()}
_AGAIN = "download the shards again, all of one release"


def is_consolidated(names: Collection[str]) -> bool:
    """Whether files are Meta's release of a model, and not transformers' safetensors."""
    return any(map(_SHARD.fullmatch, names)) and not any(name.endswith(".safetensors") for name in names)


def shard_files(names: Collection[str], where: str) -> tuple[str, ...]:
    """The shards in their order. Raises SourceError for a gap, a number twice, or what llama-models quantized."""
    scales = sorted(name for name in names if _SCALES.fullmatch(name))
    if scales:
        raise SourceError(
            f"{where} was quantized by llama-models ({scales[0]}): its experts are packed, and l4pack does not read them",
            hint="take Meta's BF16 release of the same model",
        )
    found = [(int(match[1] or 0), name) for name in names if (match := _SHARD.fullmatch(name))]
    numbers = Counter(number for number, _ in found)
    for number in range(max(numbers) + 1):
        if numbers[number] != 1:
            what = "is missing" if not numbers[number] else "is there more than once"
            raise SourceError(f"{where}: shard {number:02} of consolidated.NN.pth {what}", hint=_AGAIN)
    return tuple(name for _, name in sorted(found))


def open_consolidated(folder: Path, include: Sequence[str] = (), given: Given | None = None) -> Checkpoint:
    """Open a folder of Meta's files. Raises SourceError, UsageError for an `include` that is wrong."""
    files = folder_files(folder, include)
    shards = shard_files(files, str(folder))
    params = load_params(folder / PARAMS_NAME)
    headers = {file: read_pth(folder / file, file) for file in shards}
    _refuse_twins(folder, headers)
    opened = compose(str(folder), params, headers, files, include, given)
    check_companions(folder, opened.companions)
    opened = replace(opened, store=LocalStore(folder), reopen=partial(open_consolidated, folder, tuple(include), given))
    return opened if given is None else replace(beside(opened, given), reopen=opened.reopen)


def _refuse_twins(folder: Path, headers: Mapping[str, PthHeader]) -> None:
    """Raise SourceError where one shard lies there under two names: a few bytes that are split are compared."""
    seen: dict[bytes, str] = {}
    for file, header in headers.items():
        tensor = header.tensors.get(ALWAYS_SPLIT)
        if tensor is None:
            continue
        with (folder / file).open("rb") as stream:
            sample = os.pread(stream.fileno(), _SAMPLE, tensor.start)
        if sample in seen and len(set(sample)) > 1:
            raise SourceError(f"{file} is {seen[sample]} again, under another name", hint=_AGAIN)
        seen[sample] = file


def compose(
    name: str,
    params: Params,
    headers: Mapping[str, PthHeader],
    files: Mapping[str, int],
    include: Sequence[str] = (),
    given: Given | None = None,
) -> Checkpoint:
    """A checkpoint of what was read, wherever it lies; `files` are all files by their names within it.

    Raises SourceError, UsageError for an `include` that is wrong.
    """
    shards = tuple(headers)
    tensors = {file: _weights(header, file) for file, header in headers.items()}
    _refuse_count(params, tensors)
    derived = _derived(params, tensors)
    config, notes = _configuration(params, derived, given)
    layout = catalogue(config, canonical_naming(config))
    around = choose(files, {PARAMS_NAME, *shards}, include)
    return Checkpoint(
        name,
        config,
        _entries(layout, tensors),
        around.carried,
        left_behind=around.left_behind,
        included=around.included,
        notes=notes,
        complete=partial(_same_model, params, derived) if given is None or given.config is None else None,
        kind=f"Meta's release: {PARAMS_NAME} and {len(shards)} of consolidated.NN.pth",
    )


Tensors = Mapping[str, StoredTensor]


def _weights(header: PthHeader, file: str) -> Tensors:
    """A shard's weights without what training left beside them. Raises SourceError for what is none."""
    odd = [name for name in header.others if not is_dropped(name)]
    if odd:
        raise SourceError(
            f"{file}: {ascii(odd[0])[1:-1]:.120} is not a tensor",
            hint="a shard holds weights by name, as Meta released them",
        )
    weights = {name: tensor for name, tensor in header.tensors.items() if not is_dropped(name)}
    if not weights:
        raise SourceError(f"{file} holds no weights", hint=_AGAIN)
    for name, tensor in weights.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise SourceError(
                f"{file}: {ascii(name)[1:-1]:.120} is {tensor.dtype}; l4pack reads {', '.join(WEIGHT_DTYPES)}",
                hint="take Meta's BF16 release: what llama-models quantized is packed in ways of its own",
            )
    return weights


def _refuse_count(params: Params, tensors: Mapping[str, Tensors]) -> None:
    """Raise SourceError where the weights were split over another number of files than are there."""
    first = next(iter(tensors.values())).get(ALWAYS_SPLIT)
    width = params.n_heads * (params.head_dim or params.dim // params.n_heads)
    if first is None or len(first.shape) != 2 or not first.shape[1] or width % first.shape[1]:
        return
    split = width // first.shape[1]
    if split != len(tensors):
        raise SourceError(
            f"{len(tensors)} shards are there, and the weights were split over {split}",
            hint=f"download consolidated.00.pth to consolidated.{split - 1:02}.pth of one release",
        )


def _derived(params: Params, tensors: Mapping[str, Tensors]) -> dict[str, Any]:
    """The configuration that `params.json` and the shards make."""
    first = next(iter(tensors.values()))
    dtypes = Counter(tensor.dtype for tensor in first.values()).most_common(1)
    found = widths({name: tensor.shape for name, tensor in first.items()}, len(tensors))
    return configuration(params, found, *(_WORDS[dtype] for dtype, _ in dtypes))


def _configuration(
    params: Params, derived: Mapping[str, Any], given: Given | None
) -> tuple[Llama4Config, tuple[str, ...]]:
    """The configuration that comes with the companions, or else the derived one; and what is to be said of it."""
    if given is None or given.config is None:
        context = derived.get("text_config", derived)["max_position_embeddings"]
        note = f"{PARAMS_NAME} says nothing of the longest context: {context:,}, the base models', is taken for it; "
        return parse_config(derived, PARAMS_NAME), (note + "--companions of the same model brings its own config.json",)
    refuse_other_model(given.config, params, derived, f"{given.name}: config.json")
    return _plain(given.config), ()


def _same_model(params: Params, derived: Mapping[str, Any], config: Llama4Config) -> Llama4Config | None:
    """A whole configuration without what it says of quantization; None for one of another model."""
    try:
        refuse_other_model(config, params, derived, "config.json")
    except SourceError:
        return None
    return _plain(config)


def _plain(config: Llama4Config) -> Llama4Config:
    return parse_config({key: value for key, value in config.raw.items() if key not in STANZA_KEYS})


def _entries(layout: Catalogue, tensors: Mapping[str, Tensors]) -> dict[str, TensorEntry]:
    """Every tensor of the layout, made of its pieces. Raises SourceError for what is missing, too much or misshapen."""
    found: defaultdict[str, list[_Part]] = defaultdict(list)
    names = list(dict.fromkeys(name for one in tensors.values() for name in one))
    for name in names:
        place = placed(name, layout.naming)
        if place is None or not layout.by_name.keys() >= set(place.names):
            file = next(file for file, one in tensors.items() if name in one)
            raise SourceError(
                f"{file}: {ascii(name)[1:-1]:.120} is not part of the Llama 4 model that {PARAMS_NAME} describes",
                hint=f"check that {PARAMS_NAME} belongs to the shards",
            )
        for part in _parts(name, place, layout, tensors):
            found[part.tensor].append(part)
    missing = [name for name in layout.by_name if name not in found]
    if missing:
        raise SourceError(
            f"{len(missing)} weights that {PARAMS_NAME} implies are in no shard; transformers calls the first {missing[0]}",
            hint=f"check that {PARAMS_NAME} belongs to the shards, or download them again",
        )
    return {name: _entry(name, layout.by_name[name].shape, found[name]) for name in layout.by_name}


@dataclass(frozen=True)
class _Part:
    """A weight's share of a tensor of transformers': its pieces in all shards, or all of it in each."""

    tensor: str
    name: str
    dtype: str
    pieces: tuple[Piece, ...]
    copied: bool
    numel: int


def _parts(name: str, place: Placed, layout: Catalogue, tensors: Mapping[str, Tensors]) -> Iterator[_Part]:
    """What one of Meta's weights is of which tensors. Raises SourceError where a shard's is missing or misshapen."""
    shards = [_one(name, file, one) for file, one in tensors.items()]
    if len({shard.dtype for shard in shards}) > 1:
        raise SourceError(f"{name} has another dtype in {shards[0].file} than in other shards", hint=_AGAIN)
    shapes = [layout.by_name[target].shape for target in place.names]
    cut = _Cut(len(shards), place, shapes)
    pieces = [cut.pieces(number, shard) for number, shard in enumerate(shards)]
    copied = place.split in (Split.COPIED, Split.ROUTER)
    for target, own in zip(place.names, zip(*pieces, strict=True), strict=True):
        numel = sum(math.prod(piece.shape) for piece in own) // (len(own) if copied else 1)
        yield _Part(target, name, shards[0].dtype, own, copied, numel)


def _one(name: str, file: str, tensors: Tensors) -> StoredTensor:
    if name not in tensors:
        raise SourceError(f"{file} has no {ascii(name)[1:-1]:.120}, and other shards have it", hint=_AGAIN)
    return tensors[name]


@dataclass(frozen=True)
class _Cut:
    """How a weight of which there is one in each of `count` shards makes up tensors of the `shapes`."""

    count: int
    place: Placed
    shapes: Sequence[tuple[int, ...]]

    def pieces(self, number: int, shard: StoredTensor) -> list[Piece]:
        """One piece of each tensor, from the shard of a number. Raises SourceError."""
        shape, split = self.shapes[0], self.place.split
        if split is Split.EMBEDDING:
            by_width = shard.shape[-1:] != shape[-1:]
            split = Split.COLUMNS if by_width else Split.ROWS
        if split is Split.ROWS:
            return self._rows(number, shard)
        if split is Split.COLUMNS:
            return [self._along(1, number, shard, shape)]
        if split is Split.COPIED:
            return [_piece(shard, shard.strides, (0,) * len(shape), self._expect(shard, shape))]
        if split is Split.ROUTER:
            self._expect(shard, shape[::-1])
            return [_piece(shard, shard.strides[::-1], (0, 0), shape)]
        return [self._experts(number, shard, shape)]

    def _rows(self, number: int, shard: StoredTensor) -> list[Piece]:
        """Of tensors stacked in every shard."""
        shares = [self._share(shape[0], shard) for shape in self.shapes]
        rest = self.shapes[0][1:]
        self._expect(shard, (sum(shares), *rest))
        begins = [sum(shares[:index]) for index in range(len(shares))]
        at = [(number * share, *(0 for _ in rest)) for share in shares]
        return [
            _piece(shard, shard.strides, place, (share, *rest), begin * shard.strides[0])
            for share, begin, place in zip(shares, begins, at, strict=True)
        ]

    def _along(self, axis: int, number: int, shard: StoredTensor, shape: tuple[int, ...]) -> Piece:
        share = self._share(shape[axis], shard)
        own = (*shape[:axis], share, *shape[axis + 1 :])
        at = tuple(number * share if index == axis else 0 for index in range(len(shape)))
        return _piece(shard, shard.strides, at, self._expect(shard, own))

    def _experts(self, number: int, shard: StoredTensor, shape: tuple[int, ...]) -> Piece:
        """Of a fused tensor [experts, in, out], from [experts * in, out] or [experts, in, out]."""
        experts, rows, columns = shape
        into = self.place.split is Split.EXPERTS_INTO
        columns, rows = (self._share(columns // 2, shard), rows) if into else (columns, self._share(rows, shard))
        if len(shard.shape) == 2:
            self._expect(shard, (experts * rows, columns))
            down, across = shard.strides
            strides: tuple[int, ...] = (rows * down, down, across)
        else:
            self._expect(shard, (experts, rows, columns))
            strides = shard.strides
        at = (0, 0, self.place.half * (shape[2] // 2) + number * columns) if into else (0, number * rows, 0)
        return _piece(shard, strides, at, (experts, rows, columns))

    def _share(self, size: int, shard: StoredTensor) -> int:
        if size % self.count:
            raise SourceError(
                f"{shard.file}: {shard.name} can't be a part of {self.count}: {size:,} is no multiple of it",
                hint=_AGAIN,
            )
        return size // self.count

    def _expect(self, shard: StoredTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shard.shape != shape:
            raise SourceError(
                f"{shard.file}: {shard.name} has shape {list(shard.shape)}, {PARAMS_NAME} and {self.count} shards make it "
                f"{list(shape)}",
                hint=f"are all shards there, and does {PARAMS_NAME} belong to them?",
            )
        return shape


def _piece(
    shard: StoredTensor, strides: tuple[int, ...], at: tuple[int, ...], shape: tuple[int, ...], skipped: int = 0
) -> Piece:
    start = shard.start + skipped * DTYPE_BITS[shard.dtype] // 8
    return Piece(shard.name, shard.file, start, at, shape, strides)


def _entry(name: str, shape: tuple[int, ...], parts: Sequence[_Part]) -> TensorEntry:
    """A tensor of all its parts. Raises SourceError where they don't fill it, or fill it twice."""
    dtype, itemsize = parts[0].dtype, DTYPE_BITS[parts[0].dtype] // 8
    own = sorted({(piece.at, part.name) for part in parts for piece in part.pieces[:1]})
    if len({at for at, _ in own}) != len(own) or len({part.dtype for part in parts}) != 1:
        names = " and ".join(sorted({part.name for part in parts}))
        raise SourceError(
            f"{parts[0].pieces[0].file}: {names} are the same weight twice, or of two dtypes", hint=_AGAIN
        )
    if sum(part.numel for part in parts) != math.prod(shape):
        raise SourceError(
            f"{parts[0].pieces[0].file}: {parts[0].name} is only a part of its tensor, and the rest is in no shard",
            hint=_AGAIN,
        )
    pieces = tuple(piece for part in parts for piece in part.pieces)
    derived = Copies(pieces, itemsize) if parts[0].copied else Pieces(pieces, itemsize)
    return TensorEntry(name, pieces[0].file, dtype, shape, pieces[0].start, tensor_bytes(dtype, shape), derived)


@dataclass(frozen=True, slots=True)
class Copies:
    """The derivation of a tensor that every shard has: read of all, as they must agree."""

    copies: tuple[Piece, ...]
    itemsize: int

    @property
    def stored(self) -> Mapping[str, int]:
        """Bytes of each copy."""
        return {copy.file: math.prod(copy.shape) * self.itemsize for copy in self.copies}

    def read(self, reader: Numbers, box: Box, out: NDArray[Any]) -> None:
        """A part of the first copy. Raises SourceError where another differs."""
        first, *others = self.copies
        Pieces((first,), self.itemsize).read(reader, box, out)
        for copy in others:
            again = out.copy()
            Pieces((copy,), self.itemsize).read(reader, box, again)
            if (again != out).any():
                raise SourceError(
                    f"{copy.file} has another {copy.name} than {first.file}: the shards are not of one model",
                    hint=_AGAIN,
                )
