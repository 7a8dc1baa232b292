"""Sets of lm-evaluation-harness's tasks, and the blocks that a streamed model answers them in; lm-eval itself is not needed."""

from __future__ import annotations

import pytest
import torch
from whole_model import one_thread  # noqa: F401

from l4pack.checkpoint.source import open_folder
from l4pack.evaluate import streamed_scorer
from l4pack.evaluate.harness_suite import HARNESS_SUITES, asked_tasks, harness_suite
from l4pack.evaluate.schema import SuiteResult
from l4pack.evaluate.streamed_scorer import StreamedScorer, blocks, shared
from l4pack.stream.compute import Compute
from l4pack.stream.hidden import TokenSequence

# huggingface.co/docs/leaderboards/open_llm_leaderboard/archive: tasks, shots and metrics of version 1.
OPENLLM = {
    "arc_challenge": (25, "acc_norm"), "hellaswag": (10, "acc_norm"), "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"), "winogrande": (5, "acc"), "gsm8k": (5, "exact_match strict-match"),
}  # fmt: skip


def test_openllm_has_the_leaderboards_settings():
    found = {one.task: (one.num_fewshot, one.metric) for one in harness_suite("openllm").tasks}
    assert found == OPENLLM


@pytest.mark.parametrize("name", HARNESS_SUITES)
def test_what_writes_text_is_left_out_of_a_streamed_model_alone(name):
    whole = {one.task for one in harness_suite(name).tasks}
    assert {one.task for one in asked_tasks((), (name,), streamed=False).tasks} == whole
    streamed = asked_tasks((), (name,), streamed=True)
    assert {one.task for one in streamed.tasks} == whole - {
        one.task for one in harness_suite(name).tasks if one.generates
    }


def test_settings_of_a_set_come_before_those_of_a_task():
    asked = asked_tasks(("hellaswag", "piqa"), ("openllm",), streamed=True)
    shots = {one.task: one.num_fewshot for one in asked.tasks}
    assert (shots["piqa"], shots["hellaswag"]) == (None, 10)


def result(artifact, original=None):
    record = {"accuracy": {"value": artifact, "standard_error": None}}
    if original is not None:
        record |= {"accuracy_reference": {"value": original, "standard_error": None}}
        record["recovery"] = artifact / original if original else None
    return record


def test_recovery_is_the_mean_of_the_tasks_in_per_cent():
    asked = asked_tasks((), ("leaderboard",), streamed=True)
    names = [one.task for one in asked.tasks]
    tasks = {name: result(0.45, 0.5) for name in names} | {names[0]: result(0.6, 0.6)}
    found = asked.record(tasks)["leaderboard"]
    SuiteResult.model_validate(found)
    assert found["recovery_percent"] == pytest.approx((90 * (len(names) - 1) + 100) / len(names))
    assert found["left_out"] == ["leaderboard_math_hard", "leaderboard_ifeval"]
    assert asked.record({**tasks, names[0]: result(0.6, 0.0)})["leaderboard"]["recovery_percent"] is None
    assert "recovery_percent" not in asked.record({name: result(0.5) for name in names})["leaderboard"]


def sequences(*lengths):
    return [TokenSequence(tuple(range(5, 5 + length))) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "cut"),
    [((3, 3, 3), [2, 1]), ((9, 2), [1, 1]), ((2, 9, 1), [1, 1, 1]), ((6,), [1]), ((), [])],
)
def test_blocks_hold_so_many_tokens(lengths, cut):
    assert [len(block) for block in blocks(sequences(*lengths), 6)] == cut


# The choices of one question, a question of its own, and a prefix of the first.
ASKED = [
    *(TokenSequence((256, 7, 8, 9, choice), score_from=4) for choice in (11, 12, 13)),
    TokenSequence((256, 30, 31, 32), score_from=2),
    TokenSequence((256, 7, 8, 9), score_from=3),
]


def test_choices_of_one_token_walk_once():
    packed, rows, targets = shared(ASKED)
    assert [len(item.tokens) for item in packed.sequences] == [5, 4, 4]
    assert rows.tolist() == [3, 3, 3, 6, 7, 11]
    assert targets.tolist() == [11, 12, 13, 31, 32, 9]


@pytest.fixture
def scorer(checkpoint, tmp_path):
    return StreamedScorer(open_folder(checkpoint("scout")), tmp_path / "work", Compute.of("cpu"))


def test_answers_are_those_of_sequences_asked_alone(scorer):
    together = scorer(ASKED)
    for item, (values, likeliest) in zip(ASKED, together, strict=True):
        ((alone, alone_likeliest),) = scorer([item])
        assert torch.allclose(values, alone, atol=1e-5)
        assert likeliest.tolist() == alone_likeliest.tolist()


def test_finished_blocks_are_not_run_again(scorer, monkeypatch):
    monkeypatch.setattr(streamed_scorer, "BLOCK_TOKENS", 9)
    walked = []
    real = StreamedScorer._walked

    def stopping(self, part, job):
        walked.append(len(part))
        if len(walked) == 3:
            raise KeyboardInterrupt
        return real(self, part, job)

    monkeypatch.setattr(StreamedScorer, "_walked", stopping)
    with pytest.raises(KeyboardInterrupt):
        scorer(ASKED)
    found = scorer(ASKED)
    sizes = [len(block) for block in blocks(ASKED, 9)]
    assert walked == [*sizes[:3], *sizes[2:]]
    assert [len(values) for values, _ in found] == [1, 1, 1, 2, 1]


def test_a_block_of_another_model_is_not_taken(scorer, checkpoint, tmp_path):
    before = scorer(ASKED)
    other = StreamedScorer(open_folder(checkpoint("scout", seed=3)), tmp_path / "work", Compute.of("cpu"))
    assert [values.tolist() for values, _ in other(ASKED)] != [values.tolist() for values, _ in before]
