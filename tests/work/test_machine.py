"""The least of machine, containers and what was asked is what a job may take, however cgroups are mounted and nested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended

from l4pack.checkpoint.open import open_source
from l4pack.errors import BudgetError
from l4pack.plan.plan import Plan, RunLimits, make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe
from l4pack.work import machine
from l4pack.work.machine import ASKED, CONTAINER, MACHINE, Room

GB = 10**9
V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:27 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 23 0:28 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)
Usage = namedtuple("Usage", ["rss", "shared"])


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A machine of 64 GB free and 16 cores whose cgroups are the given files; this process has 1 GB of its own."""
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: namedtuple("Free", ["available"])(63 * GB))
    monkeypatch.setattr(machine.psutil.Process, "memory_info", lambda _: Usage(1.5 * GB, 0.5 * GB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))

    def make(group: str, mounts: str, files: dict[str, object]) -> Path:
        texts = {"proc/self/cgroup": group, "proc/self/mountinfo": mounts, **files}
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


def v2(folder: str, **values: object) -> dict[str, object]:
    return {f"sys/fs/cgroup/{folder}{name.replace('_', '.', 1)}": value for name, value in values.items()}


def v1(folder: str, limit: object, usage: object = 0, stat: str = "") -> dict[str, object]:
    names = {"limit_in_bytes": limit, "usage_in_bytes": usage, "stat": stat}
    return {f"sys/fs/cgroup/memory/{folder}memory.{name}": value for name, value in names.items()}


