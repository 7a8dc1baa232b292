"""A whole Scout (217 GB) or Maverick (803 GB) through every step, on a few GB of disk.

    python benchmarks/full_size.py scout FOLDER                          # a folder on btrfs or XFS, made to compress
    python benchmarks/full_size.py scout FOLDER --layers 4               # of its first layers alone
    python benchmarks/full_size.py maverick ANY_FOLDER --headers-only    # what reads no weight, in seconds

Planned bytes must be written bytes and memory must stay within its plan, or it ends with status 1. `quantize` rounds
(`int4-rtn`), is killed half way and goes on; `cp` copies some of the same shards in the same run; `verify` compares every
matrix, or `--sample` of them; `calibrate` solves (`int4`) a model of the first two layers, whose values all differ, and
projects to all. Files share their bytes, so disks are hardly read: times are those of the processor and of memory.
FOLDER/results-MODEL.json keeps each step's figures, so steps may be run one by one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commands import Ended, run
from full_model import Values, check_reflinks, full_config, make_model

from l4pack.model.config import parse_config
from l4pack.recipe import load_recipe
from l4pack.units import human_bytes, human_seconds

ROUNDED, SOLVED = "int4-rtn", "int4"
PROMISING = {"scout": "scout-int4-1xh100", "maverick": "maverick-int4-4xh100"}
SOLVED_LAYERS = 2  # Maverick's dense and MoE layers take turns
SOLVED_LENGTH = 512
EVALUATED_TEXT = ("--text", "demo", "--samples", 4, "--sequence-length", 256)
COPIED_SHARDS = 4
DOES_NOT_FIT = 3
NAMED_MACHINE = "64-core"  # hours of this one would take measuring it


@dataclass(frozen=True)
class Outcome:
    """What a step planned and what it did; None where there is no such figure. Bytes, wall and processor seconds."""

    step: str
    planned_bytes: int | None = None
    found_bytes: int | None = None
    planned_peak_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    planned_seconds: float | None = None
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether bytes are as planned and memory is within its plan."""
        exact = self.planned_bytes is None or self.planned_bytes == self.found_bytes
        return exact and (self.planned_peak_bytes is None or (self.peak_bytes or 0) <= self.planned_peak_bytes)


def of(step: str, ended: Ended, **figures: Any) -> Outcome:
    """An outcome with what a process took."""
    return Outcome(step, peak_bytes=ended.peak_bytes, seconds=ended.seconds, cpu_seconds=ended.cpu_seconds, **figures)


