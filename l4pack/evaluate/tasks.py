"""Multiple choice by log-likelihood: every choice of every question is a sequence of the same pass.

A file has one JSON object a line, or a list of them: `{"context": "…", "choices": ["…", "…"], "answer": 1}`. The answer given is the choice
with the largest log-likelihood (`accuracy`), or with the largest per byte of its text (`accuracy_per_byte`), as
lm-evaluation-harness's `acc` and `acc_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l4pack.errors import UsageError
from l4pack.stream.hidden import TokenSequence
from l4pack.text.files import FileKind, Meter, kind_of, opened
from l4pack.text.json_rows import json_rows
from l4pack.text.passages import check_characters, has_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """One question, its choices and the number of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class EvaluationTask:
    """A set of questions."""

    name: str
    questions: tuple[Question, ...]


def load_task(path: Path) -> EvaluationTask:
    """Read a task file. Raises UsageError naming the line."""
    if kind_of(path) is not FileKind.JSON:
        raise UsageError(f"{path} holds no JSON", hint="give a JSONL file of questions")
    with opened(path, Meter()) as stream:
        questions = [_question(value, where) for where, value in json_rows(stream, path)]
    if not questions:
        raise UsageError(f"{path} holds no questions", hint='a line is {"context": …, "choices": […], "answer": 0}')
    return EvaluationTask(path.stem, tuple(questions))


def _question(value: object, where: str) -> Question:
    match value:
        case {"context": str(context), "choices": [_, _, *_] as choices, "answer": int(answer)} if answer is not True:
            if all(isinstance(choice, str) and choice for choice in choices) and 0 <= answer < len(choices):
                if any(has_images(check_characters(text, where)) for text in (context, *choices)):
                    raise UsageError(f"{where}: holds an image token", hint="questions are text alone")
                return Question(context, tuple(choices), answer)
    raise UsageError(f"{where}: not a question", hint='write {"context": "…", "choices": ["…", "…"], "answer": 0}')


def sequences_of(task: EvaluationTask, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[TokenSequence]:
    """One sequence a choice, its continuation scored. Raises UsageError for one that does not fit the context."""
    return [
        continuation(tokenizer, question.context, choice, longest)
        for question in task.questions
        for choice in question.choices
    ]


def continuation(tokenizer: PreTrainedTokenizerBase, context: str, text: str, longest: int) -> TokenSequence:
    """Context and text as one sequence of which the text is scored.

    Spaces at the end of the context are counted to the text, and both are tokenized together, as in
    lm-evaluation-harness (`TemplateLM._encode_pair`). Raises UsageError when the choice adds no token.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, text = context[:-spaces], context[-spaces:] + text
    bos = tokenizer.bos_token_id
    start = [] if bos is None or _ids(tokenizer, context)[:1] == [bos] else [bos]
    before = start + _ids(tokenizer, context)
    whole = start + _ids(tokenizer, context + text)
    if not before or len(whole) <= len(before):
        raise UsageError("a choice adds no token to its context", hint="is a choice or a context empty?")
    if len(whole) > longest:
        raise UsageError(
            f"a question of {len(whole)} tokens is longer than the model's context of {longest}", hint="shorten it"
        )
    return TokenSequence(tuple(whole), score_from=len(before))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return ids


def choices_made(task: EvaluationTask, sums: Sequence[float]) -> dict[str, Tensor]:
    """int64 [questions], the choice taken by log-likelihood and by log-likelihood a byte, from one sum (nats) a
    choice."""
    plain, per_byte, place = [], [], 0
    for question in task.questions:
        values = sums[place : place + len(question.choices)]
        place += len(question.choices)
        scaled = [value / len(choice.encode()) for value, choice in zip(values, question.choices, strict=True)]
        plain.append(max(range(len(values)), key=values.__getitem__))
        per_byte.append(max(range(len(scaled)), key=scaled.__getitem__))
    return {"accuracy": torch.tensor(plain), "accuracy_per_byte": torch.tensor(per_byte)}


def task_record(task: EvaluationTask, artifact: Sequence[float], reference: Sequence[float] | None) -> dict[str, Any]:
    """Accuracy of both models with standard errors, recovery, and how often they choose alike."""
    answers = torch.tensor([question.answer for question in task.questions])
    made = choices_made(task, artifact)
    original = None if reference is None else choices_made(task, reference)
    record: dict[str, Any] = {"questions": len(task.questions)}
    for key, chosen in made.items():
        record[key] = _accuracy(chosen, answers)
        if original is not None:
            record[f"{key}_reference"] = _accuracy(original[key], answers)
    if original is not None:
        right = record["accuracy_reference"]["value"]
        record["recovery"] = record["accuracy"]["value"] / right if right else None
        record["same_choice"] = float((made["accuracy"] == original["accuracy"]).double().mean())
    return record


def _accuracy(chosen: Tensor, answers: Tensor) -> dict[str, float | None]:
    value = float((chosen == answers).double().mean())
    count = len(answers)
    return {"value": value, "standard_error": math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None}
