"""Paired numbers are those of a plain whole-model computation; what hurts is named; gates, bad input, resuming."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
import whole_model
from limits import least_ram
from safetensors.torch import load_file, save_file
from spoil import SPOILS
from whole_model import one_thread  # noqa: F401

from l4pack.errors import UsageError
from l4pack.evaluate.scoring import PairedScores, Scores
from l4pack.evaluate.statistics import HISTOGRAM_EDGES, clusters, mean_and_error, percentile, summarize
from l4pack.evaluate.tasks import EvaluationTask, Question, choices_made, continuation, task_record
from l4pack.plan.memory import MODEL_LOADED
from l4pack.stream.walk import Walk
from l4pack.text.choice import TextChoice
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer
from l4pack.work.folder import WorkFolder, owned

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "sleeps", "under", "old", "apple", "tree")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    generator = torch.Generator().manual_seed(5)
    picked = torch.randint(0, len(WORDS), (2500,), generator=generator).tolist()
    path.write_text(" ".join(WORDS[index] for index in picked))
    return path


@pytest.fixture
def evaluated(l4pack, text_file):
    """`l4pack evaluate ARTIFACT --against SOURCE …` as JSON."""

    def run(artifact, against, *options, code=0):
        chosen = ["--text", text_file, "--sequence-length", 96, "--samples", 6, *options]
        pair = [artifact, *(() if against is None else ("--against", against))]
        ended = l4pack("evaluate", *pair, *chosen, "--compute", "cpu", "--json")
        assert ended.code == code, ended.err
        return json.loads(ended.out) if code in (0, 6) else ended

    return run


@pytest.fixture
def copied(tmp_path):
    def copy(folder, name="copy"):
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


@pytest.fixture
def made(artifact, copied):
    """An artifact this test may write into."""
    return copied(artifact("int4-rtn"), "artifact")


def whole_model_numbers(source, made, text_file):
    """KL and the rest, from two whole models and all logits of all tokens."""
    from l4pack.checkpoint.source import open_folder

    tokenizer = load_tokenizer(open_folder(source))
    sequences = load_text(TextChoice(str(text_file), 6, 96), tokenizer, 1024).sequences
    ids = [list(sequence.tokens) for sequence in sequences]
    original = whole_model.load(source)
    artifact = whole_model.load(made, quantized=True, dtype=torch.bfloat16)
    kl, agree, losses = [], [], ([], [])
    for one, ours, theirs in zip(
        ids, whole_model.logits(original, ids), whole_model.logits(artifact, ids), strict=True
    ):
        p, q = whole_model.log_probabilities(ours[:-1]), whole_model.log_probabilities(theirs[:-1])
        kl.append((p.exp() * (p - q)).sum(1))
        agree.append(p.argmax(1) == q.argmax(1))
        target = torch.tensor(one[1:])[:, None]
        for loss, rows in zip(losses, (p, q), strict=True):
            loss.append(-rows.gather(1, target)[:, 0])
    first, second = (torch.cat(loss) for loss in losses)
    change = (-second).exp() - (-first).exp()
    return torch.cat(kl), torch.cat(agree).double(), first, second, change


def test_numbers_are_those_of_whole_models(evaluated, checkpoint, made, text_file):
    record = evaluated(made, checkpoint("scout"))
    kl, agree, first, second, change = whole_model_numbers(checkpoint("scout"), made, text_file)
    assert record["tokens"] == len(kl) == 6 * 95
    assert record["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert record["kl_max"] == pytest.approx(float(kl.max()), rel=1e-3)
    assert record["kl_p99"] == pytest.approx(float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]), rel=1e-3)
    assert record["top1_agreement"] == pytest.approx(float(agree.mean()), abs=2 / len(kl))
    assert record["perplexity_reference"] == pytest.approx(math.exp(float(first.mean())), rel=1e-5)
    assert record["perplexity_artifact"] == pytest.approx(math.exp(float(second.mean())), rel=1e-5)
    assert record["perplexity_ratio"] == pytest.approx(math.exp(float((second - first).mean())), rel=1e-5)
    assert record["true_token_probability"]["rms"] == pytest.approx(float(change.square().mean().sqrt()), rel=1e-3)
    assert sum(record["kl_histogram"]["counts"]) == len(kl)
    assert sum(row["tokens"] for row in record["by_position"]) == len(kl)
    assert json.loads((made / "accuracy.json").read_text())["kl_mean"] == record["kl_mean"]


def test_a_checkpoint_against_itself(evaluated, checkpoint, copied):
    record = evaluated(copied(checkpoint("maverick")), checkpoint("maverick"))
    assert record["kl_mean"] == record["kl_max"] == record["kl_standard_error"] == 0
    assert record["top1_agreement"] == record["perplexity_ratio"] == 1
    assert record["true_token_probability"]["rms"] == 0
    assert all(layer["residual_error"] == 0 for layer in record["layers"])
    assert [layer.get("routing_agreement") for layer in record["layers"]] == [None, 1, None, 1]


@pytest.mark.parametrize(("layer", "expert"), [(0, 3), (2, 1)])
def test_the_expert_with_shuffled_weights_is_named(evaluated, checkpoint, copied, layer, expert):
    broken = copied(checkpoint("scout"))
    state = load_file(broken / "model.safetensors")
    weight = state[f"language_model.model.layers.{layer}.feed_forward.experts.gate_up_proj"][expert]
    weight.copy_(
        weight.flatten()[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))].view_as(weight)
    )
    save_file(state, broken / "model.safetensors")
    record = evaluated(broken, checkpoint("scout"))
    worst = record["worst"][0]
    assert (worst["layer"], worst["block"], worst["expert"]) == (layer, "routed_expert", expert)
    assert worst["error"] > 0.5
    others = [item["error"] for item in record["worst"][1:]]
    assert max(others) == 0


def test_coverage_counts_every_token(evaluated, checkpoint, made):
    record = evaluated(made, checkpoint("scout"))
    for layer in record["layers"]:
        assert sum(expert["tokens"] for expert in layer["experts"]) == record["text"]["tokens"]
        assert layer["routing_moved"] == round((1 - layer["routing_agreement"]) * record["text"]["tokens"])
        assert 0 < layer["routed_expert_error"] < 0.5
        assert layer["attention_error"] == 0


def test_an_artifact_alone_has_a_perplexity(evaluated, checkpoint, made):
    alone = evaluated(made, None)
    paired = evaluated(made, checkpoint("scout"))
    assert alone["perplexity_artifact"] == pytest.approx(paired["perplexity_artifact"], rel=1e-9)
    assert "kl_mean" not in alone
    assert alone["worst"] == []


def test_gates_name_what_they_miss(evaluated, l4pack, checkpoint, made, text_file):
    gates = ("--max-kl", "0.000001", "--min-agreement", "0.999", "--max-perplexity-ratio", "5")
    record = evaluated(made, checkpoint("scout"), *gates, code=6)
    assert [(gate["gate"], gate["ok"]) for gate in record["gates"]] == [
        ("max_kl", False), ("min_agreement", False), ("max_perplexity_ratio", True),
    ]  # fmt: skip
    ended = l4pack("evaluate", made, "--text", text_file, "--sequence-length", 96, "--max-kl", 1)
    assert ended.code == 6
    assert "1 of 1 quality gates missed: max_kl 1 (not measured)" in ended.err
    assert evaluated(made, checkpoint("scout"), "--max-kl", 9)["gates"][0]["ok"]


def test_a_kept_reference_gives_the_same_numbers(evaluated, checkpoint, artifact, copied, made, tmp_path):
    kept = tmp_path / "kept"
    exact = evaluated(made, checkpoint("scout"), "--save-reference", kept)
    again = evaluated(made, None, "--reference", kept)
    assert again["kl_mean"] == pytest.approx(exact["kl_mean"], rel=1e-4)
    assert again["perplexity_reference"] == pytest.approx(exact["perplexity_reference"], rel=1e-5)
    assert again["top1_agreement"] == pytest.approx(exact["top1_agreement"], abs=2 / exact["tokens"])
    stated = again["reference"]
    assert 0 < stated["storage_kl_mean"] <= stated["storage_kl_max"] < 1e-7
    size = sum(path.stat().st_size for path in kept.glob("*.npy"))
    assert size < exact["tokens"] * (128 * 2 + 4) + 384 * 128 * 2 + 1000
    other = copied(artifact("fp8"), "other")
    against_kept, against_source = evaluated(other, None, "--reference", kept), evaluated(other, checkpoint("scout"))
    assert against_kept["kl_mean"] == pytest.approx(against_source["kl_mean"], rel=1e-4)
    ended = evaluated(made, None, "--reference", kept, "--seed", 3, "--samples", 2, code=2)
    assert "kept for another text" in ended.err


def test_save_reference_needs_the_original(evaluated, made, tmp_path):
    assert (
        "--save-reference needs the original" in evaluated(made, None, "--save-reference", tmp_path / "x", code=2).err
    )


@pytest.fixture(scope="session")
def kept_reference(tmp_path_factory):
    """A kept reference, made once and copied."""
    made = tmp_path_factory.mktemp("kept-reference") / "kept"

    def copy(save, to):
        if not made.exists():
            save(made)
        return Path(shutil.copytree(made, to))

    return copy


def in_record(key, value):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    change.__name__ = f"{key} {str(value)[:9]}"
    return change


KEPT = [
    *[("hidden.npy", kind) for kind in ("zeroed", "halved")],
    *[("scale.npy", kind) for kind in ("flipped", "removed")],
    *[("head.npy", kind) for kind in ("flipped", "extended", "emptied")],
    *[("reference.json", kind) for kind in ("halved", "zeroed", "removed")],
    *[("reference.json", in_record(*change)) for change in [
        ("schema_version", 1), ("files", []), ("rows", 569), ("rows", "570"), ("vocabulary", -1), ("width", 64),
        ("files", [{"file": "../../etc/passwd", "start": 0, "nbytes": 1, "sha256": "0" * 64}]),
        ("storage_kl_mean", None), ("scored_sha256", "0" * 64),
    ]],
]  # fmt: skip


@pytest.mark.parametrize(("file", "kind"), KEPT, ids=lambda value: getattr(value, "__name__", value))
def test_a_reference_that_is_not_as_it_was_kept_is_refused(
    evaluated, checkpoint, kept_artifact, kept_reference, tmp_path, file, kind
):
    def save(folder):
        evaluated(kept_artifact, checkpoint("scout"), "--save-reference", folder)

    kept = kept_reference(save, tmp_path / "kept")
    SPOILS.get(kind, kind)(kept / file)
    ended = evaluated(kept_artifact, None, "--reference", kept, code=2)
    assert ended.err.startswith(f"error: {kept} ")
    assert ended.err.count("\n") == 2


def test_no_room_for_a_reference_is_said_and_what_was_computed_is_kept(
    evaluated, checkpoint, kept_artifact, tmp_path, monkeypatch
):
    allocate, kept = os.posix_fallocate, tmp_path / "kept"

    def full(descriptor, start, nbytes):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "head.npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, start, nbytes)

    command = (kept_artifact, checkpoint("scout"), "--save-reference", kept, "--work", tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        ended = evaluated(*command, code=3)
    assert f"{kept} has no room for 98.43 kB of the original's answers, " in ended.err
    assert "are free" in ended.err
    assert not list(kept.glob("*.npy"))
    assert evaluated(*command)["resumed_layers"] == 4
    assert evaluated(kept_artifact, None, "--reference", kept)["kl_mean"] > 0


def test_a_reference_goes_into_a_folder_of_its_own(evaluated, checkpoint, kept_artifact, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "head.npy").write_text("a diary")
    monkeypatch.setattr(Walk, "run", None)  # before any work
    source = checkpoint("scout")
    assert "did not write" in evaluated(kept_artifact, source, "--save-reference", theirs, code=2).err
    assert "which is read" in evaluated(kept_artifact, source, "--save-reference", source / "kept", code=2).err
    assert (theirs / "head.npy").read_text() == "a diary"


def test_killed_and_gone_on_to_the_same_numbers(evaluated, checkpoint, made, text_file, tmp_path):
    whole = evaluated(made, checkpoint("scout"))
    work = tmp_path / "work"
    options = ["--text", str(text_file), "--sequence-length", "96", "--samples", "6", "--work", str(work)]
    arguments = [str(made), "--against", str(checkpoint("scout")), *options, "--compute", "cpu"]
    killer = Path(__file__).parents[1] / "support" / "killed_evaluation.py"
    ended = subprocess.run(
        [sys.executable, killer, "3", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    record = evaluated(made, checkpoint("scout"), "--work", work)
    assert record["resumed_layers"] == 2
    for key in ("run", "resumed_layers"):
        del record[key], whole[key]
    assert record == whole
    assert not work.exists()


@pytest.fixture(scope="session")
def half_done(tmp_path_factory):
    """The work folder of an evaluation that was stopped, made once and copied."""
    made = tmp_path_factory.mktemp("half-done") / "work"

    def copy(make, to):
        if not made.exists():
            make(made)
        return Path(shutil.copytree(made, to))

    return copy


@pytest.fixture
def undisturbed(evaluated, checkpoint, kept_artifact):
    """The figures of an evaluation that nothing happened to, found once."""

    def find():
        if not FOUND:
            FOUND.append(figures(evaluated(kept_artifact, checkpoint("scout"))))
        return FOUND[0]

    return find


FOUND = []


@pytest.fixture(scope="session")
def kept_artifact(artifact, tmp_path_factory):
    """An artifact that evaluations of this module go on with."""
    return Path(shutil.copytree(artifact("int4-rtn"), tmp_path_factory.mktemp("kept") / "artifact"))


def figures(record):
    return {key: value for key, value in record.items() if key not in ("run", "resumed_layers")}


def in_figures(state):
    state.write_text(state.read_text().replace('"residual_error": 0.', '"residual_error": 1.'))


def predecessor(state):
    state.write_text(json.dumps({"job": "x", "layers": 4, "records": [{}] * 4}))


LEFT = [
    *[("original-0.hidden", kind) for kind in ("removed", "halved", "zeroed", "extended")],
    *[("artifact-0.hidden", kind) for kind in ("flipped", "swapped", "emptied")],
    ("original-1.hidden", "zeroed"), ("artifact-middle.hidden", "removed"),
    *[("state.json", kind) for kind in ("halved", "flipped", "zeroed", in_figures, predecessor)],
]  # fmt: skip


@pytest.mark.parametrize(("file", "kind"), LEFT, ids=lambda value: getattr(value, "__name__", value))
def test_whatever_became_of_its_files_it_ends_in_the_same_numbers(
    evaluated, checkpoint, kept_artifact, half_done, undisturbed, stopped_in, tmp_path, file, kind
):
    def stop(work):
        with stopped_in(3):
            evaluated(kept_artifact, checkpoint("scout"), "--work", work, code=75)

    work = half_done(stop, tmp_path / "work")
    (SPOILS.get(kind, kind))(work / file)
    record = evaluated(kept_artifact, checkpoint("scout"), "--work", work)
    assert figures(record) == undisturbed()
    unharmed = (file, kind) in [("original-0.hidden", "extended"), *LEFT[7:9]]
    assert record["resumed_layers"] == (2 if unharmed else 0)
    assert not work.exists()


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("removed", ["*.hidden", "original-*", "*"])
def test_killed_while_clearing_up_it_ends_in_the_same_numbers(
    evaluated, checkpoint, kept_artifact, undisturbed, tmp_path, monkeypatch, removed
):
    work, kept = tmp_path / "work", tmp_path / "kept"

    def die(self):
        for path in self.path.glob(removed):
            path.unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", die)
        with pytest.raises(Killed):
            evaluated(kept_artifact, checkpoint("scout"), "--work", work)
    record = evaluated(kept_artifact, checkpoint("scout"), "--work", work, "--save-reference", kept)
    del record["reference"]
    assert figures(record) == undisturbed()
    if removed == "*.hidden":
        assert evaluated(kept_artifact, None, "--reference", kept)["kl_mean"] == pytest.approx(record["kl_mean"], 1e-4)


def test_a_folder_that_is_not_its_own_is_left_alone(evaluated, l4pack, checkpoint, kept_artifact, tmp_path, text_file):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "original-0.hidden").write_text("a diary")
    source = checkpoint("scout")
    for options in ([], ["--restart"]):
        ended = evaluated(kept_artifact, source, "--work", theirs, *options, code=2)
        assert "is not l4pack's" in ended.err
        ended = evaluated(kept_artifact, source, "--work", source / "work", *options, code=2)
        assert "which is read" in ended.err
        assert "which is read" in evaluated(kept_artifact, source, "--work", kept_artifact, *options, code=2).err
    ended = l4pack("coverage", source, "--calibration", text_file, "--sequence-length", 64, "--work", theirs)
    assert (ended.code, "is not l4pack's" in ended.err) == (2, True)
    assert [path.name for path in theirs.iterdir()] == ["original-0.hidden"]
    assert (theirs / "original-0.hidden").read_text() == "a diary"


def test_a_second_starter_is_refused_and_the_first_goes_on(evaluated, checkpoint, kept_artifact, tmp_path):
    with owned(tmp_path / "work", "evaluate"):
        ended = evaluated(kept_artifact, checkpoint("scout"), "--work", tmp_path / "work", code=1)
        assert ended.err.startswith("error: another run is working in ")
    evaluated(kept_artifact, checkpoint("scout"), "--work", tmp_path / "work")


def test_work_of_other_options_is_refused_with_what_changed(evaluated, checkpoint, made, tmp_path, stopped_in):
    work = tmp_path / "work"
    with stopped_in(3):
        evaluated(made, checkpoint("scout"), "--work", work, code=75)
    ended = evaluated(made, checkpoint("scout"), "--work", work, "--weights-only", "--seed", 2, code=2)
    assert f"{work} was begun as another job: --seed was 0 and is 2; " in ended.err
    assert "--weights-only was False and is True" in ended.err
    assert f"repeat the earlier command, l4pack evaluate {made}" in ended.err
    assert evaluated(made, checkpoint("scout"), "--work", work, "--restart", "--seed", 2)["resumed_layers"] == 0


@pytest.fixture
def stopped_in(monkeypatch):
    """A context in which a walk is asked to stop when it begins a layer."""

    @contextlib.contextmanager
    def stopping(layer):
        walk_layer = Walk._layer

        def stop(self, index, ready):
            if index + 1 == layer:
                signal.raise_signal(signal.SIGTERM)
            walk_layer(self, index, ready)

        with monkeypatch.context() as patch:
            patch.setattr(Walk, "_layer", stop)
            yield

    return stopping


def test_max_ram_gives_the_same_numbers(evaluated, checkpoint, made):
    limit = least_ram(lambda *options: evaluated(made, checkpoint("scout"), *options, code=3))
    free = evaluated(made, checkpoint("scout"))
    tight = evaluated(made, checkpoint("scout"), "--max-ram", str(limit))
    assert {**tight, "run": 0} == {**free, "run": 0}


def test_record_says_what_it_ran_on(evaluated, checkpoint, made, text_file):
    import hashlib

    record = evaluated(made, checkpoint("scout"), "--seed", 7)
    assert record["text"]["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert record["text"]["sequence_length"] == 96
    assert record["text"]["seed"] == 7
    assert record["run"]["dtype"] == "float32"
    assert record["run"]["peak_ram_bytes"] > MODEL_LOADED
    assert set(record["run"]["versions"]) >= {"torch", "transformers", "l4pack", "compressed-tensors"}
    assert "CPU" in record["run"]["device"]


def test_weights_only_differs_where_inputs_are_rounded(evaluated, checkpoint, artifact, copied):
    made = copied(artifact("fp8"), "artifact")
    rounded, plain = evaluated(made, checkpoint("scout")), evaluated(made, checkpoint("scout"), "--weights-only")
    assert rounded["kl_mean"] > plain["kl_mean"] > 0
    assert plain["run"]["activations"] == "not rounded"


# Text


def test_windows_do_not_overlap_and_start_with_bos(checkpoint, text_file):
    from l4pack.checkpoint.source import open_folder

    tokenizer = load_tokenizer(open_folder(checkpoint("scout")))
    text = load_text(TextChoice(str(text_file), 1000, 64), tokenizer, 1024)
    assert all(sequence.tokens[0] == models.BOS for sequence in text.sequences)
    assert {len(sequence.tokens) for sequence in text.sequences[:-1]} == {64}
    joined = [token for sequence in text.sequences for token in sequence.tokens[1:]]
    assert tokenizer.decode(joined) == text_file.read_text()
    some = load_text(TextChoice(str(text_file), 5, 64, seed=3), tokenizer, 1024)
    assert some.sequences == load_text(TextChoice(str(text_file), 5, 64, seed=3), tokenizer, 1024).sequences
    assert some.sequences != load_text(TextChoice(str(text_file), 5, 64, seed=4), tokenizer, 1024).sequences
    assert set(some.sequences) <= set(text.sequences)


def test_conversations_are_rendered_by_the_chat_template(checkpoint, tmp_path):
    from l4pack.checkpoint.source import open_folder

    tokenizer = load_tokenizer(open_folder(checkpoint("scout")))
    lines = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}] * 2
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "chats" / "b.txt").write_text("plain " * 20)
    text = load_text(TextChoice(str(tmp_path / "chats"), 9, 40), tokenizer, 1024)
    rendered = tokenizer.decode([*text.sequences[0].tokens, *text.sequences[1].tokens[1:]])
    assert rendered.startswith("<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>")
    assert rendered.endswith("<|header_start|>assistant<|header_end|>\n\nhello<|eot|>")
    assert [len(sequence.tokens) for sequence in text.sequences][-4:] == [40, 40, 40, 4]


def test_named_sets_come_from_optimum(checkpoint, monkeypatch):
    import optimum.gptq.data

    from l4pack.checkpoint.source import open_folder

    asked = {}

    def get_dataset(name, tokenizer, **options):
        asked.update(options, name=name)
        return [{"input_ids": torch.arange(options["seqlen"])[None]}] * options["nsamples"]

    monkeypatch.setattr(optimum.gptq.data, "get_dataset", get_dataset)
    tokenizer = load_tokenizer(open_folder(checkpoint("scout")))
    text = load_text(TextChoice("wikitext2", 3, 50), tokenizer, 1024)
    assert (len(text.sequences), text.sequences[0].tokens) == (3, tuple(range(50)))
    assert asked == {"name": "wikitext2", "nsamples": 3, "seqlen": 50, "seed": 0, "split": "validation"}


def test_a_named_set_without_network(checkpoint, monkeypatch):
    import optimum.gptq.data

    from l4pack.checkpoint.source import open_folder

    def no_network(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(optimum.gptq.data, "get_dataset", no_network)
    with pytest.raises(UsageError, match="the set c4 can't be had"):
        load_text(TextChoice("c4", 3, 50), load_tokenizer(open_folder(checkpoint("scout"))), 1024)


# Questions


def questions_file(folder, count=6):
    generator = torch.Generator().manual_seed(9)
    lines = []
    for number in range(count):
        picked = [WORDS[index] for index in torch.randint(0, len(WORDS), (9,), generator=generator).tolist()]
        choices = [f" {picked[6]}", f" {picked[7]} {picked[8]}", " no"]
        lines.append(json.dumps({"context": " ".join(picked[:6]), "choices": choices, "answer": number % 3}))
    path = folder / "fox.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_questions_are_answered_by_log_likelihood(evaluated, checkpoint, made, tmp_path):
    path = questions_file(tmp_path)
    record = evaluated(made, checkpoint("scout"), "--task", path, "--min-recovery", "fox=0.0")["tasks"]["fox"]
    model, right = whole_model.load(checkpoint("scout")), 0
    for line in path.read_text().splitlines():
        question = json.loads(line)
        sums = []
        for choice in question["choices"]:
            before, whole = list(question["context"].encode()), list((question["context"] + choice).encode())
            ids = [models.BOS, *(_byte_token(byte) for byte in whole)]
            rows = whole_model.log_probabilities(whole_model.logits(model, [ids])[0])
            sums.append(sum(float(rows[at - 1, ids[at]]) for at in range(1 + len(before), len(ids))))
        right += sums.index(max(sums)) == question["answer"]
    assert record["questions"] == 6
    assert record["accuracy_reference"]["value"] == right / 6
    assert record["recovery"] is None or record["recovery"] == record["accuracy"]["value"] / (right / 6)


def _byte_token(byte):
    from tokenizers.pre_tokenizers import ByteLevel

    letter = ByteLevel(add_prefix_space=False).pre_tokenize_str(bytes([byte]).decode())[0][0]
    return sorted(ByteLevel.alphabet()).index(letter)


def test_choices_by_sum_and_by_byte():
    task = EvaluationTask("t", (Question("c", ("long choice", "x"), 0), Question("c", ("a", "b"), 1)))
    chosen = choices_made(task, [-5.0, -1.0, -2.0, -1.0])
    assert chosen["accuracy"].tolist() == [1, 1]
    assert chosen["accuracy_per_byte"].tolist() == [0, 1]
    record = task_record(task, [-5.0, -1.0, -2.0, -1.0], [-1.0, -5.0, -2.0, -1.0])
    assert record["accuracy"]["value"] == record["recovery"] == 0.5
    assert record["same_choice"] == 0.5


def test_spaces_belong_to_the_continuation(checkpoint):
    from l4pack.checkpoint.source import open_folder

    tokenizer = load_tokenizer(open_folder(checkpoint("scout")))
    one, other = continuation(tokenizer, "a b ", "c", 99), continuation(tokenizer, "a b", " c", 99)
    assert one == other
    assert one.score_from == 4


def test_needles_lie_where_they_should(evaluated, checkpoint, made):
    record = evaluated(made, checkpoint("scout"), "--needle", 200)["needle"]
    assert [row["depth"] for row in record["artifact"]["needles"]] == [0.05, 0.25, 0.5, 0.75, 0.95]
    assert record["original"]["length"] == 200
    assert all(row["log_likelihood"] < 0 for row in record["original"]["needles"])


# Statistics


def test_standard_error_is_that_of_cluster_sums():
    values = torch.randn(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lengths = [90, 70, 40]
    cluster = clusters(lengths)
    groups = [values[0:64], values[64:90], values[90:154], values[154:160], values[160:200]]
    assert [int((cluster == number).sum()) for number in range(5)] == [len(group) for group in groups]
    mean = float(values.sum()) / 200
    squares = sum(float((group - mean).sum()) ** 2 for group in groups)
    assert mean_and_error(values, cluster) == pytest.approx((mean, math.sqrt(5 / 4 * squares) / 200))
    assert mean_and_error(values, torch.zeros(200, dtype=torch.long))[1] is None
    assert int(clusters([100] * 16).max()) == 15


def test_standard_error_covers_what_repeats_show():
    """Of many texts with correlated tokens, the mean lies within two standard errors about 95 times in 100."""
    generator = torch.Generator().manual_seed(3)
    inside = 0
    for _ in range(300):
        shared = torch.randn(30, 1, generator=generator, dtype=torch.float64)
        values = (shared + torch.randn(30, 20, generator=generator, dtype=torch.float64)).reshape(-1)
        mean, error = mean_and_error(values, clusters([20] * 30))
        inside += abs(mean) < 2 * error
    assert 0.90 < inside / 300 < 0.99


def test_percentiles_are_nearest_rank():
    values = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0])
    assert [percentile(values, share) for share in (0.2, 0.21, 0.5, 1.0)] == [1, 2, 3, 5]


def test_histogram_and_positions():
    count = 40
    kl = torch.tensor([0.0] * 10 + [1e-6] * 20 + [1000.0] * 10, dtype=torch.float64)
    scores = Scores(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.long))
    record = summarize(PairedScores(scores, scores, kl), [20, 20], torch.arange(20).repeat(2))
    counts = record["kl_histogram"]["counts"]
    assert (counts[0], counts[-1], sum(counts)) == (10, 10, 40)
    assert counts[HISTOGRAM_EDGES.index(1e-6) + 1] == 20
    assert [(row["from"], row["to"], row["tokens"]) for row in record["by_position"]][:2] == [(0, 1, 4), (2, 3, 4)]
    first = record["by_position"][0]
    kl_of = kl.reshape(2, 20)[:, :2].sum(dim=1)
    assert first["kl_mean"] == pytest.approx(float(kl_of.sum()) / 4)
    deviations = kl_of - 2 * first["kl_mean"]
    assert first["kl_standard_error"] == pytest.approx(math.sqrt(2 * float(deviations.square().sum())) / 4)


# Bad input


def test_tokenizers_that_differ(evaluated, checkpoint, made):
    settings = json.loads((made / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    swapped = {"a": vocabulary["b"], "b": vocabulary["a"]}
    vocabulary.update(swapped)
    (made / "tokenizer.json").write_text(json.dumps(settings))
    ended = evaluated(made, checkpoint("scout"), code=2)
    assert ended.err.startswith("error: the tokenizers of artifact and original differ")
    assert ended.err.count("\n") == 2


def test_an_artifact_without_tokenizer(evaluated, checkpoint, made):
    (made / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in evaluated(made, checkpoint("scout"), code=4).err


def test_a_damaged_tokenizer(evaluated, checkpoint, made):
    (made / "tokenizer.json").write_text("{")
    assert "tokenizer.json can't be read" in evaluated(made, None, code=4).err


def test_an_artifact_of_another_model(evaluated, checkpoint, made):
    ended = evaluated(made, checkpoint("maverick"), code=2)
    assert "is an artifact of another model: num_local_experts is 4" in ended.err


def test_an_artifact_that_leaves_to_its_defaults_what_the_original_lists(evaluated, checkpoint, made):
    config = json.loads((made / "config.json").read_text())
    text = config["text_config"]
    assert text.pop("moe_layers") == list(range(text["num_hidden_layers"]))
    (made / "config.json").write_text(json.dumps(config))
    evaluated(made, checkpoint("scout"), code=0)


def test_logits_that_are_not_numbers(evaluated, checkpoint, made):
    for path in made.glob("*.safetensors"):
        state = load_file(path)
        if "language_model.lm_head.weight" in state:
            state["language_model.lm_head.weight"][7] = torch.nan
            save_file(state, path)
    assert "artifact: the logits are infinite or not a number" in evaluated(made, checkpoint("scout"), code=1).err


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("empty.txt", b" \n", (), "holds no text"),
        ("latin.txt", b"caf\xe9" * 100, (), "is not UTF-8 text"),
        ("chat.jsonl", b'{"messages": 3}', (), "line 1: 'messages' is a number"),
        ("bad.jsonl", b"{", (), "line 1: not JSON"),
        (
            "odd.jsonl",
            b'{"messages": [{"role": "user"}]}\n{"messages": ["x"]}',
            (),
            "line 1, message 1: its content is null",
        ),
        ("fine.txt", b"word " * 100, ("--sequence-length", 5000), "outside 2 to 1024"),
        ("fine.txt", b"word " * 100, ("--samples", 0), "--samples 0"),
        ("fine.txt", b"word " * 100, ("--needle", 2000), "more than the model's context"),
        ("fine.txt", b"word " * 100, ("--needle", 20), "leaves no room"),
        ("fine.txt", b"word " * 100, ("--min-recovery", "arc"), "not TASK=SHARE"),
        ("fine.txt", b"word " * 100, ("--max-kl", "-1"), "a gate is out of range"),
        ("fine.txt", b"word " * 100, ("--task", "/no/such.jsonl"), "/no/such.jsonl: No such file or directory"),
        ("fine.txt", b"word " * 100, ("--reference", "/no/such"), "holds no complete reference"),
    ],
)
def test_bad_text_and_options(l4pack, made, tmp_path, name, content, options, message):
    path = tmp_path / name
    path.write_bytes(content)
    chosen = {"--sequence-length": 96, "--text": path} | dict(zip(options[::2], options[1::2], strict=True))
    ended = l4pack("evaluate", made, *(part for pair in chosen.items() for part in pair))
    assert ended.code == 2, ended.err
    assert message in ended.err
    assert ended.err.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize("line", ["{}", '{"context": "a", "choices": ["b"], "answer": 0}',
                                  '{"context": "a", "choices": ["b", "c"], "answer": 2}', ""])  # fmt: skip
def test_bad_questions(evaluated, made, tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(line)
    assert "bad.jsonl" in evaluated(made, None, "--task", tmp_path / "bad.jsonl", code=2).err


def test_missing_text_and_folders(evaluated, made, tmp_path):
    assert "there is no text" in evaluated(made, None, "--text", tmp_path / "none.txt", code=2).err
    (tmp_path / "empty").mkdir()
    assert "holds no .txt" in evaluated(made, None, "--text", tmp_path / "empty", code=2).err


def test_no_files_are_left_outside_the_artifact(evaluated, checkpoint, made):
    before = set(made.parent.iterdir())
    evaluated(made, checkpoint("scout"))
    assert set(made.parent.iterdir()) == before
