"""Exact bytes of what a recipe makes, in the files that a runtime loads it from: the artifact, or an export of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from l4pack.budget.files import CONTAINERS
from l4pack.budget.subject import Subject
from l4pack.checkpoint.source import Checkpoint
from l4pack.export.ahead import PlannedExport, planned_export, scale_dtype
from l4pack.export.known import target_named
from l4pack.model.tensors import Linear
from l4pack.plan.assign import PlannedTensor, scales_from
from l4pack.plan.plan import Plan, RunLimits, make_plan
from l4pack.quant.grid import ScaleDtype
from l4pack.recipe import Recipe, RecipeScheme

ANY_RAM = 2**60  # sizes are asked for, not whether this machine could make the artifact
# What is said of one tensor besides its name: in a shard's header and the manifest; in the index; of a calibrated matrix
# in the calibration record.
PER_TENSOR, PER_INDEXED, PER_CALIBRATED = 208, 43, 400
# What MLX's files say of a tensor and of a quantized module besides names: in a shard's header; in the index; in config.json.
_PER_STORED, _PER_LISTED, _PER_GROUPED = 72, 40, 96


class Sizes(Protocol):
    """The bytes of a model's recipes, each planned once."""

    def held(self, scheme: RecipeScheme) -> RecipeScheme:
        """The scheme as the files can hold its scales."""
        ...

    def unit_bytes(
        self, linears: Sequence[Linear], tensors: Sequence[PlannedTensor], scheme: RecipeScheme | None
    ) -> int:
        """Bytes of tensors of some matrices of a layer and role; `tensors` are the artifact's, None keeps them as they are."""
        ...

    def described_bytes(self, tensors: Sequence[PlannedTensor], recipe: Recipe, *, calibrated: bool) -> int:
        """About what headers and the small files say of such tensors in the files of `recipe`."""
        ...

    def weight_bytes(self, recipe: Recipe) -> int:
        """Bytes of all tensors."""
        ...

    def artifact_bytes(self, recipe: Recipe) -> int:
        """Bytes of all files."""
        ...

    def subject(self, recipe: Recipe) -> Subject:
        """What the memory model is asked about."""
        ...


def sizes_for(checkpoint: Checkpoint, runtime: str) -> Sizes:
    """Where `runtime` loads a model from. Raises UsageError for a model that it would answer wrongly with."""
    if runtime not in CONTAINERS:
        return ArtifactSizes(checkpoint)
    target_named(CONTAINERS[runtime]).check_model(checkpoint.config)
    return ExportSizes(checkpoint, runtime)


