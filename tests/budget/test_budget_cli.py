"""`l4pack budget` as users and continuous integration run it: words, keys, formats and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from rich.console import Console

from l4pack.budget.checks import Check, Means, run_checks
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.matrix import matrix
from l4pack.budget.measure import Measured, measure_device
from l4pack.budget.model import budget
from l4pack.budget.named import alternatives, candidate_subjects, open_subject
from l4pack.budget.solve import limits
from l4pack.budget.view import budget_view, devices_view, matrix_view, measured_view
from l4pack.checkpoint.source import open_folder
from l4pack.errors import L4packError
from l4pack.plan.plan import make_plan
from l4pack.publish.gates import broken
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe

ROOT = Path(__file__).parents[2]
BAD = Path(__file__).parents[1] / "bad"
Run = Callable[..., Any]
SCOUT = ("llama-4-scout", "--recipe", "int4-uniform")


def test_the_verdict_comes_first_then_lines_bar_and_limits(l4pack: Run) -> None:
    ended = l4pack("budget", *SCOUT, "--context", 8192, "--max-num-seqs", 64)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith("fits on h100: ")
    assert lines[1].startswith("llama-4-scout int4-uniform, 1 sequence of 8,192 tokens, BF16 KV, vLLM 0.33")
    assert "routed experts" in ended.out
    bar = next(line for line in lines if line.startswith("█"))
    assert len(bar) == 72
    assert "largest context for 1 sequence" in ended.out
    assert max(map(len, lines)) <= 120
    assert "nearest changes" not in ended.out


def test_what_does_not_fit_names_what_would(l4pack: Run) -> None:
    ended = l4pack("budget", *SCOUT, "--context", 10_485_760)
    assert ended.code == 3
    assert ended.out.splitlines()[0] == "does not fit on h100: 486.32 to 499.59 GiB short; 20,448 tokens would fit"
    assert "--context 20448" in ended.out


def test_what_holds_at_one_end_only_is_said_and_fails(l4pack: Run) -> None:
    ended = l4pack("budget", *SCOUT, "--context", 65_536)
    assert ended.code == 3
    assert ended.out.startswith("may not fit on h100: ")
    assert "--max-num-seqs 16" in ended.out


def test_a_recipe_with_a_promise_is_asked_what_it_promises(l4pack: Run) -> None:
    promised = json.loads(l4pack("budget", "scout-int4-1xh100", "--json").out)
    wanted = ("llama-4-scout", "h100", 65_536, "fp8", "scout-int4-1xh100")
    assert tuple(promised[key] for key in ("model", "device", "context", "kv_dtype", "promised_by")) == wanted
    assert promised["fits"] is True
    said = l4pack("budget", "llama-4-scout", "--recipe", "scout-int4-1xh100", "--context", "1k")
    assert "what recipe scout-int4-1xh100 promises, but for what was said" in said.out.splitlines()
    assert "1 sequence of 1,024 tokens, FP8 KV" in said.out
    other = l4pack("budget", "llama-4-maverick", "--recipe", "scout-int4-1xh100", "--device", "8xh100")
    assert "promises" not in other.out
    none = l4pack("budget", "int4")
    assert (none.code, "made for no model in particular" in none.err) == (2, True)


def test_an_artifact_is_asked_what_its_recipe_promised(l4pack: Run, tmp_path: Path) -> None:
    """Here one of another model than the promise's, which says nothing of it."""
    out = tmp_path / "demo-fp8"
    assert l4pack("quantize", "demo", "--recipe", "scout-fp8-2xh100", "--out", out).code == 0
    found = json.loads(l4pack("budget", out, "--json").out)
    assert (found["promised_by"], found["device"]) == (None, "h100")


def test_a_number_of_gpus_that_cannot_split_the_model(l4pack: Run) -> None:
    """As many as can are used, and the rest is said to idle."""
    three = l4pack("budget", "llama-4-scout", "--recipe", "int4", "--device", "3xh100", "--context", "128k")
    assert three.code == 0
    assert "one copy takes 2 of the 3 GPUs, the rest idle; tp may be 1, 2" in three.out.splitlines()
    found = json.loads(l4pack("budget", "llama-4-scout", "--recipe", "int4", "--device", "3xh100", "--json").out)
    assert (found["tp"], found["idle_gpus"]) == (2, 1)