@dataclass(frozen=True)
class Bench:
    """One model and where its folders are."""

    model: str
    layers: int | None
    folder: Path
    made_of: Values = Values.REPEATED
    sample: int | None = None
    calibration_samples: int = 4

    @property
    def name(self) -> str:
        """The model, with its layers where it has not all, and what it is made of."""
        cut = "" if self.layers is None else f"-{self.layers}"
        return f"{self.model}{cut}-{self.made_of}"

    @property
    def source(self) -> Path:
        """The checkpoint."""
        return self.folder / self.name

    @property
    def artifact(self) -> Path:
        """The checkpoint's rounded artifact."""
        return self.folder / f"{self.name}-{ROUNDED}"

    def make(self) -> Outcome:
        """The model's files."""
        started, before = time.monotonic(), shutil.disk_usage(self.folder).used
        total = make_model(self.source, self.model, self.layers, self.made_of)
        subprocess.run(["sync", "--file-system", str(self.folder)], check=True)
        grown = shutil.disk_usage(self.folder).used - before
        note = "headers and holes" if self.made_of is Values.NONE else f"{human_bytes(grown)} more of the disk in use"
        return Outcome("make", total, weight_bytes(self.source), seconds=time.monotonic() - started, note=note)

    def inspect(self) -> Outcome:
        """Headers of all shards against the configuration alone."""
        bare, found = (run("inspect", source) for source in (self.source / "config.json", self.source))
        planned, actual = (ended.output["weight_bytes"] for ended in (bare, found))
        return of("inspect", found, planned_bytes=planned, found_bytes=actual,
                  note=f"{found.output['tensors']:,} tensors in {found.output['shards']} shards")  # fmt: skip

    def plan(self) -> Outcome:
        """The plan from the configuration alone against the checkpoint's."""
        asked = ("--recipe", ROUNDED, "--on", NAMED_MACHINE)
        bare, found = (run("plan", path, *asked) for path in (self.source / "config.json", self.source))
        planned, actual = (ended.output["weight_bytes"] for ended in (bare, found))
        return of("plan", found, planned_bytes=planned, found_bytes=actual, note=f"weights as {ROUNDED}")

    def copy(self) -> Outcome:
        """`cp` of some shards, one at a time, scaled to all: shards of a kind are alike."""
        shards = sorted(self.source.glob("*.safetensors"))
        some = shards[1 : 1 + COPIED_SHARDS]  # the first is embeddings, head and vision
        copied, started = self.folder / "copied", time.monotonic()
        for shard in some:
            subprocess.run(["cp", "--reflink=never", str(shard), str(copied)], check=True)
            subprocess.run(["sync", str(copied)], check=True)
            copied.unlink()
        share = sum(shard.stat().st_size for shard in some) / sum(shard.stat().st_size for shard in shards)
        note = f"of {len(some)} shards, synced, scaled to {len(shards)}"
        return Outcome("cp", seconds=(time.monotonic() - started) / share, note=note)

    def quantize(self) -> Outcome:
        """Rounding, killed when half is written, and gone on with."""
        planned = run("plan", self.source, "--recipe", ROUNDED).output
        work = self.artifact.with_name(f"{self.artifact.name}.partial")
        command = ("quantize", self.source, "--recipe", ROUNDED, "--out", self.artifact)
        shutil.rmtree(self.artifact, ignore_errors=True)
        killed = run(*command, "--restart", killed_when=lambda: 2 * allocated_bytes(work) > planned["artifact_bytes"])
        ended = run(*command)
        resumed = ended.output["bytes_resumed"] / planned["read_bytes"]
        return Outcome(
            f"quantize {ROUNDED}",
            planned["artifact_bytes"],
            folder_bytes(self.artifact),
            planned["peak_ram_bytes"],
            ended.peak_bytes,
            killed.seconds + ended.seconds,
            killed.cpu_seconds + ended.cpu_seconds,
            predicted_seconds(planned),
            f"killed after {human_seconds(killed.seconds)}, {resumed:.0%} of the source not read again",
        )

    def verify(self) -> Outcome:
        """Every matrix, or a sample, against the source."""
        some = () if self.sample is None else ("--sample", self.sample)
        ended = run("verify", self.artifact, "--against", self.source, *some)
        checked = ended.output["checked"]
        of_all = f" of {checked['compared_sample_of']:,}" if self.sample else ""
        note = f"{checked['matrices_compared']:,}{of_all} matrices, {checked['kept_compared']:,} kept tensors compared, all"
        return of("verify --against", ended, note=f"{note} right" if ended.output["ok"] else "WRONG")

    def budget(self) -> Outcome:
        """The artifact, or the checkpoint before there is one, on the promise's device, against the configuration alone."""
        promise = load_recipe(PROMISING[self.model]).promise
        assert promise is not None
        on = ["--device", promise.device, "--context", promise.context, "--kv-dtype", promise.kv_dtype or "auto"]
        accepted = (0, DOES_NOT_FIT)
        before = run("budget", self.source / "config.json", "--recipe", ROUNDED, *on, accepted=accepted)
        made = (self.artifact,) if self.artifact.exists() else (self.source, "--recipe", ROUNDED)
        after = run("budget", *made, *on, accepted=accepted)
        note = f"{after.output['verdict']} on {promise.device} with {promise.context:,} tokens"
        planned, found = (ended.output["weight_bytes"] for ended in (before, after))
        return of("budget", after, planned_bytes=planned, found_bytes=found, note=note)

    def evaluate(self) -> Outcome:
        """A few tokens through both models."""
        work = self.folder / f"{self.name}-evaluate"
        against = ("--against", self.source, *EVALUATED_TEXT, "--work", work, "--restart")
        ended = run("evaluate", self.artifact, *against)
        result = ended.output
        note = f"{result['tokens']:,} tokens, KL {result['kl_mean']:.4f} (made-up weights)"
        planned = result["run"]["peak_ram_bytes"]
        return of("evaluate", ended, planned_peak_bytes=planned, note=note)

    def calibrate(self) -> Outcome:
        """The first layers, solved on a short text; planned with it, and projected to all layers."""
        cut = Bench(self.model, SOLVED_LAYERS, self.folder, Values.VARIED)
        cut.make()
        out = cut.source.with_name(f"{cut.name}-{SOLVED}")
        shutil.rmtree(out, ignore_errors=True)
        text = ("--calibration", "demo", "--sequence-length", SOLVED_LENGTH)
        command = (cut.source, "--recipe", SOLVED, *text, "--calibration-samples", self.calibration_samples)
        planned = run("plan", *command).output
        ended = run("quantize", *command, "--out", out, "--restart")
        layers = parse_config(full_config(self.model)).text.num_hidden_layers
        hours = human_seconds(ended.seconds * layers / SOLVED_LAYERS)
        return of(
            f"quantize {SOLVED}, {SOLVED_LAYERS} layers",
            ended,
            planned_bytes=planned["artifact_bytes"],
            found_bytes=folder_bytes(out),
            planned_peak_bytes=planned["peak_ram_bytes"],
            planned_seconds=predicted_seconds(planned),
            note=f"{self.calibration_samples * SOLVED_LENGTH:,} tokens; {layers} layers at most {hours}",
        )


