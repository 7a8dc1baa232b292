"""The plan: every tensor's fate, every output byte and the memory a run needs, from headers alone."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from l4pack import __version__
from l4pack.artifact.calibration_record import RECORD_NAME, record_bytes, record_json
from l4pack.artifact.kv_cache import cache_limits
from l4pack.artifact.manifest import (
    EARLIER_OPTIONS,
    MANIFEST_NAME,
    UNKNOWN,
    Contents,
    Manifest,
    file_record,
    shard_record,
    tensor_record,
)
from l4pack.artifact.stanza import quantization_config
from l4pack.checkpoint.matrices import matrices_of
from l4pack.checkpoint.parts import source_parts
from l4pack.checkpoint.shards import FilePlace, Shard
from l4pack.checkpoint.source import Checkpoint
from l4pack.containers.safetensors_folder import CONTAINER, DEFAULT_SHARD_BYTES
from l4pack.errors import RecipeError, SourceError, UsageError
from l4pack.formats.configuration import Activations
from l4pack.formats.known import load_format
from l4pack.formats.limits import reader_limits, split_hindrances, unservable
from l4pack.model.config import with_dtype
from l4pack.model.tensors import Linear
from l4pack.plan.assign import (
    Action,
    Assignment,
    PlannedTensor,
    Target,
    Task,
    assign,
    cut,
    for_source,
    is_calibrated,
    model_dtype,
)
from l4pack.plan.itinerary import Itinerary, file_sizes
from l4pack.plan.memory import FLOAT, Memory, check_room, kernels_loaded, rounding, seeing, sight_of, workers_within
from l4pack.plan.needs import Needs, calibration_needs
from l4pack.plan.options import plan_options, recipe_parts, text_options
from l4pack.quant.dtypes import FLOATS
from l4pack.recipe import KEEP, KV_CACHE, Recipe
from l4pack.units import MIB, human_bytes
from l4pack.work import machine
from l4pack.work.device import CPU, CUDA
from l4pack.work.identity import Identity

if TYPE_CHECKING:
    from l4pack.text.sequences import TokenText

SLAB_LIMITS = tuple(size * MIB for size in (256, 128, 64, 32, 16, 8, 4))
# More workers read smaller slabs, in shorter and shorter pieces: below this, a few workers are enough.
FINE_SLAB, ENOUGH_WORKERS = 32 * MIB, 4
# What rounding takes over the base however many cores there are, unless the user allows more: enough to keep a disk busy.
USUAL_RAM = 700 * MIB


@dataclass(frozen=True)
class RunLimits:
    """What a run may take. Without `max_ram` it takes little, however much the machine has."""

    max_ram: int | None = None
    max_vram: int | None = None
    accelerated: bool = False  # quantize with torch on a device
    free_vram: machine.Room | None = None  # what the device has, where it is here
    workers: int | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES

    @property
    def device_room(self) -> machine.Room | None:
        """What was asked for of a device's memory."""
        return None if self.max_vram is None else machine.Room(self.max_vram, machine.ASKED_OF_DEVICE)

    def check(self, needed: Memory) -> None:
        """Raise BudgetError for more than was asked for; what the machine has is checked where the job runs."""
        if self.max_ram is not None:
            check_room(needed.ram, machine.Room(self.max_ram, machine.ASKED))
        if self.device_room is not None:
            check_room(needed.vram, self.device_room, "device memory")


