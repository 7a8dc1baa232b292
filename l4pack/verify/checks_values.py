"""Checks of the bytes: scales, packing, FP8 codes, kept tensors, KV scales, digests. One matrix, or one chunk, at a
time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.reader import Reader
from l4pack.model.names import classify
from l4pack.model.tensors import Role
from l4pack.quant.dequantize import scales_of
from l4pack.quant.dtypes import FLOATS, FloatName
from l4pack.quant.floats import widen
from l4pack.quant.grid import E4M3, ScaleDtype
from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Scheme
from l4pack.quant.suffixes import INPUT_SCALES, Suffix
from l4pack.verify.checks_kernels import scan
from l4pack.verify.checks_tensors import Matrix
from l4pack.verify.findings import Findings, Level
from l4pack.verify.tally import UnitResult

CHUNK = 16 * 1024**2
_FINGERPRINT_BYTES = 1 << 20
_LARGEST_WEIGHT = 65504.0  # the largest F16: no weight of a language model comes near
_SMALLEST_WEIGHT = 1e-12
_FEW_SCALES = 8  # fewer may be equal by chance
_E4M3_NAN = 0x7F  # the code of NaN, and all bits of a code but its sign

Arrays = dict[str, NDArray[Any]]  # suffix -> stored array


class ValueChecks:
    """Reads an artifact's tensors and checks their values; one instance serves all threads."""

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        reader: Reader,
        digests: Mapping[str, str],
        advance: Callable[[int], None],
    ) -> None:
        self._entries, self._reader, self._digests, self._advance = entries, reader, digests, advance

    def read(self, matrix: Matrix, result: UnitResult) -> Arrays:
        """The arrays of a quantized matrix, held against the manifest's digests."""
        return {suffix: self._whole(entry, result) for suffix, entry in matrix.parts.items() if suffix != "bias"}

    def matrix(self, matrix: Matrix, arrays: Arrays, result: UnitResult, *, explained: bool = False) -> None:
        """Check what a quantized matrix holds; `explained` means that the source says that it must be just this."""
        result.tally.matrices += 1
        module, stored = matrix.linear.module, matrix.decode(arrays)
        dead = is_dead(stored.values, matrix.scheme)
        if dead and not explained:
            message = "every weight of the matrix has the same code: right only if the source's are all zero"
            result.found.warning("dead", module, message)
        _check_scales(matrix, stored, dead or explained, result)
        for suffix in INPUT_SCALES:
            if suffix in arrays:
                _check_positive(matrix.parts[suffix].name, widen(arrays[suffix]), result)
        if stored.global_scale is not None:
            _check_positive(matrix.parts[Suffix.GLOBAL_SCALE].name, stored.global_scale, result)
        if matrix.scheme.grid is E4M3:
            bad, _ = scan(stored.values.reshape(-1), _E4M3_NAN, _E4M3_NAN)
            if bad:
                result.found.error("not-finite", matrix.values, f"{bad:,} of its FP8 codes are NaN")
        elif matrix.scheme.grid.even:
            _check_packing(matrix, stored, arrays.get(Suffix.SHAPE), result)
        if matrix.linear.role is Role.ROUTED_EXPERT and not dead:
            result.fingerprints[module] = fingerprint(stored.values, stored.scale)

    def kept(self, name: str, result: UnitResult, other: Callable[[int, int], NDArray[np.uint8]] | None) -> None:
        """Check an unquantized tensor chunk by chunk; `other(start, nbytes)` gives the source's bytes."""
        entry = self._entries[name]
        digest, bad, alive, differs = hashlib.sha256(), 0, False, False
        kind = FLOATS[cast(FloatName, entry.dtype)]
        for start in range(0, entry.nbytes, CHUNK):
            chunk = self._reader.span(name, start, min(CHUNK, entry.nbytes - start))
            some, any_value = scan(chunk.view("u4" if entry.dtype == "F32" else "u2"), kind.exponent, kind.magnitude)
            bad, alive = bad + some, alive or any_value
            if name in self._digests:
                digest.update(chunk.data)
            if other is not None and not differs:
                differs = not np.array_equal(chunk, other(start, chunk.nbytes))
            self._advance(chunk.nbytes)
        self._count(entry, result, digest.hexdigest())
        if bad:
            result.found.error("not-finite", name, f"{bad:,} of its values are NaN or infinite")
        if not alive and not name.endswith("bias") and (other is None or differs):
            level = result.found.warning if other is None else result.found.error
            level("dead", name, "holds nothing but zeros" if other is None else "holds zeros, the source does not")
        if other is not None:
            result.tally.kept_compared += 1
            if differs and alive:
                result.found.error("kept", name, "its bytes differ from the source's")

    def kv_scale(self, name: str, result: UnitResult) -> list[float]:
        """Check one KV-cache scale of a layer or of its heads; returns its numbers."""
        value = widen(self._whole(self._entries[name], result))
        _check_positive(name, value, result, rule="kv-scale")
        return [float(number) for number in value.reshape(-1)]

    def _whole(self, entry: TensorEntry, result: UnitResult) -> NDArray[Any]:
        array = self._reader.tensor(entry.name)
        digest = hashlib.sha256(_bytes(array)).hexdigest() if entry.name in self._digests else ""
        self._count(entry, result, digest)
        self._advance(entry.nbytes)
        return array

    def _count(self, entry: TensorEntry, result: UnitResult, digest: str) -> None:
        result.tally.tensors += 1
        result.tally.bytes += entry.nbytes
        if entry.name in self._digests:
            result.tally.digests += 1
            if self._digests[entry.name] != digest:
                result.found.error("digest", entry.name, "its SHA-256 is not the manifest's")


