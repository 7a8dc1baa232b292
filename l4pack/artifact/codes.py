"""Quantized matrices as tensors of a source: codes are multiplied by their scales as they are read.

The product of a code and a scale is taken in float32, which has it exactly for 16-bit scales and rounds it once for float32
ones. No more than a few thousand rows' bytes are held beside the result, and every scale that is read must be a positive,
finite number: a source is checked where it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from l4pack.checkpoint.header import Box, Numbers, TensorEntry
from l4pack.errors import SourceError
from l4pack.formats.format import NUMBERS, Format, Holds
from l4pack.formats.known import load_format
from l4pack.model.tensors import Linear
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.quant.suffixes import Suffix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l4pack.quant.floats import Float32Array
    from l4pack.quant.quantized import Quantized

ROWS = 128  # whole words of zero points, whole blocks of FP8
_WEIGHTS = 1 << 18  # that are decoded at once
_DAMAGED = "the checkpoint is damaged: download it again, or quantize it again from its original"


class Codes(Protocol):
    """A derivation of matrices that lie in their file as codes and scales; see `header.Derivation`."""

    @property
    def scheme(self) -> Scheme:
        """How they are quantized."""
        ...

    @property
    def scale_dtype(self) -> str:
        """The safetensors dtype of the scales."""
        ...

    def quantized(self, reader: Numbers, linear: Linear, rows: slice) -> Quantized:
        """Output rows of a matrix as they are stored, codes [out, in]; whole blocks and words. Raises SourceError."""
        ...


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """One matrix [out, in] in a format that this package reads: `pieces` are its tensors by suffix."""

    module: str
    form: str
    scheme: Scheme
    shape: tuple[int, int]
    pieces: tuple[tuple[Suffix, TensorEntry], ...]

    @property
    def stored(self) -> Mapping[str, int]:
        """Bytes of the pieces by file."""
        return _by_file(entry for _, entry in self.pieces)

    @property
    def scale_dtype(self) -> str:
        """See `Codes`."""
        return dict(self.pieces)[Suffix.SCALE].dtype

    def read(self, reader: Numbers, box: Box, out: NDArray[Any]) -> None:
        """Products of codes and scales, float32. Raises SourceError."""
        from l4pack.quant.dequantize import Dequantizer

        (first, last), columns = box[0], slice(*box[1])
        width = self.shape[1]
        step = max(ROWS, _WEIGHTS // width // ROWS * ROWS)
        for start in range(first // ROWS * ROWS, last, step):
            stop = min(start + step, self.shape[0])
            values = Dequantizer(self._rows(reader, slice(start, stop)), self.scheme, stop - start, width).whole()
            begin, end = max(start, first), min(stop, last)
            out[begin - first : end - first] = values[begin - start : end - start, columns]

    def quantized(self, reader: Numbers, linear: Linear, rows: slice) -> Quantized:
        """See `Codes`."""
        del linear
        start, stop, _ = rows.indices(self.shape[0])
        return self._rows(reader, slice(start, stop))

    def _rows(self, reader: Numbers, rows: slice) -> Quantized:
        form, arrays = load_format(self.form), {}
        for piece in form.pieces:
            entry = dict(self.pieces).get(piece.suffix)
            if piece.holds in NUMBERS and entry is not None:
                arrays[str(piece.suffix)] = _piece(reader, entry, piece.rows_in_one(self.scheme), rows)
        made = form.decode(arrays, self.scheme, rows.stop - rows.start, self.shape[1], self.module)
        check_scales(made, self.scheme, self.module)
        return made


@dataclass(frozen=True, slots=True)
class CodedExperts:
    """All experts' matrices of one projection in a fused FP8 tensor [expert, in, out], a scale an output channel.

    `scale` is seen as [expert, 1, out] whatever shape the file gives it.
    """

    codes: TensorEntry
    scale: TensorEntry

    @property
    def scheme(self) -> Scheme:
        """FP8 by output channel."""
        return FP8_CHANNEL

    @property
    def stored(self) -> Mapping[str, int]:
        """Bytes of codes and scales by file."""
        return _by_file((self.codes, self.scale))

    @property
    def scale_dtype(self) -> str:
        """See `Codes`."""
        return self.scale.dtype

    def read(self, reader: Numbers, box: Box, out: NDArray[Any]) -> None:
        """Products of codes and scales, float32. Raises SourceError."""
        import numpy as np

        from l4pack.quant.floats import widen

        experts, rows, columns = box
        table = np.array(self.scheme.grid.values, np.float32)
        step = max(1, _WEIGHTS // max(1, columns[1] - columns[0]))
        for expert in range(*experts):
            one = (expert, expert + 1)
            scale = widen(reader.part(self.scale, (one, (0, 1), columns)))[0]
            _check_positive(scale, self.scale.name)
            for start in range(*rows, step):
                stop = min(start + step, rows[1])
                codes = reader.part(self.codes, (one, (start, stop), columns))[0]
                out[expert - experts[0], start - rows[0] : stop - rows[0]] = table[codes] * scale

    def quantized(self, reader: Numbers, linear: Linear, rows: slice) -> Quantized:
        """See `Codes`."""
        import numpy as np

        from l4pack.quant.floats import widen
        from l4pack.quant.quantized import Quantized

        assert linear.expert is not None
        start, stop, _ = rows.indices(linear.out_features)
        one, columns = (linear.expert, linear.expert + 1), (linear.column + start, linear.column + stop)
        codes = reader.part(self.codes, (one, (0, linear.in_features), columns))[0]
        scale = reader.part(self.scale, (one, (0, 1), columns))[0]
        _check_positive(widen(scale), self.scale.name)
        return Quantized(np.ascontiguousarray(codes.T), np.ascontiguousarray(scale.T), None)


FP8_CHANNEL = Scheme.model_validate({"num_bits": 8, "type": "float", "strategy": Strategy.CHANNEL})


def codes_of(entry: TensorEntry | None) -> Codes | None:
    """The codes that a tensor is the product of; None for one that lies in its file as numbers."""
    derived = None if entry is None else entry.derived
    return derived if isinstance(derived, CodedMatrix | CodedExperts) else None


def check_scales(made: Quantized, scheme: Scheme, module: str) -> None:
    """Raise SourceError for a scale that is no positive, finite number."""
    import numpy as np

    from l4pack.quant.dequantize import scales_of

    if made.global_scale is not None:
        _check_positive(made.global_scale, f"{module}.{Suffix.GLOBAL_SCALE}")
    with np.errstate(all="ignore"):
        _check_positive(scales_of(made, scheme), f"{module}.{Suffix.SCALE}")


def _check_positive(scale: Float32Array, name: str) -> None:
    import numpy as np

    if not np.isfinite(scale).all():
        raise SourceError(f"{name} holds a scale that is NaN or infinite", hint=_DAMAGED)
    if (scale <= 0).any():
        raise SourceError(f"{name} holds a scale that is zero or negative", hint=_DAMAGED)


def _by_file(entries: Any) -> Mapping[str, int]:
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.file] += entry.nbytes
    return dict(sizes)


def _piece(reader: Numbers, entry: TensorEntry, rows_in_one: int, rows: slice) -> NDArray[Any]:
    """What belongs to some output rows, of which `rows_in_one` share a row; 0: all of them."""
    every = [(0, size) for size in entry.shape]
    if rows_in_one and len(every) == 2:
        every[0] = rows.start // rows_in_one, -(-rows.stop // rows_in_one)
    return reader.part(entry, tuple(every))


def stored_shapes(form: Format, scheme: Scheme, size: tuple[int, int]) -> dict[Suffix, tuple[int, ...]]:
    """The shapes of the tensors that a matrix's numbers are read from, by suffix."""
    wanted = {piece.suffix for piece in form.pieces if piece.holds in (*NUMBERS, Holds.SHAPE)}
    return {one.suffix: one.shape for one in form.stored(scheme, *size, "BF16") if one.suffix in wanted}