@dataclass(frozen=True)
class Plan:
    """Everything a run will do."""

    checkpoint: Checkpoint
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    shards: tuple[Shard, ...]
    places: Mapping[str, FilePlace]
    tasks: tuple[Task, ...]
    stanza: Mapping[str, Any]
    assigned: tuple[tuple[Linear, str | None], ...]
    workers: int
    accelerated: bool
    manifest: Manifest = field(repr=False)
    calibrated: tuple[Target, ...] = ()
    observed: tuple[Target, ...] = ()  # made by tasks, but for the scale of their inputs
    needs: Needs | None = None  # of calibration
    text: TokenText | None = field(default=None, repr=False)
    room: machine.Room = field(default_factory=machine.memory, compare=False)  # where the plan was made

    def with_text(self, text: TokenText) -> Plan:
        """The same plan with the tokens its calibration looks at, pinned in the manifest by their digest."""
        pinned = {"text_sha256": text.record["sha256"], "tokens_sha256": text.record["tokens_sha256"]}
        config, device = self.checkpoint.config, CUDA if self.accelerated else CPU
        sight = sight_of(config.vision, text.sequences)
        seen = None if sight is None else seeing(sight, config.text, device, FLOAT)
        needs = self.needs and self.needs.for_lengths([len(one.tokens) for one in text.sequences], seen)
        options = {**self.manifest.options, **text_options(self.recipe, text.record)}
        return replace(
            self, text=text, needs=needs, manifest=replace(self.manifest, calibration=pinned, options=options)
        )

    @property
    def tiles(self) -> int:
        """Pieces of images that its calibration looks at."""
        sequences = () if self.text is None else self.text.sequences
        return sum(sequence.images.tiles for sequence in sequences if sequence.images is not None)

    def computed_on(self, parts: Mapping[str, Any]) -> Plan:
        """The same plan with what decides its bytes where it is calibrated, see `Compute.parts`."""
        return replace(self, manifest=replace(self.manifest, computed_on=parts))

    def sampled(self, sha256: str | None) -> Plan:
        """The same plan with the digest of the source's weights, see `sample_digest`."""
        return replace(self, manifest=self.manifest.sampled(sha256))

    @cached_property
    def config_json(self) -> bytes:
        """The artifact's config.json: the source's, every section kept, with the quantization added.

        Where float32 tensors are rounded, it says their dtype as they are now.
        """
        raw: Mapping[str, Any] = self.checkpoint.config.raw
        if self.rounded_tensors:
            raw = with_dtype(raw, FLOATS[model_dtype(self.checkpoint)].word)
        return CONTAINER.configuration(raw, self.stanza)

    @cached_property
    def index_json(self) -> bytes | None:
        """The artifact's index, or None when there is one shard."""
        return CONTAINER.index(self.shards, self.weight_bytes)

    @cached_property
    def rounded_tensors(self) -> int:
        """How many kept tensors are float32 in the source and not in the artifact."""
        wide = 0
        for task in self.tasks:
            kept = task.copied or task.targets[0].tensors[0]
            made = task.action in (Action.QUANTIZE, Action.CARRY)
            rounds = not made and kept.dtype != self.checkpoint.dtype_of(task.tensor)
            wide += max(1, len(task.targets)) if rounds and task.rows[0] == 0 else 0
        return wide

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def files(self) -> dict[str, int]:
        """Every file of the artifact and its exact size."""
        sizes = {shard.file: shard.nbytes for shard in self.shards} | self.beside
        sizes[MANIFEST_NAME] = len(self.manifest_json({}, {}))
        return sizes

    @cached_property
    def beside(self) -> dict[str, int]:
        """Every file beside the weights but the manifest, and its exact size."""
        sizes = {}
        if self.index_json is not None:
            sizes[CONTAINER.index_name] = len(self.index_json)
        sizes |= self.checkpoint.companions
        sizes[CONTAINER.config_name] = len(self.config_json)
        if self.needs is not None:
            sizes[RECORD_NAME] = self.calibration_bytes
        return sizes

    @property
    def looked_at(self) -> set[str]:
        """Modules that calibration solves, or whose inputs it observes."""
        return {target.module for target in (*self.calibrated, *self.observed)}

    @property
    def calibration_bytes(self) -> int:
        """Size of the calibration record."""
        modules = [target.module for target in (*self.calibrated, *self.observed)]
        options = [self.recipe.schemes[target.scheme].gptq for target in self.calibrated]
        two_sided = sum(option is not None and option.two_sided for option in options)
        shapes = [tensor.shape for tensor in self.kv_scales]
        return record_bytes(self.checkpoint.config.text, modules, shapes, two_sided)

    def calibration_json(self, results: Mapping[str, Any]) -> bytes:
        """The calibration record's bytes from the results in the journal."""
        assert self.text is not None
        back = None if self.needs is None else self.needs.gradient
        seen = None if back is None else {"samples": back.samples, "tokens": back.tokens}
        return record_json(self.text.record, results, self.calibration_bytes, seen)

    def manifest_json(self, tensors: Mapping[str, str], files: Mapping[str, str]) -> bytes:
        """The manifest's bytes with the hex SHA-256 of tensors and of files beside the weights, as far as known."""
        contents = Contents(
            {name: file_record(size, files.get(name, UNKNOWN)) for name, size in self.beside.items()},
            {shard.file: shard_record(shard.nbytes, shard.prefix) for shard in self.shards},
            {tensor.name: tensor_record(tensor, tensors.get(tensor.name, UNKNOWN)) for tensor in self.tensors},
        )
        return self.manifest.to_json(contents)

    @property
    def artifact_bytes(self) -> int:
        """Bytes of all files of the artifact."""
        return sum(self.files.values())

    @cached_property
    def source_weight_bytes(self) -> int:
        """Bytes of the source's tensors (of a BF16 checkpoint when there is only a configuration)."""
        return self.checkpoint.weight_bytes or 2 * self.checkpoint.layout.parameters

    @property
    def read_bytes(self) -> int:
        """Weight bytes a whole run reads."""
        return (
            sum(task.read_bytes for task in self.tasks) + sum(map(self.target_bytes, self.calibrated)) + self.back_bytes
        )

    @cached_property
    def back_bytes(self) -> int:
        """Of them those that are read on the way up and back before: every layer's matrices, twice."""
        if self.needs is None or self.needs.gradient is None:
            return 0
        matrices = matrices_of(self.checkpoint)
        return 2 * sum(matrices.nbytes(linear) for linear in self.checkpoint.layout.linears)

    @property
    def kv_scales(self) -> list[PlannedTensor]:
        """Scales of the KV cache, a layer's keys and values side by side; calibration finds them."""
        return [tensor for tensor in self.tensors if tensor.scheme == KV_CACHE]

    @cached_property
    def targets(self) -> dict[str, Target]:
        """What becomes of each matrix that is not copied as it is, by module."""
        made = [target for task in self.tasks for target in task.targets]
        return {target.module: target for target in (*made, *self.calibrated)}

    def target_bytes(self, target: Target) -> int:
        """Bytes of a matrix in the source."""
        return matrices_of(self.checkpoint).nbytes(target.linear)

    @property
    def peak_ram_bytes(self) -> int:
        """Most resident memory a run takes."""
        return self._memory.ram

    @property
    def peak_vram_bytes(self) -> int:
        """Most device memory a run takes, the driver's context not counted; 0 on the CPU."""
        return self._memory.vram

    @cached_property
    def _memory(self) -> Memory:
        """Of rounding, and of calibrating after it."""
        rounded = rounding(self.tasks, self.workers, accelerated=self.accelerated)
        return rounded if self.needs is None else rounded.most(self.needs.most_memory)

    def on_cluster(self) -> Plan:
        """The same job where the workers of a cluster do it."""
        return replace(self, needs=self.needs and self.needs.on_cluster())

    @property
    def disk_bytes(self) -> int:
        """Disk a run needs at its peak, the artifact included."""
        fetched = 0
        if self.checkpoint.store is not None and self.checkpoint.store.fetches:
            fetched = self._fetched_bytes()
        return self.artifact_bytes + fetched + (0 if self.needs is None else self.needs.most_disk_bytes)

    def _fetched_bytes(self) -> int:
        """Most bytes of a source that is fetched as the run goes.

        Tasks hold the files of a tensor for every worker, and those that are fetched ahead; a calibrated walk holds
        what `Itinerary` says, after tasks are done with the files that it does not read.
        """
        sizes = file_sizes(self.checkpoint)
        at_once = (self.workers + 1) * max(len(entry.stored) for entry in self.checkpoint.entries.values())
        if self.needs is None:
            return sum(sorted(sizes.values())[-at_once:])
        walk = Itinerary.of(self.checkpoint)
        others = [size for file, size in sizes.items() if file not in walk.walked()]
        return max(sum(sorted(others)[-at_once:]), walk.peak_bytes(sizes))

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter over the quantized matrices, scales included."""
        numel = sum(linear.numel for linear, name in self.assigned if name is not None)
        nbytes = sum(tensor.nbytes for tensor in self.tensors if tensor.scheme in self.recipe.schemes)
        return 8 * nbytes / numel

    def identity(self) -> Identity:
        """Everything that decides the artifact's bytes, by the names users know; the journal of a job is bound to it.

        Reads, and if need be fetches, the files that come along with the weights; not for a bare configuration.
        """
        store = self.checkpoint.store
        assert store is not None
        layout = hashlib.sha256(b"".join([self.config_json, *(shard.prefix for shard in self.shards)]))
        return Identity(
            {
                "l4pack version": __version__,
                **self.manifest.options,
                **recipe_parts(self.recipe),
                **(self.manifest.computed_on or {}),
                **(self.manifest.calibration or {}),
                **source_parts(self.checkpoint, store),
                "layout": layout.hexdigest(),
            },
            EARLIER_OPTIONS,
        )

    def warnings(self) -> list[str]:
        """What is odd about the source, and what a runtime can't do with this artifact, from the format files."""
        found: list[str] = list(self.checkpoint.notes)
        if self.rounded_tensors:
            found.append(
                f"{self.rounded_tensors:,} kept tensors are {'products or ' if self.checkpoint.dequantized else ''}float32 "
                f"in the source and are rounded to {model_dtype(self.checkpoint)}, which runtimes compute in; "
                "--keep-float32 leaves them as they are"
            )
        if self.peak_ram_bytes > self.room.nbytes:
            limit = f"the limit is {human_bytes(self.room.nbytes)} ({self.room.limit})"
            found.append(f"the job needs {human_bytes(self.peak_ram_bytes)} of memory, {limit}: it will not start here")
        mixed = len(self.recipe.schemes) > 1
        for key, scheme in self.recipe.schemes.items():
            roles = {linear.role for linear, name in self.assigned if name == key}
            weight_only = scheme.activations is Activations.NONE
            found += reader_limits(load_format(scheme.format), scheme, roles, weight_only=weight_only, mixed=mixed)
            if load_format(scheme.format).exported:
                found.append(
                    f"no server loads {scheme.format} as it is: `l4pack export --to gguf` makes llama.cpp's file of it"
                )
            if self.recipe.kv_cache is not None:
                vision = self.checkpoint.config.vision is not None
                found += cache_limits(load_format(scheme.format), self.recipe.kv_cache.strategy, vision=vision)
        found += [text for texts in self.hindrances().values() for text in texts]
        return list(dict.fromkeys(found))

    def hindrances(self, tp: int = 1) -> dict[str, list[str]]:
        """Why each runtime has no kernel for the sizes of these matrices on `tp` GPUs; an empty list: it has."""
        schemes = {name: (load_format(scheme.format), scheme) for name, scheme in self.recipe.schemes.items()}
        stored = [(*schemes[name], linear) for linear, name in self.assigned if name is not None]
        return split_hindrances(stored, self.checkpoint.config.text.num_key_value_heads, tp)

    def check_servable(self) -> None:
        """Raise RecipeError when no runtime could load the artifact."""
        reasons = self.hindrances()
        if unservable(reasons):
            first = next(text for texts in reasons.values() for text in texts)
            raise RecipeError(
                f"no runtime could serve this: {first}",
                hint="take a recipe whose groups or blocks divide the model's sizes, such as fp8 or groups of 32",
            )


