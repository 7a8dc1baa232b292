"""The least memory that a command says it needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

UNITS = {"MB": 10**6, "GB": 10**9}


def least_ram(l4pack: Callable[..., Any], *command: object) -> int:
    """Bytes for `--max-ram`, hardly more than the least, from what `command` says of too little."""
    ended = l4pack(*command, "--max-ram", "100MB")
    assert ended.code == 3, ended.err
    number, unit = re.search(r"(?:at least|needs) ([0-9.]+) ([MG]B)", ended.err).groups()
    return int(float(number) * UNITS[unit] * 1.006)  # two decimals are printed
