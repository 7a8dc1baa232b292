"""Which source tensor becomes what: every tensor's fate under a recipe, and the tasks that carry it out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import cast

from l4pack.artifact import kv_cache
from l4pack.artifact.codes import codes_of
from l4pack.checkpoint.header import tensor_bytes
from l4pack.checkpoint.matrices import MatrixSource, matrices_of
from l4pack.checkpoint.merged import merging_bytes
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import RecipeError
from l4pack.formats.known import load_format
from l4pack.model.tensors import Linear, Role, TensorSpec, canonical_naming, catalogue, rename
from l4pack.quant.dtypes import FLOATS, FloatName
from l4pack.quant.grid import E4M3
from l4pack.quant.layout import Layout
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.quant.suffixes import INPUT_SCALES, Suffix
from l4pack.recipe import KEEP, KV_CACHE, Method, Recipe, RecipeScheme
from l4pack.units import MIB

COPY_CHUNK = 16 * MIB
_ROUNDING = 3  # chunks held while float32 is rounded: the source's, the result and what lies between
ROW_STEP = 128  # slices are cut at multiples of this: FP8 blocks and packed zero points stay whole


class Action(StrEnum):
    """What becomes of source bytes."""

    COPY = "copy"
    UNFUSE = "unfuse"
    QUANTIZE = "quantize"
    CARRY = "carry"  # codes and scales of a source that has them in the scheme asked for


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the artifact."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None
    expert: int | None
    scheme: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Target:
    """One matrix to make: where its numbers lie, the module it becomes, its tensors' suffixes, and its scheme.

    One that is `carried` has the source's codes and scales.
    """

    linear: Linear
    module: str
    scheme: str
    tensors: tuple[PlannedTensor, ...]
    carried: bool = False

    def suffix(self, tensor: PlannedTensor) -> str:
        """What one of its tensors is called within the module."""
        return tensor.name.removeprefix(f"{self.module}.")

    def tensor(self, suffix: Suffix) -> PlannedTensor:
        """The one of its tensors that is called so."""
        return next(tensor for tensor in self.tensors if self.suffix(tensor) == suffix)

    @property
    def input_scale(self) -> PlannedTensor:
        """The tensor that holds the scale of its inputs."""
        return next(tensor for tensor in self.tensors if self.suffix(tensor) in INPUT_SCALES)


@dataclass(frozen=True, slots=True)
class Task:
    """The unit of work, of the journal and of memory: some output rows of one or two matrices, or one copied tensor."""

    key: str
    action: Action
    tensor: str
    targets: tuple[Target, ...] = ()
    rows: tuple[int, int] = (0, 0)
    copied: PlannedTensor | None = None
    read_bytes: int = 0
    write_bytes: int = 0
    merging_bytes: int = 0  # taken while adapters are merged into what is read

    @property
    def ram_bytes(self) -> int:
        """Bytes held at once: the source slab, what is made of it, and what merging takes."""
        if self.action is Action.COPY:
            copied = min(self.read_bytes, COPY_CHUNK) * (1 if self.read_bytes == self.write_bytes else _ROUNDING)
            return copied + self.merging_bytes
        return self.read_bytes + self.write_bytes + self.merging_bytes


@dataclass(frozen=True)
class Assignment:
    """The fate of every tensor: `groups` are the artifact's tensors in model order, a module's together.

    Scales of the KV cache come last: calibration finds them, and so leaves one shard incomplete until then.
    """

    groups: tuple[tuple[PlannedTensor, ...], ...]
    targets: tuple[Target, ...]
    copies: tuple[tuple[str, PlannedTensor], ...]  # source name, artifact tensor
    schemes: tuple[tuple[Linear, str | None], ...]  # runtime matrix, its scheme or None


def assign(checkpoint: Checkpoint, recipe: Recipe) -> Assignment:
    """Decide by the recipe's first matching rule. Raises RecipeError."""
    config, source = checkpoint.config, checkpoint.layout
    runtime = catalogue(config, canonical_naming(config), fused=False)
    pairs = {f"{new.module}.weight": (old, new) for old, new in zip(source.linears, runtime.linears, strict=True)}
    groups, targets, copies, schemes = [], [], [], []
    for spec in runtime.tensors:
        scheme = _scheme_for(recipe, spec, config.text.num_hidden_layers)
        old, new = pairs.get(spec.name, (None, None))
        if old and new:
            schemes.append((new, None if scheme == KEEP else scheme))
        if old and new and (scheme != KEEP or old.layout is Layout.IN_OUT):
            target = _target(checkpoint, recipe, old, new, scheme)
            targets.append(target)
            groups.append(target.tensors)
        else:
            name = rename(spec.name, runtime.naming, source.naming)
            kept = PlannedTensor(
                spec.name, kept_dtype(checkpoint, recipe, name), spec.shape, spec.role, spec.layer, None, KEEP
            )
            copies.append((name, kept))
            groups.append((kept,))
    _check_rules(recipe, runtime.tensors, config.text.num_hidden_layers)
    groups += _kv_scales(checkpoint, recipe)
    return Assignment(tuple(groups), tuple(targets), tuple(copies), tuple(schemes))


