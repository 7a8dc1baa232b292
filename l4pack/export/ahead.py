"""The export of an artifact to come: whether there can be one, and what it weighs, before the hours that solving takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.budget.files import CONTAINERS, LLAMA_CPP, FileSubject, Stored
from l4pack.checkpoint.companions import choose
from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.source import Checkpoint, LocalStore
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.errors import UsageError
from l4pack.export.known import target_named
from l4pack.export.plan import EXACT_RECIPE, ExportPlan, plan_export
from l4pack.export.target import TOWER
from l4pack.formats.known import load_format
from l4pack.model.config import parse_config
from l4pack.plan.assign import PlannedTensor
from l4pack.plan.plan import Plan
from l4pack.quant.suffixes import Suffix


def check_ahead(plan: Plan, containers: Sequence[str]) -> None:
    """Raise UsageError for a container that would not hold the artifact to come exactly, as far as its plan tells.

    Its scales are not known yet: one that a container does not have is found when the export begins.
    """
    made = [target for target in plan.targets.values() if target.scheme in plan.recipe.schemes]
    alike = {(target.scheme, target.linear.in_features): target for target in made}
    for name in containers:
        container = target_named(name)
        container.check_model(plan.checkpoint.config)
        for target in alike.values():
            carrier = container.carrier(
                plan.recipe.schemes[target.scheme], target.linear.in_features, scale_dtype(target.tensors)
            )
            if isinstance(carrier, str):
                raise UsageError(
                    f"{name} can't carry {target.module} exactly: {carrier}",
                    hint=f"--recipe {EXACT_RECIPE} can be carried; or leave {name} out of --export",
                )


def scale_dtype(tensors: Sequence[PlannedTensor]) -> str:
    """What a module's scales are stored as; its first tensor where it has none of that name."""
    named = {tensor.name.rpartition(".")[2]: tensor.dtype for tensor in tensors}
    return named.get(Suffix.SCALE, tensors[0].dtype)


@dataclass(frozen=True)
class PlannedExport:
    """The files that `export` will make of an artifact to come: all their bytes, those of tensors, and the memory's view."""

    artifact_bytes: int
    weight_bytes: int
    subject: FileSubject


def planned_export(plan: Plan, runtime: str) -> PlannedExport:
    """What the artifact of `plan` will be in the files of `runtime`, to the byte; reads the tokenizer, no weights.

    Of a bare configuration there is no tokenizer, and none is counted. Raises UsageError as `plan_export` does.
    """
    forms = {name: (load_format(scheme.format), scheme) for name, scheme in plan.recipe.schemes.items()}
    to_come = {linear.module: forms[name] for linear, name in plan.assigned if name is not None}
    with _as_if_made(plan) as artifact:
        found = plan_export(artifact, target_named(CONTAINERS[runtime]), to_come=to_come)
        weights = sum(shard.nbytes - len(shard.prefix) for shard in found.layout.shards)
        return PlannedExport(found.artifact_bytes, weights, _subject(found, plan, runtime))


def _subject(found: ExportPlan, plan: Plan, runtime: str) -> FileSubject:
    """What the memory model is told: the tensors, and the files by their names."""
    stored = [Stored(one.role, one.layer, tensor.nbytes) for one in found.carried for tensor in one.tensors]
    towers = {found.layout.places[one.name].file for one in found.carried if one.role in TOWER}
    first = next(shard.file for shard in found.layout.shards if shard.file not in towers)
    config = found.target.as_run(plan.checkpoint.config)
    path = Path(first) if runtime == LLAMA_CPP else Path()
    tower = Path(min(towers)) if towers else None
    return FileSubject(
        plan.checkpoint.name, config, (), plan.recipe.name, runtime=runtime, path=path, tower=tower, stored=tuple(stored)
    )  # fmt: skip


@contextmanager
def _as_if_made(plan: Plan) -> Iterator[Checkpoint]:
    """The artifact as `export` would open it: its headers as planned, and its small files in a folder for a while."""
    source = plan.checkpoint
    with tempfile.TemporaryDirectory(prefix="l4pack-") as name:
        folder = Path(name)
        for file in source.companions:
            assert source.store is not None
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to(source.store.path(file).absolute())
        (folder / CONTAINER.config_name).write_bytes(plan.config_json)
        (folder / MANIFEST_NAME).write_bytes(plan.manifest_json({}, {}))
        entries = {
            tensor.name: TensorEntry(tensor.name, place.file, tensor.dtype, tensor.shape, place.start, place.nbytes)
            for tensor in plan.tensors
            for place in [plan.places[tensor.name]]
        }
        config = parse_config(json.loads(plan.config_json))
        beside = choose(plan.files, {CONTAINER.config_name, CONTAINER.index_name, *(one.file for one in plan.shards)})
        yield Checkpoint(source.name, config, entries, beside.carried, LocalStore(folder))
