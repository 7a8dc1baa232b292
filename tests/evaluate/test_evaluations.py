"""A measurement belongs to what was measured: only the original is an original, and no record takes another's place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import edit_json
from measured import measured, record
from safetensors.torch import load_file, save_file
from whole_model import one_thread  # noqa: F401

from l4pack.artifact.contents import measured_digest, recorded_digest
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.checkpoint.source import open_folder
from l4pack.errors import UsageError
from l4pack.evaluate.record import read_evaluations
from l4pack.evaluate.schema import parse_evaluation
from l4pack.model.parts import MLP_MATRICES
from l4pack.stream.weights import Weights

pytest_plugins = ["publishing_fixtures"]
OPTIONS = ("--sequence-length", 64, "--compute", "cpu")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("the quick brown fox jumps over a lazy dog, again and again; " * 12)
    return path


@pytest.fixture
def made(artifact, tmp_path):
    return Path(shutil.copytree(artifact("int4-rtn"), tmp_path / "artifact"))


@pytest.fixture
def evaluate(l4pack, text):
    def run(folder, *options, samples=2):
        return l4pack("evaluate", folder, "--text", text, "--samples", samples, *OPTIONS, *options)

    return run


def changed(source, folder, name, change):
    """A copy of a checkpoint with another tensor `name`: the same headers, other numbers."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    tensor = next(tensor for key, tensor in state.items() if key.endswith(name))
    change(tensor)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


FINE_TUNES = {
    "a norm": ("layers.2.input_layernorm.weight", lambda t: t.mul_(1.01)),
    "a router": ("layers.1.feed_forward.router.weight", lambda t: t[1].neg_()),
    "attention": ("layers.3.self_attn.q_proj.weight", lambda t: t.mul_(0.5)),
    "the head": ("lm_head.weight", lambda t: t.add_(0.01)),
}


@pytest.mark.parametrize(("name", "change"), FINE_TUNES.values(), ids=FINE_TUNES)
def test_a_fine_tune_of_the_original_is_no_original(evaluate, checkpoint, made, tmp_path, name, change):
    ended = evaluate(made, "--against", changed(checkpoint("scout"), tmp_path / "tuned", name, change))
    assert ended.code == 2
    assert f"{name} is kept as in the original and has other numbers here" in ended.err
    assert not (made / "accuracy.json").exists()


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_a_fine_tune_of_experts_alone_is_no_original(evaluate, l4pack, checkpoint, made, tmp_path, expert):
    """What was quantized is not in the artifact as it was: the manifest has a digest of the source's weights."""
    experts = "layers.1.feed_forward.experts.gate_up_proj"
    tuned = changed(checkpoint("scout"), tmp_path / "tuned", experts, lambda t: t[expert].mul_(1.01))
    ended = evaluate(made, "--against", tuned)
    assert (ended.code, "its weights are not those that were read then" in ended.err) == (2, True)
    assert not (made / "accuracy.json").exists()
    (first, *_) = json.loads(l4pack("verify", made, "--against", tuned, "--json").out)["findings"]
    assert (first["rule"], first["level"]) == ("source", "error")
    assert "its weights are not those that were read then" in first["message"]


def test_what_is_no_original_is_called_what_it_is(evaluate, artifact, checkpoint, made, tmp_path):
    bare = Path(shutil.copytree(artifact("int4-rtn"), tmp_path / "foreign"))
    (bare / "l4pack-manifest.json").unlink()
    for against, code, said in [
        (made, 2, "is an artifact that l4pack made, not an original"),
        (artifact("fp8"), 2, "is an artifact that l4pack made, not an original"),
        (bare, 2, "is quantized already (4-bit integers (groups of 128)), not an original"),
        (checkpoint("scout", layout="unfused"), 2, "is not what"),
        (checkpoint("scout", dtype="float16"), 2, "with other tensors"),
        (checkpoint("scout", seed=1), 2, "has other numbers here"),
        (checkpoint("scout") / "config.json", 4, "is a configuration without weights"),
    ]:
        ended = evaluate(made, "--against", against)
        assert ended.code == code, ended.err
        assert said in ended.err
        assert ended.err.count("\n") == 2
        assert ended.err.splitlines()[1].startswith("hint: ")
    assert "comparing two artifacts" in evaluate(made, "--against", made).err
    assert not (made / "accuracy.json").exists()
    assert evaluate(made).code == 0
    assert json.loads((made / "accuracy.json").read_text())["against"] is None


