"""The walk back of a measurement that predicts from gradients: both of every layer, on the text that is measured."""

from __future__ import annotations

from l4pack.gradient.keep import GradientKeeper, LayerGradients
from l4pack.gradient.walk import BackwardWalk
from l4pack.measure.prepare import PreparedMeasurement
from l4pack.stream.hidden import Packed
from l4pack.stream.lanes import Model
from l4pack.stream.modules import Skeleton
from l4pack.stream.visitor import Progress
from l4pack.stream.weights import Weights

SEED = 0  # of labels and signs


def walk_back(prepared: PreparedMeasurement, progress: Progress) -> None:
    """Put gradients where `MeasureSettings.gradients` says, or go on where an earlier run was.

    Raises StoppedError, L4packError, and BudgetError when the disk has no room.
    """
    checkpoint, compute, folder = prepared.checkpoint, prepared.compute, prepared.settings.gradients
    packed = Packed(prepared.texts.measured.sequences)
    keeper = GradientKeeper(LayerGradients(folder, checkpoint.config, packed.rows), packed, SEED)
    with Weights(checkpoint, compute.device, compute.dtype) as weights:
        model = Model("original", weights, Skeleton(checkpoint.config, compute.device, compute.dtype))
        BackwardWalk(
            model, packed, folder, prepared.job(), SEED, keeper,
            blocks=prepared.blocks, progress=progress, ahead=prepared.ahead,
        ).walk()  # fmt: skip
