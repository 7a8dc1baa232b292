"""Reading an artifact's tensors, each once, and a source's beside them: a few threads, a matrix or a chunk at a time."""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from l4pack.artifact.manifest_schema import ManifestFile
from l4pack.checkpoint.header import TensorEntry
from l4pack.checkpoint.matrices import MatrixSource, matrices_of
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint
from l4pack.model.tensors import Linear, rename
from l4pack.plan.assign import is_carried
from l4pack.quant.layout import Layout
from l4pack.verify.checks_source import SourceChecks, as_kept, kept_as
from l4pack.verify.checks_tensors import FoundTensors, Matrix
from l4pack.verify.checks_values import ValueChecks, duplicates
from l4pack.verify.findings import Findings
from l4pack.verify.merged import check_global_scales
from l4pack.verify.opened import OpenedArtifact
from l4pack.verify.origin import made_by, source_linears
from l4pack.verify.recorded import check_recorded
from l4pack.verify.tally import SAMPLE_SEED, Tally, UnitResult
from l4pack.work import machine

MAX_WORKERS = 8


@dataclass(frozen=True)
class _Unit:
    """A piece of work: where its bytes begin, what it does, and the source files it uses up."""

    place: tuple[str, int]
    run: Callable[[UnitResult], None]
    source_files: tuple[str, ...] = ()


_Pair = tuple[Matrix | Linear, Linear]  # the artifact's matrix, quantized or plain, and the source's


def check_values(
    artifact: OpenedArtifact,
    contents: FoundTensors,
    manifest: ManifestFile | None,
    against: Checkpoint | None,
    sample: int | None,
    advance: Callable[[int], None],
    found: Findings,
) -> tuple[Tally, int | None]:
    """Every check that reads tensors; `advance` is told the artifact's tensor bytes as they are checked.

    What is found goes to `found`. Returns how much was looked at, and of how many matrices `sample` were compared with
    the source, if not of all.
    """
    with Reader(artifact.entries, lambda file: artifact.folder / file) as reader:
        digests = {name: record.sha256 for name, record in manifest.tensors.items()} if manifest else {}
        values = ValueChecks(artifact.entries, reader, digests, advance)
        work = _Work(artifact, contents, values, reader)
        if against is None or against.store is None:
            results = _run(work.alone(), None, None)
            sampled_of = None
        else:
            with Reader(against.entries, against.store.path) as source_reader:
                checks = SourceChecks(made_by(manifest, artifact.config))
                units, sampled_of = work.beside(against, source_reader, checks, sample)
                results = _run(units, against, source_reader)
        check_recorded(artifact, contents, reader, found)
        check_global_scales(contents, reader, found)
        tally = Tally()
        fingerprints: dict[str, bytes] = {}
        sources: dict[str, bytes] = {}
        for result in [*results, work.kv_scales()]:
            tally.add(result.tally)
            found.extend(result.found)
            fingerprints |= result.fingerprints
            sources |= result.sources
    order = {matrix.linear.module: number for number, matrix in enumerate(contents.matrices)}
    ordered = dict(sorted(fingerprints.items(), key=lambda item: order[item[0]]))
    # Models are expanded by storing experts twice: a manifest whose digests hold says that the source was like that.
    duplicates(ordered, sources, found, "error" if manifest is None or against is not None else "warning")
    return tally, sampled_of