def test_no_suggestion_leaves_less_than_there_is(l4pack: Run) -> None:
    """Another recipe is no way out when it holds less context than this one."""
    record = json.loads(l4pack("budget", *SCOUT, "--context", "10M", "--json").out)
    other = [change for change in record["changes"] if change["option"].startswith("--recipe")]
    assert all(change["max_context"] > record["max_context"] for change in other)


@pytest.mark.parametrize("width", [60, 80])
def test_tables_cut_no_name_and_no_number(width: int) -> None:
    known = load_devices()
    names = [f"{len(known)}xh100", *known]
    found = budget(open_subject("llama-4-scout", "int4"), find_host("3xh100", known), Load(8192))
    rows = matrix(
        candidate_subjects(["llama-4-scout", "llama-4-maverick"], None), [find_host("8xh100", known)], Load(), "vllm"
    )
    for shown, wanted in (
        ([devices_view(known.values())], names[1:]),
        (budget_view(found, limits(found)), [line.name for line in found.lines]),
        (matrix_view(rows, Load(), "vllm"), ["llama-4-maverick", "803.2 GB", "220.5 GB", "8xh100"]),
    ):
        console = Console(width=width, file=StringIO(), highlight=False)
        for part in shown:
            console.print(part)
        text = console.file.getvalue()
        assert "…" not in text
        assert all(name in text for name in wanted)
        assert max(map(len, text.splitlines())) <= width