STEPS: dict[str, Callable[[Bench], Outcome]] = {
    "make": Bench.make,
    "inspect": Bench.inspect,
    "plan": Bench.plan,
    "copy": Bench.copy,
    "quantize": Bench.quantize,
    "verify": Bench.verify,
    "budget": Bench.budget,
    "evaluate": Bench.evaluate,
    "calibrate": Bench.calibrate,
}
OF_HEADERS = ("make", "inspect", "plan", "budget")


def predicted_seconds(plan: Mapping[str, Any]) -> float | None:
    """How long a plan's job takes by this machine's measurement, where it could be taken."""
    return (plan["predicted"] or {}).get("seconds")


def weight_bytes(folder: Path) -> int:
    """Bytes of the tensors in a folder's shards."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            total += path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def allocated_bytes(folder: Path) -> int:
    """Bytes of the files of a job's folder that have been written; those that go meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def table(outcomes: list[Outcome]) -> str:
    """A line a step; wall time as a multiple of `cp`'s where that was taken."""
    copied = next((one.seconds for one in outcomes if one.step == "cp"), None)
    lines = [
        "| step | bytes planned | bytes found | peak planned | peak | wall planned | wall | of cp | CPU s | |",
        "|---" * 10 + "|",
    ]
    for one in outcomes:
        size = [f"{value:,}" if value is not None else "" for value in (one.planned_bytes, one.found_bytes)]
        peak = [human_bytes(value) if value else "" for value in (one.planned_peak_bytes, one.peak_bytes)]
        wall = [human_seconds(value) if value else "" for value in (one.planned_seconds, one.seconds)]
        ratio = f"{one.seconds / copied:.2f}" if one.seconds and copied and one.planned_peak_bytes else ""
        cpu = f"{one.cpu_seconds:.0f}" if one.cpu_seconds else ""
        cells = [one.step, *size, *peak, *wall, ratio, cpu, one.note + ("" if one.kept else " NOT AS PLANNED")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the steps, keep their figures, print them all, and fail where a plan was not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=tuple(PROMISING))
    parser.add_argument("folder", type=Path, help="on a filesystem with reflinks; says how to make one if it has none")
    parser.add_argument("--layers", type=int, help="the first layers alone")
    parser.add_argument(
        "--headers-only", action="store_true", help="make, inspect, plan and budget, of files with holes"
    )
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS))
    parser.add_argument("--sample", type=int, help="verify compares so many matrices, not all")
    parser.add_argument("--calibration-samples", type=int, default=4, help=f"sequences of {SOLVED_LENGTH} solved on")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if not chosen.headers_only:
        check_reflinks(chosen.folder)
    made_of = Values.NONE if chosen.headers_only else Values.REPEATED
    bench = Bench(chosen.model, chosen.layers, chosen.folder, made_of, chosen.sample, chosen.calibration_samples)
    outcomes = run_steps(bench, chosen.steps or (OF_HEADERS if chosen.headers_only else tuple(STEPS)))
    print(table(outcomes))
    sys.exit(not all(outcome.kept for outcome in outcomes))


def run_steps(bench: Bench, steps: Sequence[str]) -> list[Outcome]:
    """Run some steps; the outcomes of all that have been run, which the folder keeps. A model is made once."""
    results = bench.folder / f"results-{bench.name}.json"
    kept: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for step in steps:
        if step == "make" and step in kept and bench.source.exists():
            continue
        outcome = STEPS[step](bench)
        kept[step] = asdict(outcome)
        results.write_text(json.dumps(kept, indent=2) + "\n")
        print(table([outcome]).splitlines()[-1], file=sys.stderr, flush=True)
    return [Outcome(**kept[step]) for step in STEPS if step in kept]


if __name__ == "__main__":
    main()
