"""The pretended device refuses what CUDA refuses, and every command that computes runs on it as it runs on the CPU."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Ended
from pretend_device import NAME, pretend_device
from safetensors.torch import load_file
from torch import nn

from l4pack.recipe import load_recipe
from l4pack.stream.compute import Compute

LITTLE = {
    "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 2,
}  # fmt: skip
FEW = ("--samples", 2, "--sequence-length", 40)
FEW_SOLVED_ON = ("--calibration-samples", 2, "--sequence-length", 40)
GPTQ = {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32, "method": "gptq"}
CALIBRATION = {"samples": 2, "max_cold_experts": 1.0, "max_fallbacks": 1.0}
Run = Callable[..., Ended]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """The operations done on the device so far; where gradients are asked for as a parameter, it computes them."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pretend_device(gradients=getattr(request, "param", False)) as done:
        yield done


@pytest.fixture(scope="module")
def source(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("text", **LITTLE)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipes of every kind that is calibrated, with little to do."""
    solved = {**GPTQ, "gptq": {"act_order": True, "asymmetric": 1.0, "sweeps": 1}}
    rules = [{"roles": ["attention", "routed_expert"], "scheme": "int4"}, {"roles": "all", "scheme": "keep"}]
    int4 = {"name": "little", "title": "Little", "schemes": {"int4": solved}, "rules": rules}
    both = {"act_order": True, "asymmetric": 1.0, "sweeps": 1, "two_sided": True}
    experts = [{"roles": ["routed_expert", "dense_mlp"], "scheme": "int4"}, {"roles": "all", "scheme": "keep"}]
    best = {**int4, "schemes": {"int4": {**GPTQ, "gptq": both}}, "rules": experts}
    static = load_recipe("fp8-static").model_dump(mode="json") | {"kv_cache": {"dtype": "fp8", "strategy": "head"}}
    folder, made = tmp_path_factory.mktemp("recipes"), {}
    for name, values in {"int4": int4, "static": static, "best": best}.items():
        made[name] = folder / f"{name}.yaml"
        made[name].write_text(yaml.safe_dump({**values, "name": name, "calibration": CALIBRATION}))
    return made


def on_both(run: Run, *arguments: object) -> tuple[Ended, Ended]:
    """A command on the CPU and on the device."""
    ended = [run(*arguments, "--compute", place) for place in ("cpu", "cuda")]
    assert [one.code for one in ended] == [0, 0], ended
    return ended[0], ended[1]


def refused(call: Callable[[], object], kind: type[Exception] = RuntimeError, match: str = "same device") -> None:
    with pytest.raises(kind, match=match):
        call()


def test_tensors_of_two_devices_do_not_meet(device: Counter[str]) -> None:
    here, there = torch.ones(3, 4), torch.ones(3, 4).to("cuda")
    assert (there.device, there.is_cuda, here.is_cuda) == (torch.device("cuda:0"), True, False)
    refused(lambda: there + here)
    refused(lambda: here @ there.T)
    refused(lambda: torch.cat([there, here]))
    refused(lambda: here.add_(there))
    refused(lambda: here.mul_(there.sum()))
    refused(lambda: here[torch.tensor([0], device="cuda")])
    refused(lambda: there.__setitem__(torch.tensor([0]), here[:1]))
    refused(lambda: nn.functional.scaled_dot_product_attention(there[None, None], here[None, None], here[None, None]))
    refused(lambda: there.numpy(), TypeError, "numpy")


def test_what_may_cross_does(device: Counter[str]) -> None:
    there = torch.arange(12.0, device="cuda").reshape(3, 4)
    assert (there + torch.tensor(1.0)).is_cuda
    assert there[torch.tensor([2])].tolist() == [[8, 9, 10, 11]]
    there[0] = torch.zeros(4)
    assert float(there[0].sum()) == 0
    here = torch.zeros(3, 4)
    here[1] = there[1]
    here.copy_(there)
    assert here.tolist() == there.cpu().tolist()
    copied = there.cpu()
    copied[0] = 7
    assert float(there[0].sum()) == 0
    assert nn.Parameter(there, requires_grad=False).is_cuda
    assert torch.zeros_like(there).is_cuda
    assert device["_to_copy"] + device["copy_"] > 0


def test_threads_know_the_device(device: Counter[str]) -> None:
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2).to("cuda") * 2))
    thread.start()
    thread.join()
    assert found[0].is_cuda
    assert found[0].tolist() == [2, 2]


def test_products_that_must_be_deterministic_need_the_workspace(
    device: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = torch.ones(2, 2, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        refused(lambda: there @ there, match="not deterministic")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        assert (there @ there).tolist() == [[2, 2], [2, 2]]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8", "fp8-block"])
def test_rounding_gives_the_same_bytes(
    l4pack: Run, checkpoint: Callable[..., Path], device: Counter[str], tmp_path: Path, recipe: str
) -> None:
    for place in ("cpu", "cuda"):
        ended = l4pack(
            "quantize", checkpoint("maverick"), "--recipe", recipe, "--out", tmp_path / place, "--compute", place
        )
        assert ended.code == 0, ended.err
    assert device["_to_copy"]
    assert shard_bytes(tmp_path / "cpu") == shard_bytes(tmp_path / "cuda")


def shard_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize(("kind", "device"), [("int4", False), ("static", False), ("best", True)], indirect=["device"])
def test_calibrating_gives_the_same_figures(
    l4pack: Run, source: Path, recipes: dict[str, Path], device: Counter[str], tmp_path: Path, kind: str
) -> None:
    for place in ("cpu", "cuda"):
        out, options = tmp_path / place, ("--recipe", recipes[kind], "--compute", place)
        ended = l4pack("quantize", source, *options, *FEW_SOLVED_ON, "--out", out)
        assert ended.code == 0, ended.err
    assert device["mm"] > 15
    ours, theirs = (load_file(next((tmp_path / place).glob("*.safetensors"))) for place in ("cpu", "cuda"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.endswith("_packed"):  # where two levels are as good, either may be taken
            assert (tensor != theirs[name]).float().mean() < 0.1, name
        else:
            torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=0.01, atol=0.0, msg=name)


def test_build_calibrates_and_evaluates_on_the_device(
    l4pack: Run, source: Path, recipes: dict[str, Path], device: Counter[str], tmp_path: Path
) -> None:
    """Calibration ran on the CPU: `build` did not say where."""
    command = ("build", source, "--recipe", recipes["static"], "--compute", "cuda", *FEW, "--name", "Llama-Little")
    ended = l4pack(*command, "--out", tmp_path / "out", "--skip-evaluate", "--json")
    assert json.loads(ended.out)["quantize"]["outcome"] == "done", ended.err
    calibrated = device["mm"]
    assert calibrated > 15
    again = json.loads(l4pack(*command, "--out", tmp_path / "out", "--json").out)
    assert again["evaluate"]["run"]["device"] == NAME
    assert device["mm"] > calibrated + 15


def test_evaluating_gives_the_same_figures(
    l4pack: Run,
    source: Path,
    artifact: Callable[..., Path],
    device: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text, questions and needles against the original, against kept answers, and of an artifact alone."""
    monkeypatch.setattr(Compute, "of", _bfloat16(Compute.of))
    made = artifact("fp8", "text", **LITTLE)
    questions = tmp_path / "fox.jsonl"
    questions.write_text(json.dumps({"context": "the quick brown", "choices": [" fox", " dog"], "answer": 0}) + "\n")
    asked = (*FEW, "--json", "--task", questions, "--needle", 100)
    cpu, cuda = on_both(l4pack, "evaluate", made, "--against", source, *asked)
    same_figures(cpu, cuda)
    assert json.loads(cuda.out)["run"]["device"] == NAME
    on_both(l4pack, "evaluate", made, *FEW)
    kept = tmp_path / "kept"
    for place in ("cpu", "cuda"):
        saved = l4pack("evaluate", made, "--against", source, *FEW, "--save-reference", kept, "--compute", place)
        assert saved.code == 0, saved.err
        same_figures(*on_both(l4pack, "evaluate", made, "--against", source, *FEW, "--json", "--reference", kept))


def _bfloat16(of: Callable[[str], Compute]) -> Callable[[str], Compute]:
    """The device's dtype on the CPU too, so that figures can be compared."""
    return lambda name: Compute(of(name).device, torch.bfloat16)


def same_figures(cpu: Ended, cuda: Ended) -> None:
    ours, theirs = json.loads(cpu.out), json.loads(cuda.out)
    for name in ("kl_mean", "perplexity_reference", "perplexity_artifact", "top1_agreement"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-6), name
    assert theirs["tasks"] == ours["tasks"]


def test_measuring_gives_the_same_figures(
    l4pack: Run, checkpoint: Callable[..., Path], device: Counter[str], tmp_path: Path
) -> None:
    least = {"num_hidden_layers": 1, "no_rope_layers": [1], "interleave_moe_layer_step": 1, "num_local_experts": 1}
    source = checkpoint("text", **LITTLE | least)
    options = (*FEW, "--calibration-samples", 2, "--options", "int4-g32,fp8", "--direct", "all")
    found = []
    for place in ("cpu", "cuda"):
        ended = l4pack("measure", source, "--out", tmp_path / f"{place}.json", *options, "--compute", place)
        assert ended.code == 0, ended.err
        found.append([change["kl"] for change in json.loads((tmp_path / f"{place}.json").read_text())["changes"]])
    assert found[1] == pytest.approx(found[0], rel=0.1, abs=1e-6)


def test_coverage_counts_the_same_tokens(l4pack: Run, source: Path, device: Counter[str], tmp_path: Path) -> None:
    command = ("coverage", source, *FEW_SOLVED_ON, "--work", tmp_path / "work", "--json")
    cpu, cuda = (json.loads(ended.out) for ended in on_both(l4pack, *command))
    assert cuda["layers"] == cpu["layers"]
    assert device["mm"] > 0


def test_a_budget_is_measured_on_the_device(l4pack: Run, artifact: Callable[..., Path], device: Counter[str]) -> None:
    ended = l4pack("budget", artifact("fp8", "text", **LITTLE), "--device", "h100", "--measure", "--json")
    assert ended.code == 0, ended.err
    assert device["empty"] > 0