def make_plan(checkpoint: Checkpoint, recipe: Recipe, limits: RunLimits | None = None) -> Plan:
    """Plan the artifact of `checkpoint` under `recipe`; reads no weights.

    Raises SourceError (damaged or already quantized source), RecipeError (a rule that matches nothing, a group that
    does not divide), BudgetError (`max_ram` too small for the smallest unit of work).
    """
    limits = limits or RunLimits()
    if checkpoint.config.quantized:
        raise SourceError(f"{checkpoint.name} is quantized already", hint="start from the original BF16 checkpoint")
    assignment, recipe = assign(checkpoint, recipe), for_source(checkpoint, recipe)
    shards, places = CONTAINER.lay_out(assignment.groups, limits.shard_bytes)
    workers, tasks = _fit(checkpoint, recipe, assignment, limits)
    calibrated = tuple(target for target in assignment.targets if is_calibrated(recipe, target))
    observed = tuple(
        target for target in assignment.targets if target.scheme != KEEP and recipe.schemes[target.scheme].observed
    )
    looked_at = (*calibrated, *observed)
    if recipe.kv_cache is not None and not looked_at:  # the walk computes with what tasks have made
        looked_at = tuple(target for target in assignment.targets if target.scheme != KEEP)
    device = "cuda" if limits.accelerated else "cpu"
    room = machine.memory(limits.max_ram)
    vram = limits.free_vram or limits.device_room
    needs = calibration_needs(checkpoint, recipe, looked_at, room, vram, device) if looked_at else None
    if needs is not None:
        limits.check(needs.most_memory)
        _check_walked_back(checkpoint, needs)
    vision = checkpoint.config.vision is not None
    return Plan(
        checkpoint=checkpoint,
        recipe=recipe,
        tensors=tuple(tensor for group in assignment.groups for tensor in group),
        shards=tuple(shards),
        places=places,
        tasks=tasks,
        stanza=quantization_config(recipe.schemes, assignment.schemes, vision=vision, kv_cache=recipe.kv_cache),
        assigned=assignment.schemes,
        workers=workers,
        accelerated=limits.accelerated,
        manifest=replace(
            Manifest.of(checkpoint, recipe), options=plan_options(recipe, limits.shard_bytes, checkpoint.included)
        ),
        calibrated=calibrated,
        observed=observed,
        needs=needs,
        room=room,
    )


