"""How much a command says beside its result, and defaults of one's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text

from l4pack.cli import console


@pytest.fixture
def manner(monkeypatch):
    """How console talks, as it was before."""
    fresh = console.Manner()
    monkeypatch.setattr(console, "manner", fresh)
    return fresh


def test_off_a_terminal_a_step_takes_a_line(manner, capsys):
    """Name, step, share, rate, and time left as long as some is."""
    with console.progress("solving", 400) as bar:
        bar.advance(100)
        bar.label("layer 1 of 2, attention")
        bar.step("layer 1 of 2 done")
        bar.advance(300)
        bar.step("layer 2 of 2 done")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"solving: layer 1 of 2 done, 25 %, .*/s, .* left", first)
    assert re.fullmatch(r"solving: layer 2 of 2 done, 100 %, [^,]*/s", second)


def test_a_job_without_steps_speaks_now_and_then(manner, capsys, monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("verifying", 1000) as bar:
        for _ in range(100):
            bar.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 20
    assert lines[0].startswith("verifying: ")


def test_quiet_and_verbose(manner, capsys):
    manner.quiet = True
    with console.progress("solving", 2) as bar:
        bar.advance(1)
        bar.step("one")
        console.warning("odd")
        console.error("wrong", "do it otherwise")
    assert capsys.readouterr().err.splitlines() == ["error: wrong", "hint: do it otherwise"]
    manner.quiet, manner.verbose = False, True
    with console.progress("solving", 2) as bar:
        bar.label("a part")
    assert capsys.readouterr().err.startswith("solving: a part, ")


def test_a_log_has_it_all_with_the_time(l4pack, tmp_path):
    log = tmp_path / "l4pack.log"
    for _ in range(2):
        assert l4pack("inspect", "nowhere-at-all", "--quiet", "--log-file", log).code == 4
    lines = log.read_text().splitlines()
    assert len(lines) == 4
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d (error|hint): ", line) for line in lines)
    ended = l4pack("inspect", "demo", "--log-file", tmp_path / "no" / "such.log")
    assert (ended.code, "such.log: No such file or directory" in ended.err) == (2, True)


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A configuration file of one's own, and the function that writes it."""
    from l4pack.cli import app, shared

    path = tmp_path / "config.toml"
    monkeypatch.setenv("L4PACK_CONFIG", str(path))

    def write(text):
        path.write_text(text)
        shared.read_config.cache_clear()
        app.loaded.cache_clear()

    yield write
    monkeypatch.delenv("L4PACK_CONFIG")
    write("")


def test_defaults_come_from_the_environment_before_the_file(l4pack, own, monkeypatch):
    own('context = "16k"\n[budget.show]\ndevice = "h200"\n')
    found = json.loads(l4pack("budget", "llama-4-scout", "--recipe", "int4", "--json").out)
    assert (found["device"], found["context"]) == ("h200", 16_384)
    monkeypatch.setenv("L4PACK_CONTEXT", "32k")
    own('context = "16k"\n[budget.show]\ndevice = "h200"\n')
    found = json.loads(l4pack("budget", "llama-4-scout", "--recipe", "int4", "--device", "2xh200", "--json").out)
    assert (found["device"], found["context"]) == ("2xh200", 32_768)
    shown = json.loads(l4pack("config", "--json").out)
    rows = {(row["command"], row["option"]): row for row in shown["defaults"]}
    assert rows["budget show", "--context"]["from"] == "L4PACK_CONTEXT"
    assert rows["budget show", "--device"]["value"] == "h200"
    assert ("plan", "--context") not in rows
    assert "L4PACK_CONTEXT" in l4pack("config").out


def test_a_key_that_no_command_takes_is_named(l4pack, own):
    own('max-rams = "3GB"\n[quantise]\nseed = 1\n')
    ended = l4pack("config")
    assert [line.rpartition("takes ")[2] for line in ended.err.splitlines()] == ["'max-rams'", "'quantise'"]
    own('max-ram = "3GB"\n[budget.show]\ndevice = "h200"\n')
    assert l4pack("config").err == ""


def test_no_default_is_said_as_that(l4pack, own):
    own("")
    ended = l4pack("config")
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "no default of your own is set")


@pytest.mark.parametrize(
    ("text", "said"),
    [("x =", "Invalid value"), ("[plan]\nrecip = 1\n", "plan has no option 'recip'"), ("\udcff", "can't decode")],
)
def test_a_configuration_that_is_none(l4pack, own, tmp_path, text, said):
    own("")
    (tmp_path / "config.toml").write_bytes(text.encode(errors="surrogateescape"))
    from l4pack.cli import shared

    shared.read_config.cache_clear()
    ended = l4pack("plan", "demo")
    assert ended.code == 2
    assert said in ended.err.splitlines()[0]
    assert ended.err.splitlines()[1].startswith("hint: mend it") or "did you mean recipe" in ended.err


@pytest.mark.parametrize(("typed", "offered"), [("l4pack qu", "quantize"), ("l4pack plan --rec", "--recipe")])
def test_a_shell_completes(typed, offered):
    count = len(typed.split()) - 1
    given = {**os.environ, "_L4PACK_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(count)}
    ended = subprocess.run([sys.executable, "-m", "l4pack"], env=given, capture_output=True, text=True, check=False)
    assert ended.stdout.split() == [offered]


def test_help_shows_no_type_of_a_flag(l4pack):
    lines = l4pack("verify", "--help").out.splitlines()
    flags = [line for line in lines if any(name in line for name in ("--strict", "--headers-only", "--quiet"))]
    assert len(flags) >= 3
    assert "bool" not in "".join(lines).lower()
    for command in ([], ["budget"], ["budget", "check"]):
        assert "<bool>" not in l4pack(*command, "--help").out.lower()


def test_a_variable_of_no_option_is_said(l4pack, monkeypatch):
    monkeypatch.setenv("L4PACK_MAX_RAMM", "8GB")
    monkeypatch.setenv("L4PACK_CACHE", "/tmp")
    assert l4pack("config").err == "warning: L4PACK_MAX_RAMM: no command takes such an option\n"


def test_what_is_there_to_be_copied_is_not_cut_by_a_narrow_terminal(l4pack, monkeypatch, capsys):
    """A line's end within a command would end the command; the bar is as wide as there is room."""
    monkeypatch.setattr(console, "PIPED_WIDTH", 50)
    long = " ".join(["l4pack", *("--option value" for _ in range(9))])
    console.show(Text(long, no_wrap=True), f"next: {long}")
    assert capsys.readouterr().out.splitlines() == [long, f"next: {long}"]
    ended = l4pack("budget", "scout-int4-1xh100").out.splitlines()
    assert sum("█" in line and "weights" not in line for line in ended) == 1
    assert any(line.startswith("  vllm serve") and len(line) > 50 for line in ended)


def test_messages_name_no_file_that_only_a_checkout_has():
    modules = Path(console.__file__).parents[1].rglob("*.py")
    assert not [path for path in modules if "see docs/" in path.read_text(encoding="utf-8")]