class _Work:
    """Cuts an artifact into units."""

    def __init__(self, artifact: OpenedArtifact, contents: FoundTensors, values: ValueChecks, reader: Reader) -> None:
        self._artifact, self._contents, self._values, self._reader = artifact, contents, values, reader

    def alone(self) -> list[_Unit]:
        """Without a source: a matrix or a kept tensor each, in file order."""
        units = [self._kept(name, None) for name in self._plain_names()]
        units += [self._checked(matrix) for matrix in self._contents.matrices]
        return sorted(units, key=lambda unit: unit.place)

    def beside(
        self, source: Checkpoint, reader: Reader, checks: SourceChecks, sample: int | None
    ) -> tuple[list[_Unit], int | None]:
        """With a source, in the order of its files; gate and up of a fused tensor together."""
        places = source_linears(source, self._artifact.layout.linears)
        assert places is not None, "sources of another shape are told before"
        chosen = _choose(self._contents.matrices, sample)
        units = [self._checked(matrix) for matrix in self._contents.matrices if matrix.linear.module not in chosen]
        units += self._kept_units(source, reader, places)
        units += self._slab_units(source, reader, checks, places, chosen)
        sampled_of = len(self._contents.matrices) if len(chosen) < len(self._contents.matrices) else None
        return sorted(units, key=lambda unit: unit.place), sampled_of

    def kv_scales(self) -> UnitResult:
        """All KV-cache scales at once: each positive, and not all of them 1."""
        result = UnitResult()
        values = {number for name in self._contents.kv_scales for number in self._values.kv_scale(name, result)}
        if values == {1.0}:
            message = f"all {len(self._contents.kv_scales)} scales are 1: they were never computed"
            result.found.error("kv-scale", self._contents.kv_scales[0], message)
        return result

    def _plain_names(self) -> list[str]:
        return [linear.tensor for linear in self._contents.plain] + [spec.name for spec in self._contents.others]

    def _checked(self, matrix: Matrix) -> _Unit:
        def run(result: UnitResult) -> None:
            self._values.matrix(matrix, self._values.read(matrix, result), result)

        return _Unit(_place(self._artifact.entries[matrix.values]), run)

    def _kept(self, name: str, source: tuple[Reader, TensorEntry] | None) -> _Unit:
        entry = self._artifact.entries[name]
        if source is None:
            return _Unit(_place(entry), lambda result: self._values.kept(name, result, None))
        reader, old = source
        if old.shape != entry.shape or entry.dtype not in kept_as(old.dtype):

            def differ(result: UnitResult) -> None:
                self._values.kept(name, result, None)
                message = f"is {entry.dtype} {list(entry.shape)}, the source is {old.dtype} {list(old.shape)}"
                result.found.error("kept", name, message)

            return _Unit(_place(old), differ, tuple(old.stored))
        return _Unit(
            _place(old),
            lambda result: self._values.kept(name, result, as_kept(reader, old, entry.dtype, result)),
            tuple(old.stored),
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
        self, against: Checkpoint, reader: Reader, checks: SourceChecks, places: Mapping[str, Linear], chosen: set[str]
    ) -> list[_Unit]:
        source = matrices_of(against, reader)
        slabs: dict[Hashable, list[_Pair]] = defaultdict(list)
        for matrix in self._contents.matrices:
            if matrix.linear.module in chosen:
                old = places[matrix.linear.module]
                slabs[source.together(old)].append((matrix, old))
        for linear in self._contents.plain:
            old = places[linear.module]
            if old.layout is Layout.IN_OUT:
                slabs[source.together(old)].append((linear, old))
        units = []
        for items in slabs.values():
            begins = min(source.begins(old) for _, old in items)
            files = {file for _, old in items for file in source.files(old)}
            units.append(_Unit(begins, self._compare(items, source, against, checks), tuple(files)))
        return units

    def _compare(
        self, items: Sequence[_Pair], source: MatrixSource, against: Checkpoint, checks: SourceChecks
    ) -> Callable[[UnitResult], None]:
        def run(result: UnitResult) -> None:
            blocks = source.slab([old for _, old in items]).blocks()
            for (item, old), block in zip(items, blocks, strict=True):
                if isinstance(item, Linear):
                    self._values.kept(item.tensor, result, None)
                    entry = self._artifact.entries[item.tensor]
                    checks.plain(item.tensor, self._reader.tensor(item.tensor), entry.dtype, block, result)
                else:
                    arrays = self._values.read(item, result)
                    carried = is_carried(against, old, item.scheme)
                    explained = checks.matrix(item, item.decode(arrays), block, result, carried=carried)
                    self._values.matrix(item, arrays, result, explained=explained)

        return run


def _run(units: list[_Unit], source: Checkpoint | None, reader: Reader | None) -> list[UnitResult]:
    """Do all units on a few threads; results come in the order of the units."""
    left = Counter(file for unit in units for file in unit.source_files)
    lock = threading.Lock()

    def do(unit: _Unit) -> UnitResult:
        result = UnitResult()
        unit.run(result)
        if source is not None and source.store is not None and reader is not None:
            with lock:
                left.subtract(unit.source_files)
                used_up = [file for file in unit.source_files if not left[file]]
            for file in used_up:
                reader.forget(file)
                source.store.release(file)
        return result

    workers = min(MAX_WORKERS, machine.cores() + 1)
    with ThreadPoolExecutor(workers, "l4pack-verify") as pool:
        return list(pool.map(do, units))


def _place(entry: TensorEntry) -> tuple[str, int]:
    return entry.file, entry.start


def _choose(matrices: tuple[Matrix, ...], sample: int | None) -> set[str]:
    modules = [matrix.linear.module for matrix in matrices]
    if sample is None or sample >= len(modules):
        return set(modules)
    return set(random.Random(SAMPLE_SEED).sample(modules, sample))
