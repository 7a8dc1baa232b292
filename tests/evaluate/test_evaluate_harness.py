"""lm-evaluation-harness gets the same answers from a streamed model as from the loaded one."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import whole_model
from whole_model import one_thread  # noqa: F401

from l4pack.checkpoint.source import open_folder
from l4pack.errors import UsageError
from l4pack.evaluate import evaluate, harness_suite
from l4pack.evaluate.harness import harness_record, run_tasks, streamed_lm, task_manager
from l4pack.evaluate.harness_suite import HarnessSuite, HarnessTask
from l4pack.evaluate.streamed_scorer import StreamedScorer
from l4pack.stream.compute import Compute

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

FOXES = HarnessTask(task="foxes")
REQUESTS = [("the quick", " brown fox"), ("", "jumps over"), ("a lazy dog ", "sleeps"), ("one", " two three four five"),
            ("<|begin_of_text|>once", " upon")]  # fmt: skip


@pytest.fixture
def streamed(checkpoint, tmp_path):
    def model(**text):
        source = open_folder(checkpoint("scout", **text))
        return streamed_lm(source, StreamedScorer(source, tmp_path / "work", Compute.of("cpu")))

    return model


def loaded(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return HFLM(pretrained=whole_model.load(folder), tokenizer=tokenizer, batch_size=2, **options)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_loaded_model(checkpoint, streamed):
    asked = instances("loglikelihood", REQUESTS)
    wanted = loaded(checkpoint("scout")).loglikelihood(asked, disable_tqdm=True)
    found = streamed().loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)


def test_long_texts_go_in_windows(checkpoint, streamed):
    text = {"max_position_embeddings": 64}
    asked = instances("loglikelihood_rolling", [("many words " * 20,), ("few",)])
    wanted = loaded(checkpoint("scout", **text), max_length=64).loglikelihood_rolling(asked, disable_tqdm=True)
    assert streamed(**text).loglikelihood_rolling(asked) == pytest.approx(wanted, abs=1e-3)


def test_contexts_are_cut_to_the_models_length(checkpoint, streamed):
    text = {"max_position_embeddings": 64}
    asked = instances("loglikelihood", [("word " * 40, "end")])
    wanted = loaded(checkpoint("scout", **text), max_length=64).loglikelihood(asked, disable_tqdm=True)
    assert streamed(**text).loglikelihood(asked, disable_tqdm=True)[0][0] == pytest.approx(wanted[0][0], abs=1e-4)


def test_a_task_of_the_harness_runs_through(checkpoint, streamed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = local_task(tmp_path, ["foxes"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run_tasks(streamed(), [FOXES], None, manager, bootstrap_iters=0)
        wanted = run_tasks(loaded(checkpoint("scout")), [FOXES], None, manager, bootstrap_iters=0)
    assert found["foxes"]["acc"] == wanted["foxes"]["acc"]
    assert found["foxes"]["acc_norm"] == wanted["foxes"]["acc_norm"]
    assert found["foxes"]["questions"] == 8
    record = harness_record(found, wanted)["foxes"]
    assert (record["metric"], record["questions"]) == ("acc", 8)
    assert record["recovery"] in (None, 1.0)


@pytest.fixture
def small_suite(tmp_path, monkeypatch):
    """`openllm` as foxes with two shots, and a task that writes text."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = local_task(tmp_path, ["foxes"])
    tasks = (
        HarnessTask(task="foxes", num_fewshot=2, metric="acc_norm"),
        HarnessTask(task="tales", metric="acc", generates=True),
    )
    monkeypatch.setattr(harness_suite, "harness_suite", lambda name: HarnessSuite(suite=name, title="few", tasks=tasks))
    monkeypatch.setattr(evaluate, "task_manager", lambda *_: manager)


def test_data_that_can_not_be_fetched_is_one_line(small_suite, checkpoint, artifact, l4pack, monkeypatch):
    def unreachable(**_):
        raise ConnectionError("Couldn't reach 'foxes' on the Hub")

    monkeypatch.setattr("lm_eval.simple_evaluate", unreachable)
    ended = l4pack(
        "evaluate", artifact("int4-rtn"), "--against", checkpoint("scout"), "--suite", "openllm", "--dry-run"
    )
    assert ended.code == 5
    assert ended.err.splitlines()[0] == "error: the data of foxes can't be fetched: Couldn't reach 'foxes' on the Hub"


@pytest.mark.filterwarnings("ignore")
def test_a_set_of_tasks_has_its_shots_its_cost_and_its_recovery(
    small_suite, checkpoint, artifact, tmp_path, l4pack, monkeypatch
):
    made = shutil.copytree(artifact("int4-rtn"), tmp_path / "made")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 40)
    command = ["evaluate", made, "--against", checkpoint("scout"), "--suite", "openllm", "--text", text,
               "--sequence-length", 64, "--samples", 2, "--compute", "cpu"]  # fmt: skip
    plan = json.loads(l4pack(*command, "--dry-run", "--json").out)["plan"]["lm_eval"]
    assert (plan["requests"], plan["passes"], plan["left_out"]) == (24, 1, ["tales"])
    assert plan["tokens"] > 24 * 3 * len("fox number 1")  # two shots stand before each question
    asked = []
    real = StreamedScorer._walked
    monkeypatch.setattr(StreamedScorer, "_walked", lambda *given: asked.append(given[1]) or real(*given))
    ended = l4pack(*command)
    assert ended.code == 0, ended.err
    assert "suite openllm: mean" in ended.out
    assert "not run: tales" in ended.out
    assert sum(len(item.tokens) for item in asked[0]) == plan["tokens"]
    record = json.loads((made / "accuracy.json").read_text())
    assert record["tasks"]["foxes"]["metric"] == "acc_norm"
    assert record["tasks"]["foxes"]["questions"] == 8
    assert record["suites"]["openllm"]["tasks"] == ["foxes"]


def test_tasks_and_backends_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match="knows no task unicorns"):
        local_task(tmp_path, ["unicorns"])
    with pytest.raises(UsageError, match="there is no backend abacus"):
        task_manager(["foxes"], "abacus")


def test_record_of_a_task():
    numbers = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6, "questions": 8}
    record = harness_record({"t": numbers}, {"t": {**numbers, "acc": 0.4}})["t"]
    assert record["accuracy"] == {"value": 0.5, "standard_error": 0.1}
    assert record["recovery"] == pytest.approx(1.25)
    assert "recovery" not in harness_record({"t": numbers}, None)["t"]


def local_task(folder, tasks):
    rows = [
        {"q": f"fox number {number}", "choices": ["runs", "sleeps a lot", "eats"], "a": number % 3}
        for number in range(8)
    ]
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "foxes.yaml").write_text(
        f"task: foxes\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
        "doc_to_choice: choices\nmetric_list:\n- {metric: acc}\n- {metric: acc_norm}\n"
    )
    return task_manager(tasks, "streamed", str(folder / "tasks"))


def test_generation_is_refused_with_a_way_out(streamed):
    with pytest.raises(UsageError, match="generated text") as caught:
        streamed().generate_until(instances("generate_until", [("a", {})]))
    assert "--backend" in caught.value.hint