def _kv_scales(checkpoint: Checkpoint, recipe: Recipe) -> list[tuple[PlannedTensor, ...]]:
    if recipe.kv_cache is None:
        return []
    text, naming = checkpoint.config.text, canonical_naming(checkpoint.config)
    shape = kv_cache.scale_shape(recipe.kv_cache.strategy, text.num_key_value_heads)
    return [
        tuple(
            PlannedTensor(name, kv_cache.DTYPE, shape, Role.ATTENTION, layer, None, KV_CACHE)
            for name in kv_cache.scale_names(naming, layer)
        )
        for layer in range(text.num_hidden_layers)
    ]


def kept_dtype(checkpoint: Checkpoint, recipe: Recipe, name: str) -> str:
    """The safetensors dtype a source tensor is kept in: its own, but float32 is rounded to what runtimes compute in."""
    dtype = checkpoint.dtype_of(name)
    return model_dtype(checkpoint) if dtype == "F32" and not recipe.keep_float32 else dtype


def model_dtype(checkpoint: Checkpoint) -> FloatName:
    """The 16-bit dtype a runtime computes a model in."""
    return "F16" if checkpoint.config.dtype == "float16" else "BF16"


def _scheme_for(recipe: Recipe, spec: TensorSpec, num_layers: int) -> str:
    number = recipe.rule_for(spec.role, spec.layer, num_layers)
    if number is None:
        raise RecipeError(
            f"recipe {recipe.name}: no rule speaks of {spec.name} (role {spec.role})",
            hint="end the rules with {roles: all, scheme: keep}",
        )
    return recipe.rules[number].scheme


def _check_rules(recipe: Recipe, tensors: Sequence[TensorSpec], num_layers: int) -> None:
    """Refuse a rule that decides nothing, because nothing matches or earlier rules take it all, and empty work."""
    deciding = {recipe.rule_for(spec.role, spec.layer, num_layers) for spec in tensors}
    roles = {spec.role for spec in tensors}
    for number, rule in enumerate(recipe.rules):
        if number not in deciding:
            absent = rule.roles != "all" and roles.isdisjoint(rule.roles)
            raise RecipeError(
                f"recipe {recipe.name}: rules.{number} matches no tensor of this model that earlier rules leave",
                hint=f"this model has no {rule.roles[0]}: name it in one rule with another role, or remove the rule"
                if absent
                else "mend its roles or layers, or remove the rule",
            )
    if all(rule.scheme == KEEP for rule in recipe.rules):
        raise RecipeError(f"recipe {recipe.name} quantizes nothing of this model", hint="give some role a scheme")


def _target(checkpoint: Checkpoint, recipe: Recipe, old: Linear, new: Linear, scheme: str) -> Target:
    numbers = None if scheme == KEEP else recipe.schemes[scheme]
    if numbers is not None and not divides(numbers, new):
        raise RecipeError(
            f"recipe {recipe.name}: schemes.{scheme}.{_grouping(numbers)} does not divide the "
            f"{new.in_features} input features of {new.module}",
            hint="recipe int4-g32 is for llama.cpp too, and its groups are smaller"
            if numbers.super_blocked
            else "choose a group size that divides every matrix, or strategy channel",
        )
    carried = numbers is not None and is_carried(checkpoint, old, numbers)
    codes = codes_of(checkpoint.entries.get(old.tensor)) if carried else None
    dtype = kept_dtype(checkpoint, recipe, old.tensor) if numbers is None else scales_from(checkpoint, old.tensor)
    tensors = module_tensors(new, scheme, numbers, dtype if codes is None else codes.scale_dtype)
    return Target(old, new.module, scheme, tensors, carried)


def is_carried(checkpoint: Checkpoint, linear: Linear, scheme: Scheme) -> bool:
    """Whether a source has a matrix in just this FP8 scheme, so that rounding it again could only lose."""
    codes = codes_of(checkpoint.entries.get(linear.tensor))
    if codes is None or codes.scheme.grid is not E4M3:
        return False
    same = (codes.scheme.grid, codes.scheme.strategy, codes.scheme.block_structure)
    dtype = scheme.scale_float(cast("FloatName", codes.scale_dtype))
    return same == (scheme.grid, scheme.strategy, scheme.block_structure) and dtype == codes.scale_dtype


