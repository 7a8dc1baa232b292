"""The command that serves an artifact says what the budget was made for."""

from __future__ import annotations

import itertools
import json
import shlex

import pytest

from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.model import budget
from l4pack.budget.named import open_subject
from l4pack.budget.serve import on_lines, serve_command


@pytest.fixture(scope="module")
def scout():
    return open_subject("llama-4-scout", "int4")


def command(scout, load, host="2xh100", runtime="vllm"):
    """The words of the command."""
    line = serve_command(budget(scout, find_host(host, load_devices()), load, runtime), "out/my artifact")
    assert line is not None
    assert shlex.split(on_lines(line).replace("\\\n", " ")) == shlex.split(line)
    assert max(map(len, on_lines(line).splitlines())) <= 80
    return shlex.split(line)


def test_the_parts_that_memory_hangs_on_are_always_said(scout):
    words = command(scout, Load(65_536))
    assert words == [
        "vllm", "serve", "out/my artifact", "--max-model-len", "65536", "--max-num-seqs", "1024",
        "--tensor-parallel-size", "2",
    ]  # fmt: skip


def test_every_choice_of_the_load_is_carried_over(scout):
    load = Load(
        32_768, 2, "fp8", tp=2, pp=2, expert_parallel=True, hybrid=False, batched_tokens=4096, max_num_seqs=16,
        max_positions=65_536, images=0, utilization=0.9,
    )  # fmt: skip
    words = command(scout, load, "4xh100")
    pairs = dict(itertools.pairwise(words))
    assert pairs["--max-num-seqs"] == "16"
    assert pairs["--pipeline-parallel-size"] == "2"
    assert pairs["--kv-cache-dtype"] == "fp8"
    assert pairs["--max-num-batched-tokens"] == "4096"
    assert pairs["--gpu-memory-utilization"] == "0.9"
    assert {"--enable-expert-parallel", "--disable-hybrid-kv-cache-manager"} <= set(words)
    assert json.loads(pairs["--limit-mm-per-prompt"]) == {"image": 0}
    assert json.loads(pairs["--hf-overrides"]) == {"text_config": {"max_position_embeddings": 65_536}}


def test_each_runtime_in_its_own_words(scout):
    words = command(scout, Load(65_536, kv_dtype="fp8"), runtime="sglang")
    assert words[:4] == ["python", "-m", "sglang.launch_server", "--model-path"]
    assert words[-2:] == ["--kv-cache-dtype", "fp8_e4m3"]


@pytest.mark.parametrize(("context", "runtime"), [(10_000_000, "vllm"), (1024, "transformers"), (1024, "meta")])
def test_no_command_for_what_does_not_fit_or_is_no_server(scout, context, runtime):
    found = budget(scout, find_host("8xb300" if runtime != "vllm" else "h100", load_devices()), Load(context), runtime)
    assert serve_command(found, "x") is None