STAT2 = f"anon {GB}\ninactive_file {2 * GB}\nactive_file {GB}\nfile_mapped 7"
CASES: dict[str, tuple[str, str, dict[str, object], int]] = {
    "no cgroups": ("", "", {}, 64 * GB),
    "version 2": ("0::/job", V2, v2("job/", memory_max=4 * GB, memory_current=2 * GB), 3 * GB),
    "files that the kernel can take back": (
        "0::/job", V2, v2("job/", memory_max=4 * GB, memory_current=4 * GB, memory_stat=STAT2), 4 * GB,
    ),
    "memory.high throttles before": (
        "0::/job", V2, v2("job/", memory_max=8 * GB, memory_high=3 * GB, memory_current=2 * GB), 2 * GB,
    ),
    "max is no limit": ("0::/job", V2, v2("job/", memory_max="max", memory_high="max", memory_current=GB), 64 * GB),
    "the level around it is tighter": (
        "0::/pod/job", V2,
        {**v2("pod/job/", memory_max=8 * GB, memory_current=GB), **v2("pod/", memory_max=3 * GB, memory_current=2 * GB)},
        2 * GB,
    ),
    "the root of a namespace": ("0::/", V2, v2("", memory_max=2 * GB, memory_current=GB), 2 * GB),
    "outside of the namespace": ("0::/../other", V2, v2("", memory_max=2 * GB, memory_current=GB), 2 * GB),
    "more is used than allowed": ("0::/job", V2, v2("job/", memory_max=GB, memory_current=2 * GB), GB),
    "rubbish": ("0::/job\nnonsense\n::", V2, v2("job/", memory_max="x", memory_current="-"), 64 * GB),
    "version 1": ("4:memory:/job", V1.format(top="/"), v1("job/", 4 * GB, 3 * GB), 2 * GB),
    "version 1, files": (
        "4:memory:/job", V1.format(top="/"), v1("job/", 4 * GB, 4 * GB, f"inactive_file 1\ntotal_inactive_file {GB}"), 2 * GB,
    ),
    "version 1 without a limit": ("4:memory:/job", V1.format(top="/"), v1("job/", 2**63 - 4096, GB), 64 * GB),
    "version 1 in a container": ("4:memory:/docker/abc", V1.format(top="/docker/abc"), v1("", 2 * GB, GB), 2 * GB),
    "version 1, nested": (
        "4:memory:/a/b", V1.format(top="/"), {**v1("a/b/", 2**63 - 4096, GB), **v1("a/", 3 * GB, GB)}, 3 * GB,
    ),
    "both versions": (
        "4:memory:/job\n0::/job", V1.format(top="/") + V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "),
        {**v1("job/", 5 * GB, GB), "sys/fs/cgroup/unified/job/cgroup.procs": 1}, 5 * GB,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_memory_is_the_least_of_every_level(pretend: Callable[..., Path], case: str) -> None:
    group, mounts, files, wanted = CASES[case]
    found = machine.memory(root=pretend(group, mounts, files))
    assert found == Room(wanted, MACHINE if wanted == 64 * GB else CONTAINER)


def test_what_was_asked_counts_where_it_is_less(pretend: Callable[..., Path]) -> None:
    root = pretend("0::/job", V2, v2("job/", memory_max=4 * GB, memory_current=GB))
    assert machine.memory(3 * GB, root) == Room(3 * GB, ASKED)
    assert machine.memory(9 * GB, root) == Room(4 * GB, CONTAINER)


@pytest.mark.parametrize(
    ("group", "mounts", "files", "wanted"),
    [
        ("0::/job", V2, v2("job/", cpu_max="150000 100000"), 2),
        ("0::/a/b", V2, {**v2("a/b/", cpu_max="max 100000"), **v2("a/", cpu_max="50000 100000")}, 1),
        ("0::/job", V2, v2("job/", cpu_max="max 100000"), 16),
        ("0::/job", V2, v2("job/", cpu_max="9900000 100000"), 16),
        ("0::/job", V2, v2("job/", cpu_max="5 0"), 16),
        (
            "2:cpu,cpuacct:/job", V1.format(top="/"),
            {f"sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_{name}_us": value for name, value in (("quota", 300000), ("period", 100000))},
            3,
        ),
        ("2:cpu,cpuacct:/job", V1.format(top="/"), {"sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": -1}, 16),
    ],
)  # fmt: skip
def test_cores_are_those_of_the_tightest_quota(
    pretend: Callable[..., Path], group: str, mounts: str, files: dict[str, object], wanted: int
) -> None:
    assert machine.cores(pretend(group, mounts, files)) == wanted


def test_this_machine_has_some() -> None:
    assert machine.memory().nbytes > 0
    assert 1 <= machine.cores() <= len(os.sched_getaffinity(0))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to be on a machine of so many cores, with so much memory by a container's limit."""

    def be(cores: int, container: int | None = None) -> None:
        monkeypatch.setattr(machine, "cores", lambda: cores)
        if container is not None:

            def rooms(asked: int | None = None) -> Room:
                return min(Room(asked or 2**60, ASKED), Room(container, CONTAINER), key=lambda room: room.nbytes)

            monkeypatch.setattr(machine, "memory", rooms)

    return be


def planned(recipe: str, model: str, **limits: int) -> Plan:
    return make_plan(open_source(model), load_recipe(recipe), RunLimits(**limits))


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8", "fp8-block"])
@pytest.mark.parametrize("cores", [2, 16, 192])
def test_rounding_takes_about_one_gigabyte_on_any_machine(on: Callable[..., None], recipe: str, cores: int) -> None:
    on(cores, 500 * GB)
    plan = planned(recipe, "llama-4-scout")
    assert plan.peak_ram_bytes < 1.2 * GB
    assert plan.workers >= min(cores + 1, 10)


def test_more_memory_is_taken_when_it_is_allowed(on: Callable[..., None]) -> None:
    on(192, 500 * GB)
    usual, allowed = planned("int4-rtn", "llama-4-maverick"), planned("int4-rtn", "llama-4-maverick", max_ram=20 * GB)
    assert usual.peak_ram_bytes < 1.2 * GB < allowed.peak_ram_bytes <= 20 * GB
    assert allowed.workers == 193


def test_a_container_limits_plan_and_run(
    on: Callable[..., None], l4pack: Callable[..., Ended], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    on(4, 720_000_000)
    plan = planned("int4-rtn", "llama-4-scout")
    assert plan.peak_ram_bytes <= 720_000_000
    shown = l4pack("plan", "llama-4-scout", "--recipe", "int4-rtn").out
    assert f"of 720.00 MB ({CONTAINER})" in " ".join(shown.split())
    record = json.loads(l4pack("plan", "llama-4-scout", "--recipe", "int4", "--json").out)
    assert (record["memory_limit_bytes"], record["memory_limited_by"]) == (720_000_000, CONTAINER)
    assert any("it will not start here" in warning for warning in record["warnings"])
    ended = l4pack("quantize", checkpoint("scout"), "--recipe", "int4", "--out", tmp_path / "out", "--compute", "cpu")
    assert ended.code == 3
    assert f"the limit is 720.00 MB ({CONTAINER})" in " ".join(ended.err.split())
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("command", ["evaluate", "measure", "coverage"])
def test_every_walk_says_which_limit_it_meets(
    on: Callable[..., None],
    l4pack: Callable[..., Ended],
    checkpoint: Callable[..., Path],
    artifact: Callable[..., Path],
    tmp_path: Path,
    command: str,
) -> None:
    source, made = checkpoint("text"), artifact("int4-rtn", "text")
    on(4, 720_000_000)
    rest = {"evaluate": [made, "--against", source], "measure": [source, "--out", tmp_path / "s"], "coverage": [source]}
    ended = l4pack(command, *rest[command], "--compute", "cpu")
    assert (ended.code, CONTAINER in " ".join(ended.err.split())) == (3, True), ended.err


def test_a_run_that_does_not_fit_any_more_does_not_begin(
    on: Callable[..., None], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    plan = make_plan(open_source(str(checkpoint("scout"))), load_recipe("int4-rtn"))
    on(2, 100_000_000)
    with pytest.raises(BudgetError, match="container") as refused:
        run_plan(plan, tmp_path / "out")
    assert refused.value.hint == "give the container more memory"


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    held = b"x" * (GB // 4)
    command = [sys.executable, "-c", "from l4pack.work.machine import peak_rss; print(peak_rss())"]
    ended = subprocess.run(command, capture_output=True, check=True, text=True)
    assert 1_000_000 < int(ended.stdout) < len(held)
