"""Slow, plain references for the numeric core: one number at a time, and no code shared with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from l4pack.quant.grid import NumberType, ScaleDtype
from l4pack.quant.scheme import ScaleRule, Scheme, Strategy


def float_table(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> list[float]:
    """Every non-negative value of a small float format, in order, so that an even index is an even mantissa."""
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            power = (1 if exponent == 0 else exponent) - bias
            values.append(math.ldexp(fraction if exponent == 0 else 1 + fraction, power))
    return [value for value in values if value <= largest]


E4M3 = float_table(4, 3, 7, 448.0)
TABLES = {
    "BF16": float_table(8, 7, 127, 3.3895313892515355e38),
    "F16": float_table(5, 10, 15, 65504.0),
}
SMALLEST_NORMAL = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126}


def nearest(value: float, table: list[float]) -> int:
    """Index of the table entry nearest to a non-negative value, half to even, saturated at the largest."""
    low, high = 0, len(table) - 1
    if value >= table[high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if table[middle] <= value else (low, middle)
    below, above = value - table[low], table[high] - value
    if below == above:
        return low if low % 2 == 0 else high
    return low if below < above else high


def stored_scale(scale: np.float32, name: str) -> np.float32:
    """A scale as it is after storing: rounded to bfloat16, float16 or float32, normal and finite."""
    scale = np.float32(min(max(float(scale), SMALLEST_NORMAL[name]), 3.4028234663852886e38))
    return scale if name == "F32" else np.float32(TABLES[name][nearest(float(scale), TABLES[name])])


def scale_name(scheme: Scheme, source: str) -> str:
    names = {ScaleDtype.BFLOAT16: "BF16", ScaleDtype.FLOAT16: "F16", ScaleDtype.FLOAT32: "F32"}
    return names.get(scheme.scale_dtype, source)


def range_qparams(low: np.float32, high: np.float32, scheme: Scheme, name: str) -> tuple[np.float32, int]:
    """Scale and zero point of the range [low, high], zero included."""
    low, high = np.float32(min(low, 0)), np.float32(max(high, 0))
    if scheme.symmetric:
        amax = np.float32(max(abs(low), abs(high)))
        divisor = 448.0 if scheme.type is NumberType.FLOAT else (2**scheme.num_bits - 1) / 2
        if scheme.scale_rule is ScaleRule.META:
            divisor = 2.0 ** (scheme.num_bits - 1)
        return stored_scale(np.float32(amax / np.float32(divisor)), name), 0
    lowest = -(2 ** (scheme.num_bits - 1))
    width = np.float32(high - low)
    scale = stored_scale(np.float32(width / np.float32(2**scheme.num_bits - 1)), name)
    zero_point = round(float(np.float32(np.float32(lowest) - np.float32(low / scale))))
    return scale, min(max(zero_point, lowest), -lowest - 1)


def code_of(weight: np.float32, scale: np.float32, zero_point: int, scheme: Scheme) -> int:
    """Stored code of one weight: E4M3FN bits, or level + 2^(bits-1)."""
    ratio = float(np.float32(weight / scale))
    if scheme.type is NumberType.FLOAT:
        return nearest(abs(ratio), E4M3) + (128 if math.copysign(1, ratio) < 0 else 0)
    half = 2 ** (scheme.num_bits - 1)
    level = round(min(max(ratio, -1e6), 1e6)) + zero_point
    return min(max(level, -half), half - 1) + half


def value_of(code: int, scale: np.float32, zero_point: int, scheme: Scheme) -> float:
    """The real number a stored code stands for."""
    if scheme.type is NumberType.FLOAT:
        return (-1 if code >= 128 else 1) * E4M3[code & 127] * float(scale)
    return (code - 2 ** (scheme.num_bits - 1) - zero_point) * float(scale)


@dataclass
class Reference:
    """codes [out, in], scales and zero points in the shape of the stored scales, dequantized weights [out, in]."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    dequantized: np.ndarray


