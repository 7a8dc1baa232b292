"""The command line: help with examples, one JSON object and nothing else, quiet in pipes, one line for every error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from command_line import CODES, commands

from l4pack import __version__, errors
from l4pack.cli import console
from l4pack.units import human_bytes, human_gib, human_seconds, parse_size


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "l4pack", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.mark.parametrize("words", sorted(commands()))
def test_every_command_shows_an_example(l4pack, words):
    ended = l4pack(*words.split(), "--help")
    assert ended.code == 0
    assert "Example" in ended.out
    assert f"l4pack {words.split()[0]}" in ended.out
    assert ended.err == ""


@pytest.mark.parametrize("words", sorted(commands()))
def test_every_option_is_explained(words):
    for parameter in commands()[words].params:
        assert parameter.name == "help" or getattr(parameter, "help", None), parameter.name


def test_the_version(l4pack):
    assert l4pack("--version").out == f"l4pack {__version__}\n"


def test_without_arguments_there_is_help(l4pack):
    assert "Usage" in l4pack().out + l4pack().err


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_two_names(l4pack, option):
    assert "quantize" in l4pack(option).out


JSON = {
    "inspect": (["inspect", "SOURCE"], {"architecture", "parameters", "tensors", "weight_bytes", "roles", "licence_files"}),
    "plan": (["plan", "SOURCE", "-r", "int4-rtn"], {"artifact_bytes", "peak_ram_bytes", "peak_vram_bytes", "disk_bytes", "files"}),
    "plan of a known model": (["plan", "llama-4-scout", "-r", "fp8"], {"artifact_bytes", "classes", "warnings"}),
    "quantize": (["quantize", "SOURCE", "-r", "int4-rtn", "--out", "OUT"], {"artifact_bytes", "out", "seconds", "already_done"}),
    "dry run": (["quantize", "SOURCE", "-r", "int4-rtn", "--out", "OUT", "--dry-run"], {"artifact_bytes"}),
    "recipes": (["recipes"], {"recipes"}),
    "one recipe": (["recipes", "int4"], {"recipes"}),
    "formats": (["formats"], {"formats"}),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "keys"), JSON.values(), ids=JSON)
def test_json_is_one_object_and_nothing_else(checkpoint, tmp_path, l4pack, arguments, keys):
    places = {"SOURCE": checkpoint("scout"), "OUT": tmp_path / "out"}
    ended = l4pack(*(places.get(argument, argument) for argument in arguments), "--json")
    assert ended.code == 0
    assert ended.err == ""
    value = json.loads(ended.out)
    assert keys <= set(value)
    for key, number in value.items():
        assert not key.endswith(("_bytes", "seconds")) or isinstance(number, int | float), key


TEXT = {
    "inspect": (["inspect", "SOURCE"], "Llama4ForConditionalGeneration: "),
    "plan": (["plan", "SOURCE", "-r", "fp8"], "bits a quantized weight"),
    "quantize": (["quantize", "SOURCE", "-r", "int4-rtn", "--out", "OUT"], "next: l4pack verify "),
    "recipes": (["recipes"], "scout-int4-1xh100"),
    "one recipe": (["recipes", "fp8-block"], "block_structure: [128, 128]"),
    "formats": (["formats"], "pack-quantized"),
    "one format": (["formats", "float-quantized"], "F8_E4M3"),
}


@pytest.mark.parametrize(("arguments", "says"), TEXT.values(), ids=TEXT)
def test_results_for_people_go_to_stdout_and_talk_stays_away_from_pipes(checkpoint, tmp_path, l4pack, arguments, says):
    places = {"SOURCE": checkpoint("scout"), "OUT": tmp_path / "out"}
    ended = l4pack(*(places.get(argument, argument) for argument in arguments))
    assert (ended.code, ended.err) == (0, "")
    assert says in ended.out
    assert "\x1b" not in ended.out


UNKNOWN = {
    "recipe": (["plan", "llama-4-scout", "-r", "int-4"], 2, "did you mean"),
    "recipe to explain": (["recipes", "fp9"], 2, "did you mean fp8"),
    "format": (["formats", "gguf"], 2, "formats: float-quantized, "),
    "source": (["inspect", "llama-4-scuot"], 4, "known by name: llama-4-scout, llama-4-maverick, demo"),
}


@pytest.mark.parametrize(("arguments", "code", "hint"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_name_gets_a_hint(l4pack, arguments, code, hint):
    ended = l4pack(*arguments)
    assert ended.code == code
    assert ended.err.splitlines()[1].startswith("hint: ")
    assert hint in ended.err.splitlines()[1]


@pytest.mark.parametrize(
    "arguments", [["quantise"], ["plan"], ["plan", "x", "--nonsense"], ["quantize", "x"], ["--bogus"]]
)
def test_usage_errors_end_with_2(l4pack, arguments):
    ended = l4pack(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    error, hint = ended.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: see l4pack ")


def test_a_stop_before_a_command_has_begun(l4pack, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("l4pack.cli.app.app", interrupted)
    ended = l4pack("plan", "demo")
    assert ended.code == 130
    assert ended.err.splitlines() == ["error: interrupted", "hint: run the same command again"]


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_one_line_a_hint_and_its_code(l4pack, monkeypatch, kind):
    def fail(*_, **__):
        raise kind("something\nwith a line break \x1b[31m", hint="do\tthat")

    monkeypatch.setattr("l4pack.checkpoint.open.open_source", fail)
    ended = l4pack("inspect", "x")
    assert ended.code == CODES[kind.__name__] == kind.exit_code
    assert ended.err == "error: something with a line break [31m\nhint: do that\n"


def test_the_table_of_exit_codes_is_true():
    listed = {
        words[0]: int(words[1])
        for line in (errors.__doc__ or "").splitlines()
        if len(words := line.split()) > 2 and words[1].isdigit()
    }
    assert listed == CODES == {kind.__name__: kind.exit_code for kind in KINDS}


def test_an_unforeseen_error_is_not_hidden(l4pack, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("l4pack.checkpoint.open.open_source", fail)
    with pytest.raises(ZeroDivisionError):
        l4pack("inspect", "x")


@pytest.mark.parametrize("options", [(), ("--json",), ("--help",)])
def test_a_reader_that_leaves_is_no_error(options):
    """As `head -1` does, early or late."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "l4pack", "recipes", *options],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert process.stderr == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code"), [(("inspect", "nowhere-at-all"), 4), (("inspect", "--nothing"), 2), (("budget", "int4"), 2)]
)
def test_a_script_gets_the_error_as_an_object(l4pack, arguments, code):
    ended = l4pack(*arguments, "--json")
    found = json.loads(ended.out)
    assert list(found) == ["error"]
    assert (ended.code, found["error"]["exit_code"]) == (code, code)
    assert ended.err.splitlines()[0] == f"error: {found['error']['message']}"
    assert ended.err.splitlines()[1] == f"hint: {found['error']['hint']}"


