"""Two texts that share no sequence: one that KL is measured on, one that calibrated options are solved for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.evaluate.statistics import clusters
from l4pack.text.choice import DEMO_CALIBRATION, DEMO_TEXT, TextChoice
from l4pack.text.images import ImageReader
from l4pack.text.sequences import TokenText, load_text
from l4pack.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Texts:
    """`calibration` is None where nothing is calibrated."""

    measured: TokenText
    calibration: TokenText | None


def load_texts(
    checkpoint: Checkpoint, measured: TextChoice, calibration: str | None, calibration_samples: int, *, needed: bool
) -> Texts:
    """Both texts; without one of its own, calibration takes other sequences of the measured text.

    `needed` says whether there is anything to calibrate. Raises UsageError when there is too little text.
    """
    tokenizer, longest = load_tokenizer(checkpoint), checkpoint.config.text.max_position_embeddings
    reader = ImageReader(checkpoint)
    if needed and calibration_samples < 1:
        raise UsageError(
            f"--calibration-samples {calibration_samples} is no number of sequences", hint="take at least 1"
        )
    if calibration is None and measured.source == DEMO_TEXT and not Path(DEMO_TEXT).exists():
        calibration = DEMO_CALIBRATION
    if needed and calibration is None:
        both = load_text(replace(measured, samples=measured.samples + calibration_samples), tokenizer, longest, reader)
        return _checked(_split(both, measured, calibration_samples))
    text = load_text(measured, tokenizer, longest, reader)
    if not needed or calibration is None:
        return _checked(Texts(text, None))
    other = load_text(replace(measured, source=calibration, samples=calibration_samples), tokenizer, longest, reader)
    return _checked(Texts(text, _apart(other, text)))


def _split(both: TokenText, measured: TextChoice, calibration_samples: int) -> Texts:
    """Which sequences are measured is drawn; too few are shared out in proportion, by their tokens."""
    count, asked = len(both.sequences), measured.samples + calibration_samples
    if count < 2:
        raise UsageError(
            f"{measured.source} has {count} sequence of at most {both.record['sequence_length']} tokens, "
            "too little to measure on one part and calibrate on another",
            hint="give more text, a smaller --sequence-length, or --calibration TEXT",
        )
    drawn = np.random.default_rng(measured.seed).permutation(count)
    tokens = np.cumsum([len(both.sequences[number].tokens) for number in drawn])
    wanted = int(tokens[-1]) * measured.samples // asked
    share = min(max(1, int(np.searchsorted(tokens, wanted, side="right"))), count - 1)
    text = both.only(sorted(drawn[:share].tolist()))
    return Texts(text, _apart(both.only(sorted(drawn[share:].tolist())), text))


def _apart(calibration: TokenText, measured: TokenText) -> TokenText:
    """The calibration text without any sequence that is measured on."""
    taken = {sequence.tokens for sequence in measured.sequences}
    left = [number for number, sequence in enumerate(calibration.sequences) if sequence.tokens not in taken]
    if not left:
        raise UsageError(
            f"{calibration.record['source']} has nothing that is not measured on too",
            hint="give another --calibration text, or leave it out to split --text in two",
        )
    return calibration.only(left)


def _checked(texts: Texts) -> Texts:
    lengths = [len(item.scored()) for item in texts.measured.sequences]
    if int(clusters(lengths).max()) < 1:
        raise UsageError(
            f"{texts.measured.record['source']} gives {sum(lengths)} tokens to measure on, too few for an error bar",
            hint="give more text, or more --samples",
        )
    return texts