def regions(shape: tuple[int, int], scheme: Scheme) -> list[list[tuple[slice, slice]]]:
    """The rows and columns that share each scale, arranged as the stored scales are."""
    out_features, in_features = shape
    height, width = 1, in_features
    if scheme.strategy is Strategy.TENSOR:
        height = out_features
    elif scheme.strategy is Strategy.BLOCK:
        height, width = scheme.block_structure
    elif scheme.strategy is Strategy.GROUP:
        width = scheme.group_size
    return [
        [(slice(o, o + height), slice(i, i + width)) for i in range(0, in_features, width)]
        for o in range(0, out_features, height)
    ]


def quantize(weight: np.ndarray, scheme: Scheme, source: str, shrink: np.ndarray | None = None) -> Reference:
    """Quantize float32 weights [out, in]; `shrink` is the fraction of each range kept, in the shape of the scales."""
    arranged = regions(weight.shape, scheme)
    scale = np.zeros((len(arranged), len(arranged[0])), np.float32)
    zero_point = np.zeros(scale.shape, int)
    codes, dequantized = np.zeros(weight.shape, np.uint8), np.zeros(weight.shape)
    for a, b in np.ndindex(scale.shape):
        region = arranged[a][b]
        fraction = np.float32(1) if shrink is None else np.float32(shrink[a, b])
        low, high = min(weight[region].min(), np.float32(0)), max(weight[region].max(), np.float32(0))
        s, z = range_qparams(low * fraction, high * fraction, scheme, scale_name(scheme, source))
        scale[a, b], zero_point[a, b] = s, z
        part = weight[region]
        code = [code_of(w, s, z, scheme) for w in part.flat]
        codes[region] = np.reshape(code, part.shape)
        dequantized[region] = np.reshape([value_of(c, s, z, scheme) for c in code], part.shape)
    return Reference(codes, scale, zero_point, dequantized)


def pack(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """Stored codes [rows, columns] as int32 words, lowest bits first, zero bits at the end."""
    per_word = 32 // num_bits
    words = []
    for row in codes:
        padded = [int(code) for code in row] + [0] * (-len(row) % per_word)
        for start in range(0, len(padded), per_word):
            word = sum(code << (num_bits * k) for k, code in enumerate(padded[start : start + per_word]))
            words.append(word - 2**32 if word >= 2**31 else word)
    return np.reshape(np.array(words, np.int64).astype(np.int32), (len(codes), -1))


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    scheme: Scheme,
    order: np.ndarray,
) -> np.ndarray:
    """Optimal brain quantization of all rows at once, one column at a time, in float64: levels [out, in], those of
    four-bit floats in halves.

    The textbook form: invert the (damped) Hessian, round a column, move its error onto the others, and eliminate the
    column from the inverse. `scale` and `zero_point` are given for every weight.
    """
    weight, inverse = weight.astype(np.float64), np.linalg.inv(hessian.astype(np.float64))
    levels = np.zeros(weight.shape)
    for j in order:
        step, zero = scale[:, j], zero_point[:, j]
        levels[:, j] = [nearest_level(x, z, scheme) for x, z in zip(weight[:, j] / step, zero, strict=True)]
        error = (weight[:, j] - (levels[:, j] - zero) * step) / inverse[j, j]
        weight = weight - np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return levels