def test_no_markup_from_outside_is_obeyed(checkpoint, l4pack, tmp_path):
    folder = tmp_path / "[red]tiny[bold]"
    folder.symlink_to(checkpoint("scout"))
    ended = l4pack("inspect", folder)
    assert ended.code == 0
    assert "[red]tiny[bold]" in ended.out.replace("\n", "")
    assert console.plain("a\x1b[red]\nb") == "a \\[red] b"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1500000", 1_500_000), ("4GB", 4 * 10**9), ("1.5GiB", 1_610_612_736), (" 2 kb ", 2000), ("1TB", 10**12),
     ("0.3GB", 300_000_000), ("7B", 7), ("123456789012345678", 123456789012345678)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 G B", "-1", "1e9", "0x10", "1.5.2GB", "∞", "nan", "1_000"])
def test_what_is_no_size(text):
    with pytest.raises(errors.UsageError, match="is not a size"):
        parse_size(text)


def test_numbers_for_people():
    assert [human_bytes(n) for n in (0, 999, 1000, 64_873_104_640, 2.5e12)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "64.87 GB",
        "2.50 TB",
    ]
    assert human_gib(64_873_104_640) == "60.42 GiB"
    assert [human_seconds(s) for s in (0.25, 8, 59.4, 200, 7500)] == [
        "0.2 s",
        "8.0 s",
        "59 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
