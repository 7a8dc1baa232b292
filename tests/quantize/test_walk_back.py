"""Two-sided recipes from plan to artifact: the walk back is planned, done once, gone on with, and read by the solver."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import Ended, file_digests
from live import copied
from whole_model import one_thread  # noqa: F401

from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.errors import UsageError
from l4pack.plan.plan import Plan, make_plan
from l4pack.quantize.run import run_plan, work_folder
from l4pack.recipe import load_recipe
from l4pack.work.progress import Shown

LITTLE = {
    "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 2,
}  # fmt: skip
SCHEME = {
    "format": "pack-quantized", "num_bits": 4, "group_size": 32, "method": "gptq", "gptq": {"sweeps": 1, "two_sided": True},
}  # fmt: skip
RULES = [{"roles": ["routed_expert", "dense_mlp"], "scheme": "int4"}, {"roles": "all", "scheme": "keep"}]
CALIBRATION = {
    "samples": 4,
    "sequence_length": 40,
    "gradient_samples": 3,
    "max_cold_experts": 1.0,
    "max_fallbacks": 1.0,
}


@pytest.fixture(scope="module")
def source(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("text", **LITTLE)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "both.yaml"
    values = {"name": "both", "title": "Both", "schemes": {"int4": SCHEME}, "rules": RULES, "calibration": CALIBRATION}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def plan(source: Path, recipe: Path) -> Plan:
    return with_text(make_plan(open_source(str(source)), load_recipe(str(recipe))))


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_plan(plan, tmp_path_factory.mktemp("whole") / "artifact").out


def test_the_plan_says_what_the_walk_back_takes(source: Path, recipe: Path, l4pack: Callable[..., Ended]) -> None:
    planned = json.loads(l4pack("plan", source, "--recipe", recipe, "--json").out)
    back = planned["calibration"]["gradient"]
    assert (back["samples"], back["tokens"]) == (3, 120)
    assert back["kept_bytes"] == 2 * 32 * 32 * 4
    assert planned["peak_ram_bytes"] >= back["ram_bytes"] > 0
    assert planned["disk_bytes"] >= planned["artifact_bytes"] + back["disk_bytes"]
    shown = l4pack("quantize", source, "--recipe", recipe, "--out", "out", "--dry-run").out
    assert "gradient    a walk up and back before, with 120 tokens" in shown
    assert planned["predicted"]["phases"]["walk back"] > 0
    assert json.loads(l4pack("plan", source, "--recipe", "int4-g32", "--json").out)["calibration"]["gradient"] is None


def test_killed_on_the_walk_back_it_ends_in_the_same_bytes(plan: Plan, whole: Path, tmp_path: Path) -> None:
    out, taken = tmp_path / "artifact", []

    def take(what: str) -> None:
        if "backwards" in what or "gradient" in what or "layer 1 of 2" in what:
            taken.append((what, tmp_path / f"killed-{len(taken)}"))
            copied(work_folder(out), work_folder(taken[-1][1]))

    run_plan(plan, out, shown=Shown(label=take))
    assert file_digests(out) == file_digests(whole)
    assert len([what for what, _ in taken if "backwards" in what]) > 5
    for what, left in taken[::4]:
        assert file_digests(run_plan(plan, left).out) == file_digests(whole), what


def test_the_walk_back_is_done_once(plan: Plan, tmp_path: Path) -> None:
    """A run that was killed while solving has its moments; the journal says of what they are."""
    out, told, left = tmp_path / "artifact", [], tmp_path / "left"

    def take(what: str) -> None:
        if what == "layer 2 of 2, attention, 2 streams":
            copied(work_folder(out), work_folder(left))

    run_plan(plan, out, shown=Shown(label=take))
    journal = (work_folder(left) / "journal.jsonl").read_text()
    assert '"samples":3,"tokens_seen":120,"seed":0' in journal.replace(" ", "")
    run_plan(plan, left, shown=Shown(label=told.append))
    assert not any("backwards" in what for what in told)
    assert told


def test_disk_is_as_planned_to_the_byte(plan: Plan, tmp_path: Path) -> None:
    out, most = tmp_path / "artifact", [0]
    assert plan.needs is not None
    assert plan.needs.gradient is not None

    def look(_: str) -> None:
        files = [path for path in (work_folder(out) / "gradient").rglob("*") if path.is_file()]
        most[0] = max(most[0], sum(path.stat().st_size for path in files if path.suffix != ".json"))

    run_plan(plan, out, shown=Shown(label=look))
    assert most[0] == plan.needs.gradient.disk_bytes


def test_the_record_says_what_was_looked_at(whole: Path) -> None:
    record = json.loads((whole / "l4pack-calibration.json").read_text())
    assert record["gradient"] == {"samples": 3, "tokens": 120}
    assert all("two_sided" in matrix for matrix in record["matrices"].values())


def test_a_fetched_source_is_refused(source: Path, recipe: Path) -> None:
    opened = open_source(str(source))
    fetched = replace(opened, store=SimpleNamespace(fetches=True))
    with pytest.raises(UsageError, match="walks through the model three times") as refused:
        make_plan(fetched, load_recipe(str(recipe)))
    assert "--fetch-as-you-go" in str(refused.value.hint)