def row_losses(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """(w - q) H (w - q)^T of each row, in float64."""
    residual = weight.astype(np.float64) - quantized
    return np.einsum("oi,ij,oj->o", residual, hessian.astype(np.float64), residual)


E2M1 = float_table(2, 1, 1, 6.0)


def fp4_scale(amax: float, kind: ScaleDtype, over: float, offset: int = 0) -> tuple[int, float]:
    """Code and value of the scale of a group of largest magnitude `amax`; `offset` codes above or below it."""
    if kind is ScaleDtype.E8M0:
        fraction, exponent = math.frexp(amax)  # fraction in [0.5, 1)
        power = exponent - 1 - 2 + (fraction >= 0.875) if amax else -127
        code = min(max(min(max(power + 127, 0), 252) + offset, 0), 252)
        return code, 2.0 ** (code - 127)
    ratio = np.float32(np.float32(np.float32(amax) / np.float32(6)) * np.float32(over))
    code = nearest(float(ratio), E4M3) or 0x20
    code = min(max(code + offset, 1), 126) if offset else code
    return code, E4M3[code] / over


def fp4(weight: np.ndarray, scheme: Scheme, over: float, offset: int = 0) -> Reference:
    """Four-bit floats of float32 weights [out, in], with every group's scale `offset` codes from that of its range."""
    out_features, size = len(weight), scheme.group_size
    groups = weight.reshape(out_features, -1, size)
    scale, codes = np.zeros(groups.shape[:2], int), np.zeros(groups.shape, np.uint8)
    values = np.zeros(groups.shape)
    for o, g in np.ndindex(scale.shape):
        scale[o, g], step = fp4_scale(float(np.abs(groups[o, g]).max()), scheme.scale_dtype, over, offset)
        for i, w in enumerate(groups[o, g]):
            index = nearest(abs(float(np.float32(w / np.float32(step)))), E2M1)
            codes[o, g, i] = index + (8 if w < 0 and index else 0)
            values[o, g, i] = (-1 if w < 0 else 1) * E2M1[index] * step
    return Reference(codes.reshape(weight.shape), scale, np.zeros(scale.shape, int), values.reshape(weight.shape))


def nearest_level(ratio: float, zero: float, scheme: Scheme) -> float:
    """The level nearest to a weight divided by its scale; those of four-bit floats in halves."""
    if scheme.type is NumberType.FLOAT:
        table, unit = (E2M1, 2) if scheme.num_bits == 4 else (E4M3, 1)
        return float(np.sign(ratio) * unit * table[nearest(abs(ratio) / unit, table)])
    half = 2 ** (scheme.num_bits - 1)
    return float(np.clip(np.rint(ratio) + zero, -half, half - 1))


def two_sided_gptq(
    weight: np.ndarray,
    outputs: np.ndarray,
    inputs: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    scheme: Scheme,
    order: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Optimal brain quantization under tr(H_O R H_I R^T), one weight at a time, in float64: levels [out, in].

    The textbook form twice: columns are visited in turn, and in each of them its rows, which are eliminated from the inverse
    of H_O one by one. `scale` and `zero_point` are given for every weight, `order` is that of rows and of columns.
    """
    rows, columns = order
    weight = weight.astype(np.float64).copy()
    levels = np.zeros(weight.shape)
    inverse_in = np.linalg.inv(inputs.astype(np.float64))
    for j in columns:
        column, inverse_out = weight[:, j].copy(), np.linalg.inv(outputs.astype(np.float64))
        for i in rows:
            levels[i, j] = nearest_level(column[i] / scale[i, j], zero_point[i, j], scheme)
            error = (column[i] - (levels[i, j] - zero_point[i, j]) * scale[i, j]) / inverse_out[i, i]
            column -= error * inverse_out[i]
            inverse_out -= np.outer(inverse_out[:, i], inverse_out[i]) / inverse_out[i, i]
        error = (weight[:, j] - (levels[:, j] - zero_point[:, j]) * scale[:, j]) / inverse_in[j, j]
        weight -= np.outer(error, inverse_in[j])
        inverse_in -= np.outer(inverse_in[:, j], inverse_in[j]) / inverse_in[j, j]
    return levels


def two_sided_sweep(
    levels: np.ndarray,
    target: np.ndarray,
    outputs: np.ndarray,
    inputs: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    scheme: Scheme,
    tile: int,
) -> np.ndarray:
    """One sweep of coordinate descent on tr(H_O R H_I R^T), every pull found anew in float64: new levels [out, in]. Tiles of
    columns in turn, in each the tiles of rows, in those column by column."""
    levels, (height, width) = levels.astype(np.float64).copy(), levels.shape
    for left in range(0, width, tile):
        for top in range(0, height, tile):
            for j in range(left, min(left + tile, width)):
                for i in range(top, min(top + tile, height)):
                    s, z = float(scale[i, j]), float(zero_point[i, j])
                    residual = target - (levels - zero_point) * scale
                    pull = outputs[i] @ residual @ inputs[:, j]
                    wanted = (levels[i, j] - z) * s + pull / (outputs[i, i] * inputs[j, j])
                    levels[i, j] = nearest_level(wanted / s, z, scheme)
    return levels


def two_sided_loss(residual: np.ndarray, outputs: np.ndarray, inputs: np.ndarray) -> float:
    """tr(H_O R H_I R^T), in float64."""
    return float(np.trace(outputs @ residual @ inputs @ residual.T))
