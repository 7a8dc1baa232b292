"""`superblocks` on torch tensors: the same bytes on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from l4pack.quant.superblocks import (
    BLOCK,
    BLOCKS,
    FRACTIONS,
    HEADER,
    HIGHEST_CODE,
    HIGHEST_LEVEL,
    LARGEST,
    NEIGHBOURS,
    SMALLEST,
    ZERO_POINT,
)

ROWS_AT_ONCE = 1 << 20  # weights whose scales are looked for together


def search(weight: Tensor, importance: Tensor) -> Tensor:
    """The scales of weights [rows, columns], uint8 [rows, columns / 16]; `importance` is [rows or 1, columns], float32.

    Nothing is asked of the device: a weight that is not finite gives a scale that means nothing.
    """
    step = max(1, ROWS_AT_ONCE // weight.shape[1])
    pieces = []
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        pieces.append(_search(weight[rows].float(), importance if len(importance) == 1 else importance[rows]))
    return torch.cat(pieces)


def _search(weight: Tensor, importance: Tensor) -> Tensor:
    x, w = _blocks(weight), _blocks(importance.float())
    scale, minimum = _fit_blocks(x, w)
    wide_scale, wide_minimum = _step(scale), _step(minimum)
    scale_step, minimum_step = (one.float().repeat_interleave(BLOCKS, dim=1) for one in (wide_scale, wide_minimum))
    codes = _choose_codes(x, w, scale, minimum, scale_step, minimum_step)
    return _packed(wide_scale, wide_minimum, *codes)


def values_of(headers: Tensor) -> tuple[Tensor, Tensor]:
    """float32 scales and minima of blocks, [..., blocks] each, of uint8 [..., columns / 16]."""
    each = headers.contiguous().view(*headers.shape[:-1], -1, HEADER)
    wide = each[..., :4].contiguous().view(torch.float16).float()
    low, high, both = each[..., 4:8], each[..., 8:12], each[..., 12:]
    scale = torch.cat((low & 63, (both & 15) | (low >> 6 << 4)), -1).float() * wide[..., :1]
    minimum = torch.cat((high & 63, (both >> 4) | (high >> 6 << 4)), -1).float() * wide[..., 1:]
    return scale.flatten(-2), minimum.flatten(-2)


def levels_of(weight: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The nearest levels, from -8 to 7, int8 in the shape of `weight` [..., columns]; scales are [..., blocks]."""
    x = weight.float().view(*scale.shape, BLOCK)
    ratio = ((x + minimum[..., None]) / scale[..., None]).round()
    levels = ratio.clamp(0, HIGHEST_LEVEL) + ZERO_POINT
    return levels.to(torch.int8).view(weight.shape)


def _blocks(matrix: Tensor) -> Tensor:
    return matrix.reshape(len(matrix), -1, BLOCK)


def _step(values: Tensor) -> Tensor:
    largest = values.view(len(values), -1, BLOCKS).amax(-1) / HIGHEST_CODE
    return largest.clamp(SMALLEST, LARGEST).to(torch.float16)


def _packed(wide_scale: Tensor, wide_minimum: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    s, m = (codes.to(torch.uint8).view(*wide_scale.shape, BLOCKS) for codes in (scale, minimum))
    wide = torch.stack((wide_scale, wide_minimum), -1).view(torch.uint8)
    first = s[..., :4] | (s[..., 4:] >> 4 << 6)
    second = m[..., :4] | (m[..., 4:] >> 4 << 6)
    third = (s[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)
    return torch.cat((wide, first, second, third), -1).flatten(1)


def _halved(terms: Tensor) -> Tensor:
    half = BLOCK // 2
    while half:
        terms = terms[..., :half] + terms[..., half:]
        half //= 2
    return terms[..., 0]


def _rounded(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    inverse = 1 / scale
    return ((x + minimum[..., None]) * inverse[..., None]).round().clamp(0, HIGHEST_LEVEL)


def _error(x: Tensor, w: Tensor, level: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    off = (level * scale[..., None] - minimum[..., None]) - x
    return _halved((off * off) * w)


def _fit(x: Tensor, w: Tensor, level: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    weighed = w * level
    sum_w, sum_l, sum_ll = _halved(w), _halved(weighed), _halved(weighed * level)
    sum_x, sum_lx = _halved(w * x), _halved(weighed * x)
    determinant = sum_w * sum_ll - sum_l * sum_l
    fitted = (sum_w * sum_lx - sum_l * sum_x) / determinant
    offset = (sum_l * fitted - sum_x) / sum_w
    kept = offset >= 0
    fitted, offset = torch.where(kept, fitted, sum_lx / sum_ll), torch.where(kept, offset, 0.0)
    right = (determinant > 0) & (fitted > 0) & (fitted < LARGEST)
    return torch.where(right, fitted, scale), torch.where(right, offset, minimum)


def _fit_blocks(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1).clamp(max=0), x.amax(-1)
    best = (high - low) / HIGHEST_LEVEL, -low
    least = torch.full_like(low, torch.inf)
    for of_low, of_high in torch.tensor(FRACTIONS, dtype=torch.float32, device=x.device):
        minimum = -low * of_low
        scale = ((high * of_high + minimum) / HIGHEST_LEVEL).clamp(min=SMALLEST)
        level = _rounded(x, scale, minimum)
        tried = _fit(x, w, level, scale, minimum)
        least, best = _better(_error(x, w, level, *tried), tried, least, best)
    return best


def _choose_codes(
    x: Tensor, w: Tensor, scale: Tensor, minimum: Tensor, scale_step: Tensor, minimum_step: Tensor
) -> tuple[Tensor, Tensor]:
    first, second = (scale / scale_step).round(), (minimum / minimum_step).round()
    best = first.clamp(1, HIGHEST_CODE), second.clamp(max=HIGHEST_CODE)
    least = torch.full_like(first, torch.inf)
    for steps in NEIGHBOURS:
        tried = (first + steps[0]).clamp(1, HIGHEST_CODE), (second + steps[1]).clamp(0, HIGHEST_CODE)
        values = scale_step * tried[0], minimum_step * tried[1]
        error = _error(x, w, _rounded(x, *values), *values)
        least, best = _better(error, tried, least, best)
    return best


def _better(
    error: Tensor, tried: tuple[Tensor, Tensor], least: Tensor, best: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    lower = error < least
    chosen = torch.where(lower, tried[0], best[0]), torch.where(lower, tried[1], best[1])
    return torch.where(lower, error, least), chosen
