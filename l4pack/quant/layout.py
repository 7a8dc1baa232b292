"""How a source checkpoint stores a weight matrix."""

from __future__ import annotations

from enum import StrEnum


class Layout(StrEnum):
    """Which axis of the stored 2-D block comes first.

    `nn.Linear` stores out x in; Llama 4's fused experts store in x out.
    """

    OUT_IN = "out_in"
    IN_OUT = "in_out"