def _check_walked_back(checkpoint: Checkpoint, needs: Needs) -> None:
    """Raise UsageError where files are gone before the walk back reads them."""
    if needs.gradient is not None and checkpoint.store is not None and checkpoint.store.fetches:
        raise UsageError(
            "a two-sided recipe walks through the model three times, a source that is fetched as it goes is there once",
            hint="leave --fetch-as-you-go out, or take recipe int4",
        )


def _fit(
    checkpoint: Checkpoint, recipe: Recipe, assignment: Assignment, limits: RunLimits
) -> tuple[int, tuple[Task, ...]]:
    """As many workers as there are cores and one to wait for the disk, with the largest slabs that memory takes.

    What nothing fits in is what one worker takes of the smallest slabs; the run refuses it where it has no more.
    """
    wanted = limits.workers or machine.cores() + 1
    room = machine.memory(limits.max_ram).nbytes
    usual = kernels_loaded(limits.accelerated) + USUAL_RAM
    vram = sys.maxsize if limits.max_vram is None else limits.max_vram
    tried: dict[int, tuple[Task, ...]] = {}
    for most in (room,) if limits.max_ram is not None else (min(usual, room), room):
        for slab in SLAB_LIMITS:
            if slab not in tried:
                tried[slab] = cut(checkpoint, recipe, assignment, slab)
            workers = workers_within(tried[slab], wanted, Memory(most, vram), accelerated=limits.accelerated)
            enough = ENOUGH_WORKERS if slab <= FINE_SLAB else wanted
            if workers >= min(enough, wanted) or (workers and slab == SLAB_LIMITS[-1]):
                return workers, tried[slab]
    tasks = tried[SLAB_LIMITS[-1]]
    limits.check(rounding(tasks, 1, accelerated=limits.accelerated))
    return 1, tasks
