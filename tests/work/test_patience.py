"""Programs in a checkpoint's files, a tokenizer's patterns and a chat template, end or are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest

from l4pack.demo import model_path
from l4pack.work.patience import within


def test_what_ends_in_time_gives_its_result_or_its_error():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(1))


PROGRAM = """
import sys
from pathlib import Path
from l4pack.checkpoint.source import open_folder
from l4pack.errors import SourceError
from l4pack.text import tokenizer as tokenizers
tokenizers.PATIENCE_SECONDS = float(sys.argv[2])
tokenizer = tokenizers.load_tokenizer(open_folder(Path(sys.argv[1])))
try:
    tokenizer("a" * 3000 + "cd", add_special_tokens=False, verbose=False)
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
except SourceError as error:
    print(error.message)
"""
LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("pattern", "template", "seconds", "said"),
    [
        ("(a+)+$", None, 60, "tokenizer.json"),  # Oniguruma gives up by itself, in a panic
        ("a*a*d", None, 0.5, "tokenizer.json"),  # quadratic from every letter: slow, and no panic
        (None, LOOP, 0.5, "its chat template"),
    ],
)
def test_what_never_ends_is_refused_and_the_process_ends(tmp_path, pattern, template, seconds, said):
    """In a process of its own: the thread that never ends goes on as long as the process does."""
    folder = shutil.copytree(model_path(), tmp_path / "model")
    if pattern is not None:
        value = json.loads((folder / "tokenizer.json").read_text())
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        (folder / "tokenizer.json").write_text(json.dumps({**value, "pre_tokenizer": split}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(seconds)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"{said} finds no end on" in ended.stdout
    assert ended.stderr == ""
