"""How precisely a GPU multiplies float32: by whole factors, or by factors rounded to TF32, which tensor cores take.

TF32 has float32's range and ten bits of fraction; products and their sums stay float32
(https://pytorch.org/docs/stable/notes/cuda.html). What torch was told last counts for all threads. A CPU takes no notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TF32 = "tf32"


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Factors rounded to TF32, several times as fast. For forward passes, and for moments, which are those of rounded inputs
    then, no less definite."""
    with _rounded(True):
        yield


@contextmanager
def whole_factors() -> Iterator[None]:
    """Whole factors. For solving, where what moments nearly rule out decides, and for products of moments themselves, which
    need not be definite once they are rounded."""
    with _rounded(False):
        yield


@contextmanager
def _rounded(wanted: bool) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = wanted
    try:
        yield
    finally:
        settings.allow_tf32 = before
