"""Two texts that share no sequence: one that KL is measured on, one that calibrated options are solved for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import UsageError
from l4pack.evaluate.statistics import clusters
from l4pack.stream.hidden import TokenSequence
from l4pack.text.choice import DEMO_CALIBRATION, DEMO_TEXT, TextChoice
from l4pack.text.sequences import TokenText, load_text, token_digest
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
    if needed and calibration_samples < 1:
        raise UsageError(
            f"--calibration-samples {calibration_samples} is no number of sequences", hint="take at least 1"
        )
    if calibration is None and measured.source == DEMO_TEXT and not Path(DEMO_TEXT).exists():
        calibration = DEMO_CALIBRATION
    if needed and calibration is None:
        both = load_text(replace(measured, samples=measured.samples + calibration_samples), tokenizer, longest)
        return _checked(_split(both, measured, calibration_samples))
    text = load_text(measured, tokenizer, longest)
    if not needed or calibration is None:
        return _checked(Texts(text, None))
    other = load_text(replace(measured, source=calibration, samples=calibration_samples), tokenizer, longest)
    return _checked(Texts(text, _apart(other, text)))


def _split(both: TokenText, measured: TextChoice, calibration_samples: int) -> Texts:
    """Which sequences are measured is drawn; too few are shared out in proportion."""
    count, asked = len(both.sequences), measured.samples + calibration_samples
    if count < 2:
        raise UsageError(
            f"{measured.source} has {count} sequence of {both.record['sequence_length']} tokens, "
            "too little to measure on one part and calibrate on another",
            hint="give more text, a smaller --sequence-length, or --calibration TEXT",
        )
    share = min(measured.samples, max(1, count * measured.samples // asked), count - 1)
    drawn = np.random.default_rng(measured.seed).permutation(count)
    parts = sorted(drawn[:share].tolist()), sorted(drawn[share : share + calibration_samples].tolist())
    return Texts(*(_some(both, [both.sequences[index] for index in part]) for part in parts))


def _apart(calibration: TokenText, measured: TokenText) -> TokenText:
    """The calibration text without any sequence that is measured on."""
    taken = {sequence.tokens for sequence in measured.sequences}
    left = [sequence for sequence in calibration.sequences if sequence.tokens not in taken]
    if not left:
        raise UsageError(
            f"{calibration.record['source']} has nothing that is not measured on too",
            hint="give another --calibration text, or leave it out to split --text in two",
        )
    return _some(calibration, left)


def _some(text: TokenText, sequences: Sequence[TokenSequence]) -> TokenText:
    ids = [sequence.tokens for sequence in sequences]
    record: dict[str, Any] = {
        **text.record,
        "sequences": len(ids),
        "tokens": sum(map(len, ids)),
        "tokens_sha256": token_digest(ids),
    }
    return TokenText(tuple(sequences), record)


def _checked(texts: Texts) -> Texts:
    lengths = [len(item.tokens) - item.score_from for item in texts.measured.sequences]
    if int(clusters(lengths).max()) < 1:
        raise UsageError(
            f"{texts.measured.record['source']} gives {sum(lengths)} tokens to measure on, too few for an error bar",
            hint="give more text, or more --samples",
        )
    return texts
