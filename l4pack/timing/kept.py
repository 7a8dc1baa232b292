"""The measurement of this machine: taken once by a program of its own, kept in the user's cache, taken again where it is
another machine's, another version's, or damaged."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from l4pack.errors import L4packError
from l4pack.timing.speeds import Speeds
from l4pack.timing.work import Kind
from l4pack.work import machine
from l4pack.work.files import write_atomic

CACHE_ENV = "L4PACK_CACHE"
MEASURED_BY = 2  # another number: kept measurements are of other things than are measured now
MOST_BYTES, MOST_SECONDS = 100_000, 300
_NEEDED = ("torch", "transformers", "numba")
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Measurement(BaseModel):
    """What is kept: of which machine, when it was taken, and the rates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: dict[str, str]
    taken: str
    busy: bool = False  # whether others ran meanwhile
    rates: dict[Kind, Rate]


def here(folder: Path, device: str, *, take: bool, say: Callable[[str], None]) -> Speeds | None:
    """What this machine does, with the disk that `folder` is on; None where nothing is kept and none may be taken, or
    where libraries to take one with are missing.

    Raises L4packError when measuring fails.
    """
    there = _existing(folder)
    identity = machine_identity(there, device)
    kept = _read(_path(identity), identity)
    if kept is None and take and all(map(find_spec, _NEEDED)):
        say("measuring what this machine does, once, for up to ten seconds beside loading what is measured")
        busy = os.getloadavg()[0] > machine.cores() / 2
        rates = _taken(there, device)
        kept = Measurement(machine=identity, taken=f"{datetime.now(UTC):%Y-%m-%d}", busy=busy, rates=rates)
        # Of a busy machine it serves this plan alone: kept, it would make every later job look many times as long.
        with suppress(OSError):  # a home that can't be written to: measured again next time
            if not busy:
                keep(kept)
    if kept is None:
        return None
    basis = f"measured on {kept.taken}{', others running meanwhile' if kept.busy else ''}"
    return Speeds("this machine", kept.rates, basis, device=device.partition(":")[0])


def keep(measurement: Measurement) -> None:
    """Keep a measurement for its machine. Raises OSError."""
    path = _path(measurement.machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, measurement.model_dump_json(indent=1).encode())


def _path(identity: dict[str, str]) -> Path:
    return cache_folder() / f"speed-{_digest(identity)}.json"


def cache_folder() -> Path:
    """Where measurements are kept: `L4PACK_CACHE`, or `l4pack` in the user's cache folder."""
    if named := os.environ.get(CACHE_ENV):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l4pack"


def machine_identity(folder: Path, device: str) -> dict[str, str]:
    """What decides the rates: processor, cores and threads, device, disk, versions."""
    return {
        "measured by": str(MEASURED_BY),
        "processor": _processor(),
        "cores": str(machine.cores()),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "device": device,
        "disk": str(folder.stat().st_dev),
        **{name: _version(name) for name in ("l4pack", *_NEEDED)},
    }


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _digest(identity: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, identity: dict[str, str]) -> Measurement | None:
    """What is kept; None where nothing is, or not of this machine, of it while others ran, or not a measurement."""
    try:
        with path.open("rb") as stream:
            kept = Measurement.model_validate_json(stream.read(MOST_BYTES))
    except (OSError, ValidationError):
        return None
    usable = kept.machine == identity and set(Kind) == set(kept.rates)
    return kept if usable and not kept.busy else None


def _taken(folder: Path, device: str) -> dict[Kind, float]:
    command = [sys.executable, "-m", "l4pack.timing.program", str(folder), device]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
        found = {Kind(name): float(rate) for name, rate in json.loads(ended.stdout).items()}
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        raise L4packError(
            "what this machine does could not be measured", hint="plan for a named device instead: --on 8-core"
        ) from error
    return {**dict.fromkeys(Kind, 1e30), **found}  # what a device does not do takes no time there