class ArtifactSizes:
    """Of the artifact itself. See `Sizes`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._made: dict[str, Plan] = {}

    def held(self, scheme: RecipeScheme) -> RecipeScheme:
        """See `Sizes`."""
        return scheme

    def plan(self, recipe: Recipe) -> Plan:
        """The plan of a recipe, for its sizes."""
        key = recipe.digest()
        if key not in self._made:
            self._made[key] = make_plan(self._checkpoint, recipe, RunLimits(max_ram=ANY_RAM))
        return self._made[key]

    def unit_bytes(
        self, linears: Sequence[Linear], tensors: Sequence[PlannedTensor], scheme: RecipeScheme | None
    ) -> int:
        """See `Sizes`."""
        del linears, scheme
        return sum(tensor.nbytes for tensor in tensors)

    def described_bytes(self, tensors: Sequence[PlannedTensor], recipe: Recipe, *, calibrated: bool) -> int:
        """See `Sizes`: headers, index, manifest and calibration record."""
        sharded = len(self.plan(recipe).shards) > 1
        names = sum(len(tensor.name) for tensor in tensors)
        each = PER_TENSOR + (PER_INDEXED if sharded else 0)
        modules = len({tensor.name.rpartition(".")[0] for tensor in tensors}) if calibrated else 0
        return (3 if sharded else 2) * names + each * len(tensors) + modules * PER_CALIBRATED

    def weight_bytes(self, recipe: Recipe) -> int:
        """See `Sizes`."""
        return self.plan(recipe).weight_bytes

    def artifact_bytes(self, recipe: Recipe) -> int:
        """See `Sizes`."""
        return self.plan(recipe).artifact_bytes

    def subject(self, recipe: Recipe) -> Subject:
        """See `Sizes`."""
        return Subject(self._checkpoint.name, self._checkpoint.config, self.plan(recipe).tensors, recipe.name)


class ExportSizes:
    """Of the files that `export` makes of the artifact for a runtime. See `Sizes`."""

    def __init__(self, checkpoint: Checkpoint, runtime: str) -> None:
        self._artifacts, self._runtime = ArtifactSizes(checkpoint), runtime
        self._wide = any(scales_from(checkpoint, linear.tensor) == "F32" for linear in checkpoint.layout.linears)
        self._target = target_named(CONTAINERS[runtime])
        self._made: dict[str, PlannedExport] = {}

    def held(self, scheme: RecipeScheme) -> RecipeScheme:
        """See `Sizes`: ggml's scales are F16 numbers, as those in float32 of a source in float32 are not."""
        if not self._wide or self._target.name != "gguf" or scheme.scale_dtype is not ScaleDtype.SOURCE:
            return scheme
        return scheme.model_copy(update={"scale_dtype": ScaleDtype.FLOAT16})

    def planned(self, recipe: Recipe) -> PlannedExport:
        """The export of a recipe's artifact."""
        key = recipe.digest()
        if key not in self._made:
            self._made[key] = planned_export(self._artifacts.plan(recipe), self._runtime)
        return self._made[key]

    def unit_bytes(
        self, linears: Sequence[Linear], tensors: Sequence[PlannedTensor], scheme: RecipeScheme | None
    ) -> int:
        """See `Sizes`: all experts of a projection are one tensor, and each tensor begins where its container lets it."""
        if scheme is None:
            kept = zip(linears, tensors, strict=True)
            parts = [
                sum(tensor.nbytes for _, tensor in alike) for _, alike in groupby(kept, lambda one: one[0].projection)
            ]
            return sum(map(self._placed, parts))
        found, dtype = 0, scale_dtype(tensors)
        for _, alike in groupby(linears, lambda one: one.projection):
            together = list(alike)
            rows, columns = sum(linear.out_features for linear in together), together[0].in_features
            carrier = self._target.carrier(scheme, columns, dtype)
            assert not isinstance(carrier, str), carrier
            found += sum(self._placed(rows * part.nbytes) for part in carrier.parts(columns))
        return found

    def described_bytes(self, tensors: Sequence[PlannedTensor], recipe: Recipe, *, calibrated: bool) -> int:
        """See `Sizes`: GGUF says as much of a tensor of any type; MLX names three for a quantized module, and its group."""
        del recipe, calibrated
        if self._target.name == "gguf":
            return 0
        modules = {tensor.name.rpartition(".")[0]: tensor for tensor in tensors if not tensor.expert}
        quantized = len(tensors) > len({tensor.name.rpartition(".")[0] for tensor in tensors})
        count = 3 if quantized else 1
        return sum(
            count * (2 * len(name) + _PER_STORED + _PER_LISTED) + (len(name) + _PER_GROUPED if quantized else 0)
            for name in modules
        )

    def weight_bytes(self, recipe: Recipe) -> int:
        """See `Sizes`."""
        return self.planned(recipe).weight_bytes

    def artifact_bytes(self, recipe: Recipe) -> int:
        """See `Sizes`."""
        return self.planned(recipe).artifact_bytes

    def subject(self, recipe: Recipe) -> Subject:
        """See `Sizes`."""
        return self.planned(recipe).subject

    def _placed(self, nbytes: int) -> int:
        return -(-nbytes // self._target.alignment) * self._target.alignment
