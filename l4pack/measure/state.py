"""What a measurement has found so far, and how far the streams now walking are: what a killed run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from l4pack.measure.originals import KEPT_ENDING
from l4pack.measure.record import NonNegative
from l4pack.work.identity import Identity
from l4pack.work.seal import Span, seal, unbroken
from l4pack.work.state import Found, StateFile

STATE_NAME = "state.json"
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Measured(Found):
    """`layers` are those that the streams of `wave` have behind them; `kept` is the layer whose inputs are kept."""

    errors: dict[str, NonNegative]
    kl: dict[str, list[Finite]]
    wave: list[str]
    layers: Annotated[int, Field(ge=0)]
    kept: Annotated[int, Field(ge=0)] | None


class State:
    """Relative errors by single change, and KL summed over clusters of tokens by any change."""

    def __init__(self, folder: Path, job: Identity) -> None:
        """Read what is there. Raises UsageError naming what changed when it belongs to another job."""
        self._folder = folder
        self._file = StateFile(folder / STATE_NAME, job, _Measured)
        found = self._file.read() or _Measured(errors={}, kl={}, wave=[], layers=0, kept=None)
        self.errors, self.kl = dict(found.errors), dict(found.kl)
        self._wave, self._layers = list(found.wave), found.layers
        self.kept = found.kept  # the layer whose inputs are kept for the next streams
        self._kept_seals = [one for one in self._file.seals if one.file.endswith(KEPT_ENDING)]
        self._wave_seals = [one for one in self._file.seals if not one.file.endswith(KEPT_ENDING)]

    def begin(self, wave: Sequence[str], spans: Callable[[int], Sequence[Span]]) -> int:
        """Layers that these streams, walking together, have behind them, if what those gave is as it was.

        `spans` tells where the outputs of the last of so many layers lie.
        """
        same = self._wave == list(wave) and self._layers > 0
        if not (same and unbroken(self._folder, spans(self._layers), self._wave_seals)):
            self._wave, self._layers, self._wave_seals = list(wave), 0, []
        return self._layers

    def layer_done(self, layer: int, errors: dict[str, float], spans: Sequence[Span], *, forget: bool = False) -> None:
        """Note a layer whose outputs are on disk in `spans`, and with `forget` that nothing is kept any more."""
        self._layers, self._wave_seals = layer + 1, seal(self._folder, spans)
        self.errors |= errors
        if forget:
            self.kept, self._kept_seals = None, []
        self._write()

    def keep(self, layer: int, spans: Sequence[Span]) -> None:
        """Note a layer whose inputs are kept on disk in `spans`."""
        self.kept, self._kept_seals = layer, seal(self._folder, spans)
        self._write()

    def keeps(self, layer: int, spans: Sequence[Span]) -> bool:
        """Whether that layer's inputs are kept and are as they were."""
        return self.kept == layer and unbroken(self._folder, spans, self._kept_seals)

    def wave_done(self, kl: dict[str, list[float]]) -> None:
        """Note what came of the streams."""
        self.kl |= kl
        self._wave, self._layers, self._wave_seals = [], 0, []
        self._write()

    def _write(self) -> None:
        found = _Measured(errors=self.errors, kl=self.kl, wave=self._wave, layers=self._layers, kept=self.kept)
        self._file.write(found, [*self._wave_seals, *self._kept_seals])
