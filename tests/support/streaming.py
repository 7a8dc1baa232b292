"""Logits by the streamed engine, and rows of tokens to compare them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from whole_model import one_thread  # noqa: F401

from l4pack.checkpoint.source import open_folder
from l4pack.evaluate.answers import StreamAnswers
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.modules import Skeleton
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.work.identity import Identity

CPU = torch.device("cpu")


JOB = Identity({"job": "test"})


LENGTHS = (80, 37, 80, 5)  # longer and shorter than an attention chunk of 32


@dataclass(frozen=True)
class GivenImages:
    """Images of which the pixels are there: float [tiles, channels, height, width]."""

    values: torch.Tensor
    pixels = 0

    @property
    def tiles(self):
        return len(self.values)

    def pixel_values(self):
        return self.values


def token_rows(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def stream_model(folder, name="original", **options):
    checkpoint = open_folder(folder)
    return Model(
        name, Weights(checkpoint, CPU, torch.float32, **options), Skeleton(checkpoint.config, CPU, torch.float32)
    )


def lanes_of(model, packed):
    return [Lane(model.name, model, packed)]


def streamed_logits(folder, sequences, work, blocks=None, images=None, **options):
    pictures = None if images is None else GivenImages(images)
    packed = Packed([TokenSequence(tuple(ids), images=pictures) for ids in sequences])
    model = stream_model(folder, **options)
    with model.weights, Walk(lanes_of(model, packed), work, JOB, blocks=blocks) as walk:
        walk.run()
        answers = StreamAnswers(model, walk.streams["original"].current)
        rows = answers.normed(torch.arange(packed.rows)) @ answers.head(slice(0, answers.vocabulary)).T
    return list(rows.split([len(ids) for ids in sequences]))


def assert_close(found, wanted, tolerance=2e-5):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
