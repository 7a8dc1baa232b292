"""MLX as a target: the folder of mlx-lm, read back by MLX itself where it is installed.

Without it (MLX is made for Apple's machines), a weight is scale * code + bias in float32, which is what MLX computes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.header import read_header
from l4pack.checkpoint.shards import FilePlace
from l4pack.containers.mlx import FOLDER, NORM_EPS, Group, check_text, configuration, tensor_name
from l4pack.containers.safetensors_folder import DEFAULT_SHARD_BYTES
from l4pack.errors import L4packError
from l4pack.export.artifact import Artifact, Source
from l4pack.export.reread import same_words
from l4pack.export.target import TOWER, Carried, Layout, OutTensor
from l4pack.formats.carrier import Carrier, SolvedRows
from l4pack.formats.mlx import ROUNDED_TO, Affine, Microscaling, carrier_of
from l4pack.model.config import Llama4Config
from l4pack.model.names import split_suffix
from l4pack.model.tensors import Role
from l4pack.quant.floats import HELD_AS, Float32Array, widen
from l4pack.quant.grid import E2M1
from l4pack.quant.packing import unpack_levels
from l4pack.quant.scheme import Scheme

_QUANTIZED = (Affine, Microscaling)


class Mlx:
    """See `Target`."""

    name = "mlx"
    clients = "MLX (mlx-lm)"
    rounded_to = ROUNDED_TO
    alignment = 1

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def check_model(self, config: Llama4Config) -> None:
        """See `Target`."""
        check_text(config)

    def as_run(self, config: Llama4Config) -> Llama4Config:
        """See `Target`."""
        return config

    def check(self, artifact: Artifact) -> list[str]:
        """See `Target`."""
        text = artifact.config.text
        found = []
        if not self._installed:
            found.append("MLX is not installed here: what is written is proved by its arithmetic, not by MLX itself")
        if text.use_qk_norm and text.rms_norm_eps != NORM_EPS:
            found.append(f"mlx-lm norms queries and keys with epsilon {NORM_EPS}, the model has {text.rms_norm_eps}")
        return found

    def carrier(self, scheme: Scheme, columns: int, dtype: str) -> Carrier | str:
        """See `Target`."""
        return carrier_of(scheme, columns, dtype)

    def holds(self, role: Role) -> bool:
        """See `Target`."""
        return role not in TOWER

    def carries(self, file: str) -> bool:
        """See `Target`: the tokenizer's files and all others that runtimes read."""
        del file
        return True

    def tensor_name(self, artifact: Artifact, source: str, role: Role, layer: int | None, suffix: str) -> str:
        """See `Target`."""
        return tensor_name(source, artifact.layout.naming, role, layer, suffix)

    def float_type(self, artifact: Artifact, role: Role, source: Source, shape: tuple[int, ...]) -> str:
        """See `Target`."""
        del artifact, role, shape
        return source.dtype

    def constants(self, artifact: Artifact) -> list[Carried]:
        """See `Target`: a head of its own, which mlx-lm wants where the embedding is tied to it."""
        naming = artifact.layout.naming
        if not artifact.config.text.tie_word_embeddings:
            return []
        spec = artifact.layout.by_name[naming.embedding]
        source = artifact.tensor(spec)
        name = tensor_name(naming.head_weight, naming, Role.LM_HEAD, None, "")
        width = source.columns * np.dtype(HELD_AS[source.dtype]).itemsize
        tensor = OutTensor(name, source.dtype, spec.shape, source.rows * width, width)
        return [Carried(Role.LM_HEAD, (source,), (tensor,))]

    def lay_out(self, artifact: Artifact, carried: Sequence[Carried], limit: int | None) -> Layout:
        """See `Target`."""
        shards, places = FOLDER.lay_out([one.tensors for one in carried], limit or DEFAULT_SHARD_BYTES)
        index = FOLDER.index(shards, sum(tensor.nbytes for one in carried for tensor in one.tensors))
        carriers = {split_suffix(one.name)[0]: one.carrier for one in carried}
        groups = {
            module: Group(one.group, one.bits, one.mode)
            for module, one in carriers.items()
            if isinstance(one, _QUANTIZED)
        }
        beside = {} if index is None else {FOLDER.index_name: index}
        return Layout(tuple(shards), places, {**beside, FOLDER.config_name: configuration(artifact.config, groups)})

    @property
    def proved_by(self) -> str:
        """See `Target`."""
        return f"mlx {_version()}" if self._installed else "arithmetic, without MLX"

    def opened(self, folder: Path, layout: Layout) -> Mapping[str, FilePlace]:
        """See `Target`."""
        found: dict[str, FilePlace] = {}
        for shard in layout.shards:
            for name, entry in read_header(folder / shard.file, shard.file).items():
                found[name] = FilePlace(entry.file, entry.start, entry.nbytes)
        if found != dict(layout.places):
            raise L4packError("the files hold other tensors than were written", hint="add --restart")
        return found

    def same_codes(self, carried: Carried, rows: Sequence[NDArray[np.uint8]], solved: SolvedRows) -> bool | None:
        """See `Target`."""
        carrier = carried.carrier
        return same_words(carrier, rows, solved) if isinstance(carrier, _QUANTIZED) else None

    def decode(self, carried: Carried, rows: Sequence[NDArray[np.uint8]]) -> Float32Array:
        """See `Target`."""
        held = [_typed(raw, tensor.dtype) for raw, tensor in zip(rows, carried.tensors, strict=True)]
        if not isinstance(carried.carrier, _QUANTIZED):
            return widen(held[0])
        if self._installed:
            return self._by_mlx(carried.carrier, *held)
        return _by_arithmetic(carried.carrier, *held)

    @cached_property
    def _installed(self) -> bool:
        return find_spec("mlx") is not None

    def _by_mlx(self, kind: Affine | Microscaling, words: NDArray[Any], *scales: NDArray[Any]) -> Float32Array:
        import mlx.core as mx

        with self._lock, mx.stream(mx.cpu):
            given = [mx.array(values if values.dtype == np.uint8 else widen(values)) for values in scales]
            made = mx.dequantize(
                mx.array(words), *given, group_size=kind.group, bits=kind.bits, mode=kind.mode, dtype=mx.float32
            )
            values: Float32Array = np.array(made)
        return values


def _typed(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    return raw.view({"U32": np.uint32, "U8": np.uint8}.get(dtype) or HELD_AS[dtype])


def _by_arithmetic(kind: Affine | Microscaling, words: NDArray[Any], *scales: NDArray[Any]) -> Float32Array:
    """scale * code + bias, where codes are levels plus half their range; an E2M1 number times its power of two."""
    columns = scales[0].shape[1] * kind.group
    levels = unpack_levels(words.view(np.int32), kind.bits, columns).reshape(len(words), -1, kind.group)
    codes = levels.astype(np.int16) + (1 << (kind.bits - 1))
    if isinstance(kind, Microscaling):
        values = np.ldexp(np.array(E2M1.values, np.float32)[codes], scales[0].astype(np.int32)[..., None] - 127)
    else:
        scale, bias = (widen(part)[..., None] for part in scales)
        values = codes.astype(np.float32) * scale + bias
    made: Float32Array = values.reshape(len(words), columns)
    return made


def _version() -> str:
    try:
        return version("mlx")
    except PackageNotFoundError:
        return "of unknown version"