def is_dead(values: NDArray[Any], scheme: Scheme) -> bool:
    """Whether every weight of a matrix [out, ...] has the same code."""
    flat = values.reshape(-1)
    if scheme.grid is E4M3:
        return not scan(flat, _E4M3_NAN, _E4M3_NAN)[1]
    width = 8 * flat.itemsize
    codes = int(flat[0]) & ((1 << width) - 1)
    code = codes & ((1 << scheme.num_bits) - 1)
    same = sum(code << shift for shift in range(0, width, scheme.num_bits))
    return codes == same and not bool((flat != flat[0]).any())


def _check_positive(name: str, scale: NDArray[np.float32], result: UnitResult, rule: str = "scale") -> bool:
    for wrong, what in ((~np.isfinite(scale), "NaN or infinite"), (scale <= 0, "not above zero")):
        count = int(wrong.sum())
        if count:
            result.found.error(rule, name, f"{count:,} of {scale.size:,} scales are {what}")
            return False
    return True


def _check_scales(matrix: Matrix, stored: Quantized, dead: bool, result: UnitResult) -> None:
    name = matrix.parts[Suffix.SCALE].name
    with np.errstate(all="ignore"):  # of a global scale that is no number
        scale = scales_of(stored, matrix.scheme)
    if not _check_positive(name, scale, result) or dead:
        return
    top, powers_of_two = -matrix.scheme.grid.lowest, matrix.scheme.scale_dtype is ScaleDtype.E8M0
    largest, smallest = float(scale.max()), float(scale.min())
    if largest * top > _LARGEST_WEIGHT:
        result.found.error("scale", name, f"a scale of {largest:g} makes weights up to {largest * top:g}")
    elif largest * top < _SMALLEST_WEIGHT:
        result.found.error("scale", name, f"no scale above {largest:g}: the weights vanish")
    elif scale.size >= _FEW_SCALES and largest == smallest and (largest == 1 or not powers_of_two):
        result.found.error("scale", name, f"all {scale.size:,} scales are {largest:g}: they were never computed")


def _check_packing(matrix: Matrix, stored: Quantized, shape: NDArray[Any] | None, result: UnitResult) -> None:
    size = (matrix.linear.out_features, matrix.linear.in_features)
    if shape is not None and shape.tolist() != list(size):
        name = matrix.parts[Suffix.SHAPE].name
        result.found.error("weight_shape", name, f"says {shape.tolist()}, should be {list(size)}")
    used = size[1] % matrix.scheme.pack_factor * matrix.scheme.num_bits
    _check_padding(matrix.values, stored.values[:, -1], used, result)
    if stored.zero_point is not None:
        used = size[0] % matrix.scheme.pack_factor * matrix.scheme.num_bits
        _check_padding(matrix.parts[Suffix.ZERO_POINT].name, stored.zero_point[-1], used, result)


def _check_padding(name: str, last_words: NDArray[np.int32], used_bits: int, result: UnitResult) -> None:
    """Words at the end of a row are filled up with zero bits; 0 used bits mean that none are left over."""
    if used_bits and bool((last_words.view(np.uint32) >> np.uint32(used_bits)).any()):
        result.found.error("packing", name, f"bits above the first {used_bits} of its last words are set")


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def fingerprint(values: NDArray[Any], scale: NDArray[Any]) -> bytes:
    """Enough of a matrix's bytes (codes [out, ...], scales) to tell it from any other; identical ones have identical
    ones."""
    digest = hashlib.blake2b(_bytes(values)[:_FINGERPRINT_BYTES], digest_size=16)
    digest.update(_bytes(scale)[:_FINGERPRINT_BYTES])
    return digest.digest()


def duplicates(fingerprints: Mapping[str, bytes], sources: Mapping[str, bytes], found: Findings, level: Level) -> None:
    """Two experts of one layer, same projection, with the same bytes, unless they are the same in the source too."""
    first: dict[tuple[int | None, str, bytes], str] = {}
    for module, value in fingerprints.items():
        key = (classify(f"{module}.weight").layer, module.rpartition(".")[2], value)
        twin = first.setdefault(key, module)
        if twin != module and (module not in sources or sources[module] != sources.get(twin)):
            tell = found.error if level == "error" else found.warning
            tell("duplicate", module, f"has the same bytes as {twin}")