def scales_from(checkpoint: Checkpoint, name: str) -> str:
    """The dtype that scales of kind `source` get: products of codes are float32 in no file."""
    return model_dtype(checkpoint) if checkpoint.dequantized else checkpoint.dtype_of(name)


def for_source(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe with the dtype that scales get of a source whose numbers are products of codes."""
    return recipe.with_scales(FLOATS[model_dtype(checkpoint)].word) if checkpoint.dequantized else recipe


def divides(scheme: RecipeScheme, linear: Linear) -> bool:
    """Whether a scheme's groups divide a matrix."""
    return linear.in_features % scheme.column_multiple() == 0


def _grouping(scheme: RecipeScheme) -> str:
    multiple = scheme.column_multiple()
    return f"scale_dtype q4_k, in super-blocks of {multiple}," if scheme.super_blocked else f"group_size {multiple}"


def module_tensors(linear: Linear, name: str, scheme: RecipeScheme | None, dtype: str) -> tuple[PlannedTensor, ...]:
    """The artifact's tensors for one matrix of source dtype `dtype` under a scheme called `name`; None keeps it."""
    if scheme is None:
        shapes: list[tuple[str, str, tuple[int, ...]]] = [
            (Suffix.WEIGHT, dtype, (linear.out_features, linear.in_features))
        ]
    else:
        form, size = load_format(scheme.format), (linear.out_features, linear.in_features)
        expert = linear.role is Role.ROUTED_EXPERT
        stored = form.stored(scheme, *size, dtype, observed=scheme.observed, expert=expert)
        shapes = [(tensor.suffix, tensor.dtype, tensor.shape) for tensor in stored]
    return tuple(
        PlannedTensor(f"{linear.module}.{suffix}", kind, shape, linear.role, linear.layer, linear.expert, name)
        for suffix, kind, shape in shapes
    )


def cut(checkpoint: Checkpoint, recipe: Recipe, assignment: Assignment, slab_bytes: int) -> tuple[Task, ...]:
    """The tasks in the order of the source's bytes; no slab is larger than `slab_bytes` where it may be cut."""
    tasks = [_copy_task(checkpoint, name, tensor) for name, tensor in assignment.copies]
    uncalibrated = [target for target in assignment.targets if not is_calibrated(recipe, target)]
    source = matrices_of(checkpoint)
    for _, together in groupby(uncalibrated, key=lambda target: source.together(target.linear)):
        tasks += _slices(source, recipe, tuple(together), slab_bytes)
    if checkpoint.bare:
        return tuple(tasks)
    entries = checkpoint.entries
    if checkpoint.adapters:
        tasks = [replace(task, merging_bytes=merging_bytes(entries[task.tensor])) for task in tasks]
    return tuple(sorted(tasks, key=lambda task: (entries[task.tensor].file, entries[task.tensor].start)))


def is_calibrated(recipe: Recipe, target: Target) -> bool:
    """Whether a matrix is made by calibration, and not by a task."""
    return not target.carried and target.scheme != KEEP and recipe.schemes[target.scheme].method is Method.GPTQ


def _copy_task(checkpoint: Checkpoint, name: str, tensor: PlannedTensor) -> Task:
    read = tensor_bytes(checkpoint.dtype_of(name), tensor.shape)
    return Task(tensor.name, Action.COPY, name, copied=tensor, read_bytes=read, write_bytes=tensor.nbytes)


def _slices(source: MatrixSource, recipe: Recipe, targets: tuple[Target, ...], slab_bytes: int) -> Iterator[Task]:
    linear, scheme = targets[0].linear, targets[0].scheme
    action = Action.UNFUSE if scheme == KEEP else Action.CARRY if targets[0].carried else Action.QUANTIZE
    row_bytes = sum(source.nbytes(target.linear, rows=1) for target in targets)
    step = max(ROW_STEP, slab_bytes // row_bytes // ROW_STEP * ROW_STEP)
    if action is not Action.UNFUSE and recipe.schemes[scheme].strategy in (Strategy.TENSOR, Strategy.TENSOR_GROUP):
        step = linear.out_features  # one scale for the whole matrix needs the whole matrix
    written = sum(tensor.nbytes for target in targets for tensor in target.tensors)
    for start in range(0, linear.out_features, step):
        stop = min(start + step, linear.out_features)
        share = written * (stop - start) // linear.out_features
        yield Task(
            key=f"{targets[0].module}[{start}:{stop}]",
            action=action,
            tensor=linear.tensor,
            targets=targets,
            rows=(start, stop),
            read_bytes=(stop - start) * row_bytes,
            write_bytes=share,
        )
