"""What a measurement has found so far, and how far the streams now walking are: what a killed run goes on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4pack.errors import UsageError
from l4pack.work.files import write_atomic

STATE_NAME = "state.json"


class State:
    """Relative errors by single change, and KL summed over clusters of tokens by any change."""

    def __init__(self, folder: Path, job: str) -> None:
        """Read what is there. Raises UsageError when it belongs to another job."""
        self._path, self._job = folder / STATE_NAME, job
        self.errors: dict[str, float] = {}
        self.kl: dict[str, list[float]] = {}
        self._wave: list[str] = []
        self._layers = 0
        self.kept: int | None = None  # the layer whose inputs are kept for the next streams
        if self._path.exists():
            self._read()

    def begin(self, wave: Sequence[str]) -> int:
        """Layers that these streams, walking together, have behind them."""
        if self._wave != list(wave):
            self._wave, self._layers = list(wave), 0
        return self._layers

    def layer_done(self, layer: int, errors: dict[str, float], *, forget: bool = False) -> None:
        """Note a layer whose outputs are on disk, and with `forget` that nothing is kept any more."""
        self._layers = layer + 1
        self.errors |= errors
        self.kept = None if forget else self.kept
        self._write()

    def keep(self, layer: int) -> None:
        """Note a layer whose inputs are kept on disk."""
        self.kept = layer
        self._write()

    def wave_done(self, kl: dict[str, list[float]]) -> None:
        """Note what came of the streams."""
        self.kl |= kl
        self._wave, self._layers = [], 0
        self._write()

    def _write(self) -> None:
        value = {
            "job": self._job, "errors": self.errors, "kl": self.kl, "wave": self._wave, "layers": self._layers,
            "kept": self.kept,
        }  # fmt: skip
        write_atomic(self._path, json.dumps(value).encode())

    def _read(self) -> None:
        try:
            value: dict[str, Any] = json.loads(self._path.read_bytes())
            job = value["job"]
            found = dict(value["errors"]), dict(value["kl"]), list(value["wave"]), int(value["layers"])
            kept = None if value["kept"] is None else int(value["kept"])
        except (ValueError, KeyError, TypeError):
            return
        if job != self._job:
            raise UsageError(
                f"{self._path.parent} was begun with another model, text, option or version",
                hint="repeat the earlier command, or add --restart to begin again",
            )
        self.errors, self.kl, self._wave, self._layers = found
        self.kept = kept