def test_a_dequantized_artifact_is_no_original(evaluate, checkpoint, made, tmp_path):
    folder = Path(shutil.copytree(checkpoint("scout"), tmp_path / "dequantized"))
    state = load_file(folder / "model.safetensors")
    prefix = "language_model.model.layers."
    with Weights(open_folder(made), torch.device("cpu"), torch.bfloat16) as weights:
        for layer, expert in [(layer, expert) for layer in range(4) for expert in range(4)]:
            names = [f"{prefix}{layer}.feed_forward.experts.{expert}.{name}" for name in MLP_MATRICES]
            gate, up, down = (weights.linears(names)[name].weight for name in names)
            experts = f"{prefix}{layer}.feed_forward.experts."
            state[f"{experts}gate_up_proj"][expert] = torch.cat([gate, up]).T
            state[f"{experts}down_proj"][expert] = down.T
            names = [f"{prefix}{layer}.feed_forward.shared_expert.{name}" for name in MLP_MATRICES]
            state |= {f"{name}.weight": one.weight for name, one in weights.linears(names).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    ended = evaluate(made, "--against", folder)
    assert (ended.code, "its weights are not those that were read then" in ended.err) == (2, True)
    edit_json(made, lambda manifest: manifest["source"].update(sample_sha256=None), MANIFEST_NAME)
    ended = evaluate(made, "--against", folder)
    assert (ended.code, "it was dequantized, and is not the original" in ended.err) == (2, True)


def test_verify_against_an_artifact_is_refused(l4pack, made, artifact):
    ended = l4pack("verify", made, "--against", artifact("fp8"))
    assert (ended.code, "is an artifact that l4pack made, not an original" in ended.err) == (2, True)


def test_build_refuses_a_gate_out_of_range(l4pack, checkpoint, tmp_path):
    for gate in ("-1", "inf", "nan"):
        ended = l4pack("build", checkpoint("scout"), "--out", tmp_path / "out", "--max-kl", gate)
        assert (ended.code, ended.err.count("\n")) == (2, 2)
        assert "a gate is out of range" in ended.err


def test_an_original_of_another_dtype_is_known(evaluate, checkpoint, artifact, tmp_path):
    made = Path(shutil.copytree(artifact("int4-rtn", dtype="float32"), tmp_path / "artifact"))
    assert evaluate(made, "--against", checkpoint("scout", dtype="float32")).code == 0
    assert evaluate(made, "--against", checkpoint("scout", dtype="float32", seed=1)).code == 2


def test_kept_answers_must_be_of_the_original(evaluate, checkpoint, artifact, made, tmp_path):
    kept, other = tmp_path / "kept", tmp_path / "other"
    assert evaluate(made, "--against", checkpoint("scout"), "--save-reference", kept).code == 0
    assert evaluate(made, "--reference", kept).code == 0
    tuned = changed(checkpoint("scout"), tmp_path / "tuned", "model.norm.weight", lambda t: t.mul_(1.5))
    of_tuned = Path(shutil.copytree(tuned, tmp_path / "of-tuned"))
    assert evaluate(of_tuned, "--against", tuned, "--save-reference", other).code == 0
    ended = evaluate(made, "--reference", other)
    assert (ended.code, "with other weights" in ended.err) == (2, True)
    shutil.copytree(artifact("int4-rtn", seed=1), tmp_path / "seed")
    assert "with other weights" in evaluate(tmp_path / "seed", "--reference", kept).err
    state = json.loads((kept / "reference.json").read_text())
    del state["headers_sha256"]
    (kept / "reference.json").write_text(json.dumps(state))
    assert evaluate(made, "--reference", kept).code == 2


def test_evaluations_stand_side_by_side_and_the_most_careful_first(evaluate, checkpoint, made):
    assert evaluate(made, "--against", checkpoint("scout"), samples=6).code == 0
    careful = json.loads((made / "accuracy.json").read_text())
    for options, samples in [((), 2), (("--against", checkpoint("scout")), 2), (("--seed", 1), 2)]:
        assert evaluate(made, *options, samples=samples).code == 0
    both = json.loads((made / "accuracy.json").read_text())
    assert len(both["evaluations"]) == 3
    assert both["kl_mean"] == careful["kl_mean"]
    assert [one["tokens"] for one in read_evaluations(made)] == [careful["tokens"], 126, 126, 126]
    assert [one["against"] is None for one in read_evaluations(made)] == [False, False, True, True]
    assert evaluate(made, samples=2).code == 0
    assert len(read_evaluations(made)) == 4


def test_a_missed_gate_stays_until_it_is_given_again(evaluate, checkpoint, made):
    pair = (made, "--against", checkpoint("scout"))
    assert evaluate(*pair, "--max-kl", "1e-9").code == 6
    assert evaluate(*pair, "--min-agreement", "0.01").code == 0
    (one,) = read_evaluations(made)
    assert [(gate["gate"], gate["ok"]) for gate in one["gates"]] == [("max_kl", False), ("min_agreement", True)]
    assert evaluate(*pair, "--max-kl", "9").code == 0
    (one,) = read_evaluations(made)
    assert all(gate["ok"] for gate in one["gates"])


def test_what_was_measured_is_what_was_read(evaluate, checkpoint, made):
    """A shard that is exchanged for the time of an evaluation leaves a record of other weights."""
    assert measured_digest(open_folder(made)) == recorded_digest(made)
    shard = next(made.glob("*.safetensors"))
    whole = shard.read_bytes()
    state = load_file(shard)
    name = next(name for name in state if name.endswith("down_proj.weight_scale"))
    state[name].mul_(0.5)
    save_file(state, shard, {"format": "pt"})
    assert evaluate(made).code == 0
    shard.write_bytes(whole)
    (one,) = read_evaluations(made)
    assert one["identity"]["artifact"] != recorded_digest(made)
    assert evaluate(made).code == 0
    (one,) = read_evaluations(made)
    assert one["identity"]["artifact"] == recorded_digest(made)


WRONG = {
    "a word for a number": {"kl_mean": "0.1"},
    "a null number": {"top1_agreement": float("nan")},
    "an infinite number": {"kl_max": float("inf")},
    "a negative count": {"tokens": -1},
    "an absurd count": {"tokens": 10**30},
    "a share above one": {"top1_agreement": 1.5},
    "a list for a record": {"run": []},
    "layers that are no numbers": {"layers": [{"layer": "<b>1</b>"}]},
    "experts that are no numbers": {"layers": [{"layer": 1, "experts": [{"expert": "<i>", "tokens": 1}]}]},
    "questions that are no number": {"tasks": {"arc": {"questions": "<b>\n1</b>", "accuracy": {"value": 1.0}}}},
    "a gate of no name": {"gates": [{"gate": "<script>", "limit": 1, "value": 1, "ok": True}]},
    "a histogram that does not fit": {"kl_histogram": {"edges": [1.0, 2.0], "counts": [1]}},
    "lines in a text": {"artifact": "a\nb"},
    "an endless text": {"against": "a" * 5000},
    "a half of a pair": {"kl_standard_error": None},
    "no identity": {"identity": None},
    "another version": {"schema_version": 1},
    "a bool for a number": {"perplexity_ratio": True},
    "a deep nest": {"more": json.loads("[" * 50 + "]" * 50)},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_record_is_held_against_its_schema(l4pack, evaluate, made, changes):
    measured(made, **changes)
    for ended in (l4pack("report", made), l4pack("package", made), evaluate(made)):
        assert ended.code == 2, ended.err
        assert "accuracy.json" in ended.err
        assert ended.err.count("\n") == 2
        assert "hint: run `l4pack evaluate` again" in ended.err


def test_a_record_of_earlier_evaluations_is_checked_like_the_first(made):
    whole = record(made, evaluations=[{**record(made), "tokens": "many"}])
    (made / "accuracy.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError, match=r"tokens: Input should be a valid integer"):
        read_evaluations(made)
    assert parse_evaluation(record(made), "x").kl_mean == 0.02


def test_build_measures_what_it_is_asked_for_and_keeps_both(l4pack, text, licensed_source, tmp_path):
    out = tmp_path / "Llama-4-Tiny-int4"
    base = ["build", licensed_source, "--recipe", "int4-rtn", "--out", out, "--base-model", "meta-llama/Llama-4-Tiny"]
    base += ["--compute", "cpu", "--text", text, "--sequence-length", 64, "--sample-tokens", 2, "--json"]

    def outcome(*options):
        ended = l4pack(*base, *options)
        found = json.loads(ended.out)["evaluate"]
        return ended.code, found["outcome"], found.get("tokens")

    assert outcome("--samples", 4) == (0, "done", 252)
    said = read_evaluations(out)[0]["sample"]
    assert said["tokens"] == 2
    assert all(len(one[model]["tokens"]) <= 2 for one in said["answers"] for model in ("artifact", "original"))
    assert said["answers"][0]["prompt"] in (out / "README.md").read_text()
    assert outcome("--samples", 4) == (0, "kept", 252)
    assert outcome("--samples", 2) == (0, "done", 126)
    text_before = text.read_text()
    text.write_text(text_before + " more" * 200)
    assert outcome("--samples", 4)[1] == "done"
    text.write_text(text_before)
    assert outcome("--samples", 4, "--max-kl", "1e-9")[:2] == (6, "failed")
    records = read_evaluations(out)
    assert len(records) == 3
    assert [gate["ok"] for one in records for gate in one["gates"]] == [False]
    careless = json.loads((out / "accuracy.json").read_text())
    careless["identity"]["artifact"] = "0" * 64
    (out / "accuracy.json").write_text(json.dumps({**careless, "evaluations": []}))
    assert outcome("--samples", 4) == (0, "done", 252)
