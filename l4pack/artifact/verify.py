"""Verify an artifact, ours or anyone's compressed-tensors Llama 4: what runtimes would read, and whether it is right.

Names, dtypes, shapes and the stanza are checked from headers and config.json; then every byte is read once, a matrix
or a chunk at a time, by a few threads. With a source, kept tensors are compared bit for bit and quantized matrices
dequantized and held against it.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from l4pack.artifact.checks_config import check_config, check_config_kept, check_stanza
from l4pack.artifact.checks_files import check_files
from l4pack.artifact.checks_source import SourceChecks, source_linears
from l4pack.artifact.checks_tensors import Contents, Matrix, examine
from l4pack.artifact.checks_values import Result, Tally, ValueChecks, duplicates
from l4pack.artifact.declared import read_declared
from l4pack.artifact.findings import Finding, Findings
from l4pack.artifact.manifest import MANIFEST_NAME, source_record
from l4pack.artifact.opened import Artifact, open_artifact
from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError
from l4pack.model.config import Llama4Config
from l4pack.model.tensors import Linear, rename
from l4pack.quant.layout import Layout
from l4pack.recipe import Method, Recipe

MAX_WORKERS = 8
MAX_MANIFEST_BYTES = 256 * 1024**2
SAMPLE_SEED = 0


@dataclass(frozen=True)
class Checked:
    """How much was looked at."""

    files: int
    modules: int
    tally: Tally
    sampled_of: int | None  # matrices that --sample chose from; None when all were to be compared


@dataclass(frozen=True)
class Verification:
    """What a verification found, in a fixed order, and how much it looked at."""

    findings: tuple[Finding, ...]
    checked: Checked
    against: str | None

    @property
    def errors(self) -> int:
        """Findings that make the artifact wrong."""
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def ok(self) -> bool:
        """No error, and something was really checked."""
        tally = self.checked.tally
        compared = self.against is None or tally.matrices_compared > 0
        return not self.errors and tally.matrices > 0 and compared


@dataclass(frozen=True)
class _Unit:
    """A piece of work: where its bytes begin, what it does, and the source file it uses up."""

    place: tuple[str, int]
    run: Callable[[Result], None]
    source_file: str | None = None


def verify_artifact(
    folder: Path,
    against: Checkpoint | None = None,
    sample: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Verification:
    """Check everything in `folder`; `advance` is told the artifact's tensor bytes as they are checked.

    With `against`, kept tensors must equal the source's bit for bit, and `sample` quantized matrices (all of them when
    None; chosen with a fixed seed) must be as close to the source as their scheme allows. Peak memory is a few
    matrices. Raises SourceError when the artifact or the source can't be opened at all.
    """
    found = Findings()
    artifact = open_artifact(folder, found)
    if against is not None and against.bare:
        raise SourceError(f"{against.name} has no weights to compare with", hint="give the checkpoint itself")
    declared = read_declared(artifact.stanza, found)
    check_config(artifact, found)
    check_stanza(artifact, declared, found)
    check_files(artifact, against, found)
    contents = examine(artifact, declared, found)
    manifest = _manifest(artifact, found)
    if against is not None:
        check_config_kept(artifact, against, found)
        _check_source_record(manifest, against, found)
    tally, sampled_of = _read_all(artifact, contents, manifest, against, sample, advance or (lambda _: None), found)
    if not contents.matrices and not any(finding.level == "error" for finding in found):
        found.error("stanza", "quantization_config", "no matrix is quantized")
    checked = Checked(len(artifact.files), contents.modules, tally, sampled_of)
    return Verification(tuple(found), checked, against.name if against else None)


def _read_all(
    artifact: Artifact,
    contents: Contents,
    manifest: Mapping[str, Any],
    against: Checkpoint | None,
    sample: int | None,
    advance: Callable[[int], None],
    found: Findings,
) -> tuple[Tally, int | None]:
    """Every check that reads tensors."""
    with Reader(artifact.entries, lambda file: artifact.folder / file) as reader:
        values = ValueChecks(artifact.entries, reader, _digests(artifact, manifest, found), advance)
        work = _Work(artifact, contents, values, reader)
        if against is None or against.store is None:
            results = _run(work.alone(), None, None)
            sampled_of = None
        else:
            with Reader(against.entries, against.store.path) as source_reader:
                checks = SourceChecks(against, source_reader, _made_by(manifest, artifact.config))
                units, sampled_of = work.beside(against, source_reader, checks, sample, found)
                results = _run(units, against, source_reader)
        tally = Tally()
        fingerprints: dict[str, bytes] = {}
        for result in [*results, work.kv_scales()]:
            tally.add(result.tally)
            found.extend(result.found)
            fingerprints |= result.fingerprints
    order = {matrix.linear.module: number for number, matrix in enumerate(contents.matrices)}
    duplicates(dict(sorted(fingerprints.items(), key=lambda item: order[item[0]])), found)
    return tally, sampled_of


class _Work:
    """Cuts an artifact into units."""

    def __init__(self, artifact: Artifact, contents: Contents, values: ValueChecks, reader: Reader) -> None:
        self._artifact, self._contents, self._values, self._reader = artifact, contents, values, reader

    def alone(self) -> list[_Unit]:
        """Without a source: a matrix or a kept tensor each, in file order."""
        units = [self._kept(name, None) for name in self._plain_names()]
        units += [self._checked(matrix) for matrix in self._contents.matrices]
        return sorted(units, key=lambda unit: unit.place)

    def beside(
        self, source: Checkpoint, reader: Reader, checks: SourceChecks, sample: int | None, found: Findings
    ) -> tuple[list[_Unit], int | None]:
        """With a source, in the order of its files; gate and up of a fused tensor together."""
        places = source_linears(source, self._artifact.layout.linears)
        if places is None:
            found.error("config", "config.json", "the source is a model of another shape: nothing was compared")
            return self.alone(), None
        chosen = _choose(self._contents.matrices, sample)
        units = [self._checked(matrix) for matrix in self._contents.matrices if matrix.linear.module not in chosen]
        units += self._kept_units(source, reader, places)
        units += self._slab_units(source, checks, places, chosen)
        sampled_of = len(self._contents.matrices) if len(chosen) < len(self._contents.matrices) else None
        return sorted(units, key=lambda unit: unit.place), sampled_of

    def kv_scales(self) -> Result:
        """All KV-cache scales at once: each positive, and not all of them 1."""
        result = Result()
        values = {number for name in self._contents.kv_scales for number in self._values.kv_scale(name, result)}
        if values == {1.0}:
            message = f"all {len(self._contents.kv_scales)} scales are 1: they were never computed"
            result.found.error("kv-scale", self._contents.kv_scales[0], message)
        return result

    def _plain_names(self) -> list[str]:
        return [linear.tensor for linear in self._contents.plain] + [spec.name for spec in self._contents.others]

    def _checked(self, matrix: Matrix) -> _Unit:
        def run(result: Result) -> None:
            self._values.matrix(matrix, result)

        return _Unit(_place(self._artifact.entries[matrix.values]), run)

    def _kept(self, name: str, source: tuple[Reader, TensorEntry] | None) -> _Unit:
        entry = self._artifact.entries[name]
        if source is None:
            return _Unit(_place(entry), lambda result: self._values.kept(name, result, None))
        reader, old = source
        if (old.dtype, old.shape) != (entry.dtype, entry.shape):

            def differ(result: Result) -> None:
                self._values.kept(name, result, None)
                message = f"is {entry.dtype} {list(entry.shape)}, the source is {old.dtype} {list(old.shape)}"
                result.found.error("kept", name, message)

            return _Unit(_place(old), differ, old.file)
        return _Unit(
            _place(old),
            lambda result: self._values.kept(name, result, lambda start, size: reader.span(old.name, start, size)),
            old.file,
        )

    def _kept_units(self, source: Checkpoint, reader: Reader, places: Mapping[str, Linear]) -> list[_Unit]:
        names = {spec.name: rename(spec.name, self._artifact.layout.naming, source.layout.naming)
                 for spec in self._contents.others}  # fmt: skip
        for linear in self._contents.plain:
            if places[linear.module].layout is Layout.OUT_IN:
                names[linear.tensor] = places[linear.module].tensor
        return [
            self._kept(name, (reader, source.entries[old]) if old in source.entries else None)
            for name, old in names.items()
        ]

    def _slab_units(
        self, source: Checkpoint, checks: SourceChecks, places: Mapping[str, Linear], chosen: set[str]
    ) -> list[_Unit]:
        slabs: dict[tuple[str, int | None], list[Matrix | Linear]] = defaultdict(list)
        for matrix in self._contents.matrices:
            if matrix.linear.module in chosen:
                old = places[matrix.linear.module]
                slabs[old.tensor, old.expert].append(matrix)
        for linear in self._contents.plain:
            old = places[linear.module]
            if old.layout is Layout.IN_OUT:
                slabs[old.tensor, old.expert].append(linear)
        units = []
        for (tensor, expert), items in slabs.items():
            entry = source.entries[tensor]
            file, start = _place(entry)
            start += (expert or 0) * (entry.nbytes // entry.shape[0]) if len(entry.shape) == 3 else 0
            units.append(_Unit((file, start), self._compare(items, checks, places), file))
        return units

    def _compare(
        self, items: list[Matrix | Linear], checks: SourceChecks, places: Mapping[str, Linear]
    ) -> Callable[[Result], None]:
        def run(result: Result) -> None:
            modules = [item.module if isinstance(item, Linear) else item.linear.module for item in items]
            slabs = checks.slabs([places[module] for module in modules])
            for item, slab in zip(items, slabs, strict=True):
                if isinstance(item, Linear):
                    self._values.kept(item.tensor, result, None)
                    entry = self._artifact.entries[item.tensor]
                    checks.plain(item.tensor, self._reader.tensor(item.tensor), entry.dtype, slab, result)
                else:
                    arrays = self._values.matrix(item, result)
                    checks.matrix(item, arrays, slab, result)

        return run


def _run(units: list[_Unit], source: Checkpoint | None, reader: Reader | None) -> list[Result]:
    """Do all units on a few threads; results come in the order of the units."""
    left = Counter(unit.source_file for unit in units if unit.source_file)
    lock = threading.Lock()

    def do(unit: _Unit) -> Result:
        result = Result()
        unit.run(result)
        if unit.source_file and source is not None and source.store is not None and reader is not None:
            with lock:
                left[unit.source_file] -= 1
                used_up = not left[unit.source_file]
            if used_up:
                reader.forget(unit.source_file)
                source.store.release(unit.source_file)
        return result

    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)) + 1)
    with ThreadPoolExecutor(workers, "l4pack-verify") as pool:
        return list(pool.map(do, units))


def _place(entry: TensorEntry) -> tuple[str, int]:
    return entry.file, entry.start


def _choose(matrices: tuple[Matrix, ...], sample: int | None) -> set[str]:
    modules = [matrix.linear.module for matrix in matrices]
    if sample is None or sample >= len(modules):
        return set(modules)
    return set(random.Random(SAMPLE_SEED).sample(modules, sample))


def _manifest(artifact: Artifact, found: Findings) -> Mapping[str, Any]:
    """The manifest, empty when the artifact has none."""
    if MANIFEST_NAME not in artifact.files:
        return {}
    try:
        if artifact.files[MANIFEST_NAME] > MAX_MANIFEST_BYTES:
            raise ValueError("implausibly large")
        manifest = json.loads((artifact.folder / MANIFEST_NAME).read_bytes())
        if not isinstance(manifest, dict) or not isinstance(manifest["tensors"], dict):
            raise ValueError("no tensors")
    except (ValueError, KeyError, RecursionError) as error:
        found.error("digest", MANIFEST_NAME, f"can't be read ({error})")
        return {}
    return manifest


def _digests(artifact: Artifact, manifest: Mapping[str, Any], found: Findings) -> dict[str, str]:
    """Hex SHA-256 by tensor; names that only the manifest or only the files have become findings."""
    tensors = manifest.get("tensors", {})
    digests = {name: value.get("sha256", "") if isinstance(value, dict) else "" for name, value in tensors.items()}
    if manifest:
        for name in sorted(set(digests) - set(artifact.entries)):
            found.error("digest", name, "is in the manifest and not in the files")
        for name in sorted(set(artifact.entries) - set(digests)):
            found.error("digest", name, "is in the files and not in the manifest")
    return digests


def _made_by(manifest: Mapping[str, Any], config: Llama4Config) -> Callable[[Linear], Method | None]:
    """How the manifest's recipe says that a matrix was made; None where it says nothing."""
    try:
        recipe = Recipe.model_validate(manifest.get("recipe"))
    except ValidationError:
        return lambda _: None

    def method(linear: Linear) -> Method | None:
        number = recipe.rule_for(linear.role, linear.layer, config.text.num_hidden_layers)
        scheme = None if number is None else recipe.schemes.get(recipe.rules[number].scheme)
        return scheme.method if scheme else None

    return method


def _check_source_record(manifest: Mapping[str, Any], source: Checkpoint, found: Findings) -> None:
    record = manifest.get("source")
    if isinstance(record, dict) and record.get("headers_sha256") != source_record(source)["headers_sha256"]:
        found.warning("digest", MANIFEST_NAME, f"the artifact was made from {record.get('name')}, with other tensors")