def test_json_has_its_stable_keys_and_nothing_else_on_stdout(l4pack: Run) -> None:
    ended = l4pack("budget", *SCOUT, "--context", 8192, "--kv-dtype", "fp8", "--json")
    record = json.loads(ended.out)
    assert ended.code == 0
    assert ended.err == ""
    assert record["fits"] is True
    assert {type(record[key]) for key in ("max_context", "max_sequences", "headroom_bytes")} == {int}
    assert record["max_context"] >= 8192
    assert (
        sum(line["low_bytes"] for line in record["lines"] if line["group"] == "weights") == record["gpu_weight_bytes"]
    )
    assert all(set(line) == {"name", "group", "low_bytes", "high_bytes", "formula"} for line in record["lines"])
    total = sum(line["high_bytes"] for line in record["lines"])
    assert record["planned_bytes"] - total == record["headroom_bytes"]
    assert record["planned_bytes"] == -(-record["device_bytes"] * 92 // 100)


def test_an_artifact_and_the_artifact_to_come_are_budgeted_alike(
    l4pack: Run, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("scout")
    out = run_plan(make_plan(open_folder(source), load_recipe("fp8")), tmp_path / "Llama-4-tiny").out
    device = tmp_path / "mine.yaml"
    device.write_text("devices:\n  toy: {title: A toy, memory: 8GiB, source: invented}\n")
    flags = ("--device", "2xtoy", "--devices", device, "--context", 1000, "--json")
    planned = json.loads(l4pack("budget", source, "--recipe", "fp8", *flags).out)
    written = json.loads(l4pack("budget", out, *flags).out)
    assert written["lines"] == planned["lines"]
    assert written["weight_bytes"] == sum(entry.nbytes for entry in open_folder(out).entries.values())


def test_matrix_says_what_runs_where(l4pack: Run) -> None:
    record = json.loads(l4pack("budget", "--matrix", "--json").out)
    cells = {
        (row["model"], row["recipe"]): {cell["device"]: cell["max_context"] for cell in row["cells"]}
        for row in record["rows"]
    }
    assert cells["llama-4-scout", "fp8"]["h100"] == 0
    assert cells["llama-4-scout", "fp8"]["2xh100"] > 131_072
    assert cells["llama-4-scout", "int4"]["h100"] > 0
    assert cells["llama-4-maverick", "fp8"]["8xh100"] == 1_048_576
    shown = l4pack("budget", "llama-4-scout", "--matrix", "--recipe", "int4").out
    assert max(map(len, shown.splitlines())) <= 120
    assert [line.split() for line in shown.splitlines()[2:4]] == [
        ["llama-4-scout", "int4"],
        ["in", "all", "67.9", "GB"],
    ]


def test_devices_are_listed_with_their_sources(l4pack: Run) -> None:
    records = json.loads(l4pack("devices", "--json").out)["devices"]
    assert {record["name"] for record in records} == set(load_devices())
    assert "8xh100" not in l4pack("devices").out.split()
    assert "81559 MiB" in l4pack("devices").out


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (("llama-4-scout", "--device", "h1000"), 2, "no device is named 'h1000'", "h100"),
        (("llama-4-scout", "--device", "8xh100", "--tp", 3), 2, "tp 3 does not divide", "1, 2, 4, 8"),
        (("llama-4-scout", "--context", 20_000_000), 2, "beyond the model's 10,485,760 tokens", "10485760"),
        (("llama-4-scout", "--runtime", "vlm"), 2, "no runtime is named 'vlm'", "vllm"),
        (("llama-4-scout", "--recipe", "in4"), 2, "no recipe is named 'in4'", "int4"),
        (("--device", "h100"), 2, "no artifact or source is named", "l4pack budget"),
        ((BAD / "budget-no-config",), 4, "has no config.json", "config.json"),
        (("nowhere-at-all",), 4, "neither a folder nor ORG/NAME", "llama-4-scout"),
        (("llama-4-scout", "--measure"), 1, "there is no GPU to measure on", "torch.cuda.is_available()"),
        (("check", BAD / "budget-typo" / "l4pack-budget.yaml"), 2, "checks.0: no key is named 'contxt'", "context"),
        (("check", BAD / "budget-no-checks" / "l4pack-budget.yaml"), 2, "has no checks", "add a check"),
        (("check", BAD / "budget-two-subjects" / "l4pack-budget.yaml"), 2, "either 'artifact' or 'source'", "budget init"),
        (("check", BAD / "budget-same-name" / "l4pack-budget.yaml"), 2, "two are named 'scout'", ""),
        (("check", BAD / "budget-size" / "l4pack-budget.yaml"), 2, "checks.0.min_headroom", ""),
        (("check", BAD / "budget-not-yaml" / "l4pack-budget.yaml"), 2, "line", "YAML"),
        (("check", "nowhere.yaml"), 2, "nowhere.yaml is not there", "budget init"),
        (
            ("check", BAD / "budget-baseline" / "l4pack-budget.yaml", "--baseline", BAD / "budget-baseline/baseline.json"),
            2, "is not a saved budget", "--format json",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_a_hint_and_an_exit_code(
    l4pack: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], code: int, message: str, hint: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = l4pack("budget", *arguments)
    lines = ended.err.splitlines()
    assert ended.code == code
    assert ended.out == ""
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("folder", "code", "message"),
    [("unknown-device", 2, "no device is named 'h1000'"), ("tp", 2, "does not divide"), ("context", 2, "beyond")],
)
def test_a_check_that_cannot_be_made_fails_and_says_why(l4pack: Run, folder: str, code: int, message: str) -> None:
    ended = l4pack("budget", "check", BAD / f"budget-{folder}" / "l4pack-budget.yaml")
    assert ended.code == code
    assert message in ended.out
    assert "hint: " in ended.out
    assert "0 of 1 checks hold" in ended.out


@pytest.fixture
def checks(tmp_path: Path) -> Path:
    """One check that holds, one that is too tight, one that does not fit."""
    file = tmp_path / "l4pack-budget.yaml"
    scout = {"source": "llama-4-scout", "recipe": "int4-uniform", "device": "2xh100", "context": 131_072}
    file.write_text(
        yaml.safe_dump(
            {
                "checks": [
                    {"name": "holds", **scout, "min_headroom": "1GiB"},
                    {"name": "too tight", **scout, "min_headroom": "60GiB"},
                    {"name": "a|b", **scout, "context": 10_000_000},
                ]
            }
        )
    )
    return file


def test_checks_fail_together_with_exit_3(l4pack: Run, checks: Path) -> None:
    ended = l4pack("budget", "check", checks)
    assert ended.code == 3
    first, second, third = (line for line in ended.out.splitlines() if line[:4] in ("ok  ", "FAIL"))
    assert first.startswith("ok    holds")
    assert "60.00 GiB asked for" in second
    assert "short" in third
    assert ended.out.splitlines()[-1] == "1 of 3 checks hold"


def test_checks_that_hold_exit_0(l4pack: Run, checks: Path) -> None:
    file = yaml.safe_load(checks.read_text())
    checks.write_text(yaml.safe_dump({"checks": file["checks"][:1]}))
    ended = l4pack("budget", "check", checks)
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "1 of 1 checks hold")


def test_checks_as_json_are_their_own_baseline(l4pack: Run, checks: Path, tmp_path: Path) -> None:
    saved = tmp_path / "baseline.json"
    saved.write_text(l4pack("budget", "check", checks, "--format", "json").out)
    record = json.loads(saved.read_text())
    assert (record["fits"], record["passed"], record["failed"]) == (False, 1, 2)
    same = json.loads(l4pack("budget", "check", checks, "--json", "--baseline", saved).out)
    assert [check["change"] for check in same["checks"]] == ["", "", ""]
    checks.write_text(checks.read_text().replace("recipe: int4-uniform", "recipe: fp8"))
    moved = l4pack("budget", "check", checks, "--baseline", saved).out
    assert "since the baseline: weights grew by 49.77 GB, context shrank by" in moved
    record["checks"] = record["checks"][:1]
    saved.write_text(json.dumps(record))
    assert "new check" in l4pack("budget", "check", checks, "--baseline", saved).out


def test_checks_as_markdown(l4pack: Run, checks: Path, tmp_path: Path) -> None:
    saved = tmp_path / "baseline.json"
    saved.write_text(l4pack("budget", "check", checks, "--format", "json").out)
    lines = l4pack("budget", "check", checks, "--format", "markdown").out.splitlines()
    assert lines[0] == "### Memory budget: 1 of 3 checks hold"
    table = lines[2:7]
    assert {line.replace("\\|", "").count("|") for line in table} == {7}
    assert "❌ a\\|b" in table[-1]
    assert "**a|b**: does not fit: " in "\n".join(lines[7:])
    assert any(line.startswith("- context ") for line in lines[7:])
    compared = l4pack("budget", "check", checks, "--format", "markdown", "--baseline", saved).out.splitlines()[2:7]
    assert {line.replace("\\|", "").count("|") for line in compared} == {8}
    assert "as before" in compared[-1]


def test_checks_as_github_annotations(l4pack: Run, checks: Path) -> None:
    """Where the check is written, what is wrong and what would do; nothing of a check that holds."""
    lines = l4pack("budget", "check", checks, "--format", "github").out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["::error", "::error"]
    assert all(line.count("::") == 2 for line in lines)
    number = 1 + next(at for at, line in enumerate(checks.read_text().splitlines()) if line.startswith("- ") and at > 1)
    assert f"file={checks},line={number}," in lines[0]
    assert "%0Acontext " in lines[1]


def test_several_files_are_checked_together(l4pack: Run, checks: Path, tmp_path: Path) -> None:
    """As pre-commit calls it: every changed file in one command."""
    other = tmp_path / "other.yaml"
    other.write_text("checks:\n  - {name: other, source: llama-4-scout, device: 8xh100, context: 8192}\n")
    lines = l4pack("budget", "check", other, checks, "--format", "github").out.splitlines()
    assert [f"file={other}" in lines[0], f"file={checks}" in lines[1], len(lines)] == [False, True, 2]
    other.write_text(other.read_text().replace("8192", "10M"))
    lines = l4pack("budget", "check", other, checks, "--format", "github").out.splitlines()
    assert [f"file={other}" in lines[0], f"file={checks}" in lines[1], len(lines)] == [True, True, 3]


def test_checks_as_junit(l4pack: Run, checks: Path) -> None:
    root = ElementTree.fromstring(l4pack("budget", "check", checks, "--format", "junit").out)
    suite = root[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "0")
    assert [len(case) for case in suite] == [0, 1, 1]
    assert "context " in (suite[2][0].text or "")
    assert float(suite.get("time", "0")) == pytest.approx(sum(float(case.get("time", "0")) for case in suite), abs=1e-9)
    assert float(suite[2].get("time", "0")) > 0
    broken = BAD / "budget-tp" / "l4pack-budget.yaml"
    root = ElementTree.fromstring(l4pack("budget", "check", broken, "--format", "junit").out)
    assert root[0][0][0].tag == "error"


def test_paths_in_a_checks_file_are_from_its_folder(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(checkpoint("scout"))
    (tmp_path / "mine.yaml").write_text("devices:\n  toy: {title: A toy, memory: 16GiB, source: invented}\n")
    file = tmp_path / "l4pack-budget.yaml"
    file.write_text(
        "devices: mine.yaml\nchecks:\n  - {name: tiny, source: models/tiny, recipe: fp8, device: toy, context: 512}\n"
    )
    (result,) = run_checks(file, Means(open_subject, alternatives, broken))
    assert result.error is None
    assert result.passed


def test_a_check_takes_every_part_of_a_load() -> None:
    missing = set(Load.__dataclass_fields__) - set(Check.model_fields)
    assert missing == set()


class FakeGpu:
    """A device that gives what it is asked for, in pages."""

    page = 512

    def __init__(self, total: int) -> None:
        self.total, self.held, self.context = total, 0, 700_000_000

    def name(self) -> str:
        return "a fake"

    def memory(self) -> tuple[int, int]:
        return self.total - self.held - self.context, self.total

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.total - self.held:
            raise MemoryError("no room")
        self.held += -(-nbytes // self.page) * self.page
        return nbytes

    def allocated(self) -> int:
        return self.held

    def peak(self, work: Callable[[], None]) -> int:
        work()
        return self.sampled

    def sample(self, rows: int, vocabulary: int) -> None:
        self.sampled = rows * vocabulary * 14


def test_measuring_reads_the_device_line_by_line() -> None:
    host = find_host("h100", load_devices())
    found = budget(open_subject("llama-4-scout", "int4"), host, Load(16_384))
    lines = {line.name: line for line in measure_device(found, FakeGpu(host.device.memory_bytes))}
    for line in found.lines:
        measured = lines[line.name].measured
        if line.name == "CUDA graphs":
            assert measured is None
        elif line.low == line.high:
            assert measured is not None
            assert 0 <= measured - line.low < FakeGpu.page
    assert lines["device memory"].measured == host.device.memory_bytes
    assert lines["device context"].measured == 700_000_000
    assert lines["activations"].measured == 1024 * 202_048 * 14
    with pytest.raises(L4packError, match="has no room for routed experts"):
        measure_device(found, FakeGpu(10_000_000_000))
    shown = measured_view([Measured("a", 1, 2, None)], "a fake")
    assert shown.row_count == 1


def test_the_reader_of_a_real_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the driver's own answers, on the CPU: pieces of a GiB, and what a sampler holds."""
    from l4pack.budget import torch_reader

    answers = {
        "is_available": True, "empty_cache": None, "synchronize": None, "reset_peak_memory_stats": None,
        "mem_get_info": (60, 80), "memory_allocated": 7, "max_memory_allocated": 19, "get_device_name": "a CPU",
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch_reader, "CHUNK", 1000)
    reader = torch_reader.TorchReader("cpu")
    assert (reader.name(), reader.memory(), reader.allocated()) == ("a CPU", (60, 80), 7)
    assert [piece.numel() for piece in reader.allocate(2500)] == [1000, 1000, 500]
    assert reader.peak(lambda: reader.sample(3, 50)) == 12
    monkeypatch.setattr(torch, "empty", _no_room)
    with pytest.raises(MemoryError):
        reader.allocate(1)


def _no_room(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError


def test_the_matrix_of_one_artifact_on_ones_own_device(
    l4pack: Run, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = run_plan(make_plan(open_folder(checkpoint("scout")), load_recipe("fp8")), tmp_path / "Llama-4-tiny").out
    (tmp_path / "mine.yaml").write_text("devices:\n  toy: {title: A toy, memory: 16GiB, source: invented}\n")
    record = json.loads(l4pack("budget", out, "--matrix", "--devices", tmp_path / "mine.yaml", "--json").out)
    (row,) = record["rows"]
    assert row["cells"][-1] == {"device": "toy", "max_context": 1024, "max_context_high": 1024}
    assert next(cell for cell in row["cells"] if cell["device"] == "8xh100")["max_context"] == 1024  # on 4 of the 8


def test_a_budget_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Commands answer in about a second, because nothing on their way imports torch."""
    script = (
        "import sys; sys.argv = ['l4pack', 'budget', 'llama-4-scout', '--device', '8xh100']\n"
        "from l4pack.cli.app import app\n"
        "app(standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("fits on 8xh100")


def test_the_action_and_the_hook_call_what_there_is(l4pack: Run) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    steps = " ".join(step.get("run", "") for step in action["runs"]["steps"])
    assert action["runs"]["using"] == "composite"
    assert "l4pack budget check" in steps
    assert hook["entry"] == "l4pack budget check"
    assert all(f"--{option} " in steps for option in ("format", "baseline"))
    how_to = (ROOT / "docs" / "how-to" / "budget-in-ci.md").read_text()
    example = how_to.split("```yaml\n")[1].split("```")[0]
    assert len(Check.model_validate(yaml.safe_load(example)["checks"][0]).name) > 0


def test_the_how_tos_checks_hold(l4pack: Run, tmp_path: Path) -> None:
    how_to = (ROOT / "docs" / "how-to" / "budget-in-ci.md").read_text()
    file = tmp_path / "l4pack-budget.yaml"
    file.write_text(how_to.split("```yaml\n")[1].split("```")[0])
    ended = l4pack("budget", "check", file)
    assert ended.code == 0
    assert ended.out == how_to.split("$ l4pack budget check\n")[1].split("```")[0]
