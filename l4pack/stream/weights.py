"""Weights of one checkpoint, plain or quantized, by the names runtimes use, as tensors ready to compute with."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l4pack.artifact.kv_cache import declared_strategy, scale_names, scale_shape
from l4pack.artifact.quantized import Given, Quantization, decompressed
from l4pack.artifact.stanza import read_stanza
from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.checkpoint.matrices import matrices_of
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import L4packError, SourceError
from l4pack.formats.weights import dequantizer
from l4pack.model.names import detect_layout
from l4pack.model.tensors import Linear, canonical_naming, catalogue, rename
from l4pack.quant.dtypes import FloatName
from l4pack.quant.layout import Layout
from l4pack.quant.suffixes import INPUT_SCALES, Suffix
from l4pack.quant.torch_ops import DTYPES
from l4pack.stream.activations import RoundedInputs, activations_of
from l4pack.stream.kv import RoundedCache
from l4pack.stream.tiles import QuantizedTiles, StoredTiles, Tiles
from l4pack.stream.transfer import to_device

_VIEWS = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True)
class LinearWeight:
    """One matrix [out_features, in_features] in the compute dtype, and what is done to its inputs."""

    weight: Tensor
    activations: RoundedInputs | None = None


@dataclass(frozen=True)
class TiledWeight:
    """One matrix as it is stored, and what is done to its inputs."""

    tiles: Tiles
    activations: RoundedInputs | None = None

    @property
    def weight(self) -> Tensor:
        """The whole matrix, float32 [out_features, in_features]."""
        return self.tiles.tile(slice(None), torch.empty(math.prod(self.tiles.shape)))


class Weights:
    """Reads tensors and matrices of a checkpoint; safe to use from several threads.

    Weight-only schemes give weights rounded to the model's dtype, as runtimes multiply them; where inputs are rounded
    too, kernels multiply the codes and scale the product, so the weights are the exact product of code and scale. Those of
    super-blocks are as ggml has them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        round_activations: bool = True,
        tiled: bool = False,
    ) -> None:
        """With `tiled`, matrices of MLPs stay as they are stored until a CPU multiplies with them, in float32.

        Raises SourceError when the checkpoint has no weights or names that are not Llama 4's.
        """
        if checkpoint.bare or checkpoint.store is None:
            raise SourceError(f"{checkpoint.name} is a configuration without weights", hint="give a checkpoint folder")
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self._round_activations = round_activations
        self.tiled = tiled
        self.model_dtype = DTYPES.get(checkpoint.config.dtype or "bfloat16", torch.bfloat16)
        self._reader = Reader(checkpoint.entries, checkpoint.store.path)
        self._matrices = matrices_of(checkpoint, self._reader)
        self._naming = canonical_naming(checkpoint.config)
        source = detect_layout(checkpoint.config, checkpoint.entries)
        runtime = catalogue(checkpoint.config, self._naming, fused=False)
        self._source_naming = source.naming
        self._linears = {new.module: old for old, new in zip(source.linears, runtime.linears, strict=True)}
        self._quantization = Quantization(checkpoint.config.stanza, self._linears)
        self._quantization.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close_files()

    def close_files(self) -> None:
        """Close every file, so that it can be deleted; what is read next is opened again."""
        self._reader.close()

    def linears(self, modules: Iterable[str], *, tiled: bool = False) -> dict[str, LinearWeight | TiledWeight]:
        """Matrices by module; those of one fused tensor are read with one read and share its memory.

        With `tiled`, those that can stay as they are stored do.
        """
        plain: defaultdict[Hashable, list[str]] = defaultdict(list)
        result: dict[str, LinearWeight | TiledWeight] = {}
        for module in modules:
            if self.is_quantized(module):
                result[module] = self._quantized(module, self._linears[module], tiled)
            else:
                plain[self._matrices.together(self._linears[module])].append(module)
        for together in plain.values():
            result |= zip(together, self._plain(together, tiled), strict=True)
        return result

    def is_quantized(self, module: str) -> bool:
        """Whether the checkpoint holds scales for the module."""
        own = self._linears[module].module
        return any(f"{own}.{suffix}" in self.checkpoint.entries for suffix in (Suffix.SCALE, Suffix.PACKED))

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not quantized, by its runtime name, in the compute dtype."""
        own = self._own(name)
        return self._torch(own, self._read(own))

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor that is not quantized."""
        own = self._own(name)
        return self._torch(own, self._reader.matrix(own, None, rows))

    def holds(self, name: str) -> bool:
        """Whether a tensor of this runtime name is there."""
        return self._own(name) in self.checkpoint.entries

    def kv_cache(self, layer: int) -> RoundedCache | None:
        """What the cache makes of a layer's keys and values; None when it keeps them as they are.

        Raises L4packError for a cache that can't be simulated.
        """
        scheme = read_stanza(self.checkpoint.config.stanza).kv_cache
        if not scheme or not self._round_activations:
            return None
        strategy = declared_strategy(scheme)
        if strategy is None:
            raise L4packError(
                "config.json: its kv_cache_scheme is not one that runtimes take, and is not simulated",
                hint="add --weights-only to evaluate the weights alone",
            )
        shape = scale_shape(strategy, self.checkpoint.config.text.num_key_value_heads)
        key, value = (self._kv_scale(name, shape) for name in scale_names(self._naming, layer))
        return RoundedCache(key, value)

    def _kv_scale(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A scale as float32; one that is not there is 1, as runtimes take it."""
        own = self._own(name)
        if own not in self.checkpoint.entries:
            return torch.ones(shape, device=self.device)
        return self._stored(own, self._read(own)).to(self.device, torch.float32).reshape(shape)

    def float_name(self, module: str) -> FloatName:
        """The dtype that the checkpoint stores a plain matrix in."""
        return self.checkpoint.float_names[self._linears[module].tensor]

    def nbytes(self, modules: Iterable[str]) -> int:
        """Bytes in the files of the given matrices."""
        total = 0
        for module in modules:
            linear = self._linears[module]
            if self.is_quantized(module):
                total += sum(self.checkpoint.entries[name].nbytes for name in self._names(linear).values())
            else:
                total += self._matrices.nbytes(linear)
        return total

    def _own(self, name: str) -> str:
        return rename(name, self._naming, self._source_naming)

    def _names(self, linear: Linear) -> dict[str, str]:
        names: dict[str, str] = {suffix: f"{linear.module}.{suffix}" for suffix in Suffix}
        return {suffix: name for suffix, name in names.items() if name in self.checkpoint.entries}

    def _read(self, name: str) -> NDArray[Any]:
        if name not in self.checkpoint.entries:
            raise SourceError(f"{name} is missing from {self.checkpoint.name}", hint="is the checkpoint complete?")
        return self._reader.tensor(name)

    def _torch(self, name: str, array: NDArray[Any]) -> Tensor:
        return self._computable(self._stored(name, array))

    def _computable(self, stored: Tensor) -> Tensor:
        """On the device in the compute dtype. NumPy takes large buffers in huge pages, torch page by page: 3 x slower."""
        if self.device.type != "cpu" or stored.dtype is self.dtype or self.dtype is not torch.float32:
            return to_device(stored, self.device, self.dtype)
        return torch.from_numpy(np.empty(tuple(stored.shape), np.float32)).copy_(stored)

    def _stored(self, name: str, array: NDArray[Any]) -> Tensor:
        return _stored(array, self.checkpoint.entries[name].dtype)

    def _plain(self, together: Sequence[str], tiled: bool) -> list[LinearWeight] | list[TiledWeight]:
        """Matrices that lie side by side; they go to the device, and are widened, at once."""
        slab = self._matrices.slab([self._linears[module] for module in together])
        values = _stored(slab.values, slab.dtype)
        parts = slab.split(values if tiled else self._computable(values))
        out_in = [part.T for part in parts] if slab.layout is Layout.IN_OUT else parts
        return [TiledWeight(StoredTiles(one)) for one in out_in] if tiled else [LinearWeight(one) for one in out_in]

    def _quantized(self, module: str, linear: Linear, tiled: bool) -> LinearWeight | TiledWeight:
        given = self._quantization.scheme(module)
        arrays = {suffix: self._read(name) for suffix, name in self._names(linear).items()}
        activations = self._activations(given, arrays, linear, module)
        exact = given.scheme.input_activations is not None or (given.own is not None and given.own[1].super_blocked)
        rounded = None if exact else self.model_dtype
        if given.own is not None and Suffix.ORDER not in arrays:
            own = dequantizer(arrays, *given.own, linear.out_features, linear.in_features, module)
            if tiled:
                return TiledWeight(QuantizedTiles(own, rounded), activations)
            weight = torch.from_numpy(own.whole())
        else:
            stored = {suffix: self._stored(f"{linear.module}.{suffix}", array) for suffix, array in arrays.items()}
            weight = decompressed(_wide_scales(stored), given, module)
        return LinearWeight(self._computable(weight if rounded is None else weight.to(rounded)), activations)

    def _activations(
        self, given: Given, arrays: Mapping[str, NDArray[Any]], linear: Linear, module: str
    ) -> RoundedInputs | None:
        """What is done to a quantized matrix' inputs."""
        if not self._round_activations:
            return None
        suffix = next((one for one in INPUT_SCALES if one in arrays), None)
        stored = None if suffix is None else self._torch(f"{linear.module}.{suffix}", arrays[suffix])
        return activations_of(given.scheme, stored, module)


def stored_itemsize(checkpoint: Checkpoint) -> int:
    """The most bytes a weight takes where matrices stay as they are stored: those of float32 where some can't."""
    layout = detect_layout(checkpoint.config, checkpoint.entries)
    tensors = (checkpoint.entries.get(linear.tensor) for linear in layout.linears)
    widest = max((DTYPE_BITS[entry.dtype] // 8 for entry in tensors if entry is not None), default=2)
    stays = Quantization(checkpoint.config.stanza).reads_all and not _ordered(checkpoint)
    return max(2, widest) if stays else 4


def _ordered(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(f".{Suffix.ORDER}") for name in checkpoint.entries)


def _stored(array: NDArray[Any], dtype: str) -> Tensor:
    """An array as the reader gives it, with the torch type of its safetensors dtype."""
    tensor, kind = torch.from_numpy(array), _VIEWS.get(dtype)
    return tensor if kind is None else tensor.view(kind)


def _wide_scales(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """16-bit scales as float32, so that products are exact; FP8 scales stay, their format wants them so."""
    narrow = (torch.bfloat16, torch.float16)
    return {suffix: value.float() if value.dtype in narrow else value for suffix, value in stored.items()}
