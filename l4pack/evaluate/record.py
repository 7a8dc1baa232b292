"""`accuracy.json`: what evaluations of an artifact found, inside its folder.

The most careful evaluation is the object itself, with the stable keys; all others stand under `evaluations`, each as
whole as the first. Two evaluations are the same when their `identity` is: weights measured, original, text, tokens,
tasks, device, versions. Measuring the same again replaces a record, anything else adds one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l4pack.artifact.contents import recorded_digest
from l4pack.datafile import read_json
from l4pack.errors import QualityError, UsageError
from l4pack.evaluate.gates import judge, limits_of
from l4pack.evaluate.schema import parse_evaluation
from l4pack.recipe import Gates
from l4pack.work.files import write_atomic
from l4pack.work.identity import Identity

ACCURACY_NAME = "accuracy.json"
MAX_BYTES = 200_000_000
MAX_RECORDS = 1000
OTHERS = "evaluations"


def write_accuracy(artifact: Path, record: dict[str, Any], gates: Gates, recovery: Mapping[str, float]) -> None:
    """Judge a record by the gates and put it beside those that are there.

    A gate that the same evaluation was judged by before stays, unless it is given again. Records of weights that are
    gone go with them. Raises UsageError when the file there can't be read.
    """
    with _alone(artifact):
        earlier = read_evaluations(artifact)
        same = find(earlier, identity_of(record).digest)
        before = {gate["gate"]: gate["limit"] for gate in same["gates"]} if same else {}
        if same and "sample" in same:
            record.setdefault("sample", same["sample"])
        record["gates"] = judge(record, before | limits_of(gates, recovery))
        here = {record["identity"]["artifact"], recorded_digest(artifact)}
        others = [one for one in earlier if one is not same and one["identity"]["artifact"] in here]
        first, *rest = by_care([record, *others])
        text = json.dumps({**first, OTHERS: rest}, indent=1, ensure_ascii=False)
        write_atomic(artifact / ACCURACY_NAME, (text + "\n").encode())


def read_evaluations(artifact: Path) -> list[dict[str, Any]]:
    """All records of a folder, the most careful first; none where nothing was measured. Raises UsageError."""
    path = artifact / ACCURACY_NAME
    hint = "run `l4pack evaluate` again, once it is moved away"
    if not path.exists():
        return []
    value = read_json(path, MAX_BYTES, hint)
    others = value.pop(OTHERS, [])
    if not isinstance(others, list) or len(others) >= MAX_RECORDS:
        raise UsageError(f"{path}: {OTHERS} is no list of evaluations", hint=hint)
    return by_care(parse_evaluation(one, str(path)).plain() for one in (value, *others))


def read_accuracy(artifact: Path) -> dict[str, Any]:
    """The most careful record of the weights that are there. Raises UsageError without one, QualityError for others'."""
    records = read_evaluations(artifact)
    if not records:
        raise UsageError(f"{artifact} has no {ACCURACY_NAME}", hint="run `l4pack evaluate` first")
    check_current(artifact, records)
    return records[0]


def check_current(artifact: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise QualityError when a record is of other weights or another configuration than the folder's manifest."""
    here = recorded_digest(artifact)
    if here is not None and any(one["identity"]["artifact"] != here for one in records):
        raise QualityError(
            f"{artifact / ACCURACY_NAME} was measured on other weights or another config.json than this folder's",
            hint=f"run `l4pack evaluate {artifact} --against SOURCE` again",
        )


def find(records: Iterable[dict[str, Any]], digest: str) -> dict[str, Any] | None:
    """The record of an identity's digest."""
    return next((one for one in records if identity_of(one).digest == digest), None)


def identity_of(record: Mapping[str, Any]) -> Identity:
    """What an evaluation was made of."""
    return Identity(record["identity"])


def by_care(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most careful first: beside the original, as the runtime computes, on the most tokens, in float32."""
    return sorted(records, key=_care)


def _care(record: Mapping[str, Any]) -> tuple[Any, ...]:
    paired, as_served = "kl_mean" in record, not record["identity"].get("--weights-only")
    questions = sum(task["questions"] for task in record["tasks"].values())
    exact = record["run"]["dtype"] == "float32"
    digest = identity_of(record).digest
    return (not paired, not as_served, -record["tokens"], -questions, not exact, digest)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder while its record is read and written, so that two evaluations don't lose each other's."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
