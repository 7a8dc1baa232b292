"""Text as people have it: every kind of file and row, what is taken of it, what is left, and what is refused."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import shutil
import sys

import pytest

from l4pack import demo
from l4pack.checkpoint.open import open_source
from l4pack.errors import SourceError, UsageError
from l4pack.evaluate.tasks import continuation, load_task
from l4pack.text import json_rows, passages, sequences
from l4pack.text.choice import TextChoice
from l4pack.text.describe import text_lines
from l4pack.text.sequences import load_text
from l4pack.text.tokenizer import load_tokenizer

BOS = "<|begin_of_text|>"
TURN = "<|header_start|>{}<|header_end|>\n\n{}<|eot|>"
ASKED = BOS + TURN.format("user", "Why?") + TURN.format("assistant", "Because.")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(open_source("demo"))


@pytest.fixture
def read(tokenizer, tmp_path):
    """Write a file and load its text."""

    def load(name, content, samples=64, length=64, seed=0):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_text(TextChoice(str(path), samples, length, seed), tokenizer, 2048)

    return load


@pytest.fixture
def said(read, tokenizer):
    """What the model would read of a file, a string a sequence."""
    return lambda name, content, **options: [
        tokenizer.decode(one.tokens) for one in read(name, content, **options).sequences
    ]


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


# How much is taken


def test_short_rows_fill_the_budget_and_each_is_its_own_sequence(read, tokenizer):
    rows = [f"Row {number}: " + "the quick brown fox jumps. " * 6 for number in range(200)]
    text = read("rows.jsonl", lines(*({"text": row} for row in rows)), samples=10, length=512)
    assert 5120 - 100 < text.record["tokens"] <= 5120
    found = [tokenizer.decode(one.tokens[1:]) for one in text.sequences]
    assert len(found) > 10
    assert set(found) <= set(rows)
    counts = text.record["rows"]
    assert counts["used"] == len(found)
    assert counts["used"] + counts["not_drawn"] == counts["read"] == 200


def test_one_long_row_does_not_crowd_out_short_ones(read):
    rows = ["short words, a few. " * 5] * 200 + ["a long row goes on. " * 400]
    text = read("rows.jsonl", lines(*({"text": row} for row in rows)), samples=16, length=512)
    assert text.record["rows"]["used"] > 50


def test_all_is_kept_where_it_fits_rests_of_documents_too(read, tokenizer):
    words = "It was a bright cold day in April. " * 30
    text = read("plain.txt", words, samples=1000)
    assert tokenizer.decode([token for one in text.sequences for token in one.tokens[1:]]) == words
    assert [len(one.tokens) for one in text.sequences[:-1]] == [64] * (len(text.sequences) - 1)
    assert 2 <= len(text.sequences[-1].tokens) < 64
    assert text.record["tokens_left"] == 0


def test_of_long_text_whole_windows_are_drawn_and_the_budget_is_exact(read, tokenizer):
    """The draw of earlier versions, so that their figures hold."""
    text = load_text(TextChoice("demo-calibration", 32), tokenizer, 2048)
    assert text.record["tokens_sha256"] == "dc5412bce4cb48579e6aaab10df215ac3130b44234b88d85fcd378d46a727fdd"
    text = load_text(TextChoice("demo", 4), tokenizer, 2048)
    assert text.record["tokens_sha256"] == "25cd15513b79b3a9c91de75248b81bff9c9393b41c39f185e2f7d49fac32045a"
    assert text.record["tokens"] == 4 * 2048


def test_the_seed_decides_and_nothing_else(read):
    rows = lines(*({"text": f"row number {number} of many"} for number in range(300)))
    first, again, other = (read("rows.jsonl", rows, 4, 64, seed) for seed in (1, 1, 2))
    assert first.sequences == again.sequences
    assert first.sequences != other.sequences


def test_a_large_text_is_looked_at_in_part_and_it_is_said(read, monkeypatch):
    monkeypatch.setattr(sequences, "LEAST_LOOKED_AT", 2000)
    rows = lines(*({"text": f"row number {number} of many more than are needed"} for number in range(5000)))
    text = read("rows.jsonl", rows, samples=1, length=64)
    assert 0 < text.record["rows"]["read"] < 5000
    assert text.record["read_to_end"] is False
    assert "what comes after the first part" in text_lines(text.record)[1]


def test_long_text_is_tokenized_in_pieces_to_the_same_tokens(read, tokenizer, monkeypatch):
    monkeypatch.setattr(passages, "PIECE", 5000)
    for words in (demo.heldout_path().read_text(), demo.heldout_path().read_text().replace("\n", "\r\n")):
        whole = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        parts = list(passages.pieces(io.StringIO(words, newline="")))
        assert len(parts) > 10
        assert "".join(parts) == words
        assert [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]] == whole
        text = read("row.jsonl", lines({"text": words}), samples=10**4)
        assert [token for one in text.sequences for token in one.tokens[1:]] == whole
        assert text.record["rows"]["used"] == 1


def test_what_was_left_is_said(read):
    rows = [{"text": "words"}, {"text": " "}, {"messages": []}, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "what is it"}]}]}]  # fmt: skip
    text = read("rows.jsonl", lines(*rows))
    assert text.record["rows"] == {
        "read": 4, "used": 1, "used_in_part": 0, "not_drawn": 0, "empty": 2, "with_images": 1,
    }  # fmt: skip
    assert text_lines(text.record)[1] == "left: 2 rows empty; 1 row with images in no file, or sound"


# What is understood


CHATS = {
    "messages": {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                           {"role": "assistant", "content": "Because."}]},
    "sharegpt": {"id": 7, "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    "list": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
    "alpaca": {"instruction": "Why?", "input": "", "output": "Because.", "text": "### Instruction: Why?"},
    "prompt and completion": {"prompt": "Why?", "completion": "Because."},
    "prompt and response": {"prompt": "Why?", "response": "Because.", "source": None},
    "messages in prompt and completion": {"prompt": [{"role": "user", "content": "Why?"}],
                                          "completion": [{"role": "assistant", "content": "Because."}]},
    "input and output": {"input": "Why?", "output": "Because."},
    "question and answer": {"question": "Why?", "answer": "Because."},
    "chosen": {"prompt": "Why?", "chosen": "Because.", "rejected": "Go away."},
    "chosen messages": {"chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
                        "rejected": []},
}  # fmt: skip


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
def test_rows_that_are_conversations(said, row):
    assert said("rows.jsonl", lines(row, row)) == [ASKED] * 2
    assert said("rows.txt", lines(row)) == [ASKED]
    assert said("rows.json", json.dumps([row, row], indent=2)) == [ASKED] * 2


def test_systems_inputs_and_tools(said):
    row = {"system_prompt": "Be kind.", "instruction": "Add.", "input": "1 2", "output": "3"}
    turns = TURN.format("system", "Be kind."), TURN.format("user", "Add.\n\n1 2"), TURN.format("assistant", "3")
    assert said("rows.ndjson", lines(row)) == [BOS + "".join(turns)]
    row = {"conversations": [{"from": "observation", "value": "42"}, {"from": "function_call", "value": "f()"}]}
    assert said("rows.JSONL", lines(row)) == [BOS + TURN.format("tool", "42") + TURN.format("assistant", "f()")]


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "a.jsonl": lines({"text": "one\u2028two\u2029three\u0085four"}, {"text": "five"}),
        "b.jsonl": b"\xef\xbb\xbf" + lines({"text": "one\u2028two\u2029three\u0085four"}, {"text": "five"}).encode(),
        "c.json": json.dumps({"data": [{"text": "one\u2028two\u2029three\u0085four"}, {"text": "five"}]}),
        "d.json": json.dumps({"rows": [{"row": {"text": "one\u2028two\u2029three\u0085four"}}, {"row": {"text": "five"}}]}),
        "e.json": json.dumps(["one\u2028two\u2029three\u0085four", "five"]),
        "f.jsonl": lines({"text": "one\u2028two\u2029three\u0085four"}, {"text": "five"}).replace("\n", "\r\n\r\n"),
        "g.json": json.dumps({"text": "one\u2028two\u2029three\u0085four"}, indent=1) + '\n{\n"text": "five"}',
        "h.csv": "id,text\r\n1,one\u2028two\u2029three\u0085four\r\n\r\n2,five\r\n",
        "i.csv": "\ufefftext;label\none\u2028two\u2029three\u0085four;0\nfive;1",
        "j.tsv": "text\tid\none\u2028two\u2029three\u0085four\t1\nfive\t2\n",
        "k.jsonl.gz": gzip.compress(lines({"text": "one\u2028two\u2029three\u0085four"}, {"text": "five"}).encode(), mtime=0),
        "l.jsonl": lines({"text": "one\u2028two\u2029three\u0085four"}, {"text": "five"}).encode("utf-16"),
        "m.txt": lines({"content": "one\u2028two\u2029three\u0085four"}, {"content": "five"}),
    }.items(),
)  # fmt: skip
def test_lines_end_where_they_end(said, name, content):
    assert said(name, content) == [BOS + "one\u2028two\u2029three\u0085four", BOS + "five"]


def test_tables_hold_commas_quotes_and_lines(said):
    table = io.StringIO()
    rows = [("instruction", "input", "output"), ('Say "a, b"', "x\ny", "a, b")]
    csv.writer(table).writerows(rows)
    turns = TURN.format("user", 'Say "a, b"\n\nx\ny'), TURN.format("assistant", "a, b")
    assert said("rows.csv", table.getvalue()) == [BOS + "".join(turns)]
    assert said("rows.txt", table.getvalue()) == [BOS + "".join(turns)]
    table = io.StringIO()
    csv.writer(table).writerows([["messages"], [json.dumps(CHATS["messages"]["messages"])]])
    assert said("rows.csv", table.getvalue()) == [ASKED]


@pytest.mark.parametrize("words", ["[[Link]] is a page.", "[1] A note.", "{curly} words", '"Quoted," he said.', "a,b"])
def test_words_that_begin_with_a_mark(said, words):
    assert said("words.txt", words) == [BOS + words]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(said, encoding):
    assert said("words.txt", "Füße tragen uns.".encode(encoding)) == [BOS + "Füße tragen uns."]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.feather"])
def test_columns(read, tokenizer, tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = pyarrow.table({"id": [1, 2], "messages": [CHATS["messages"]["messages"]] * 2, "image": [None, b"x"]})
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(table, path)
    else:
        with (ipc.new_stream if name.endswith("arrow") else ipc.new_file)(path, table.schema) as writer:
            writer.write_table(table)
    text = load_text(TextChoice(str(path), 8, 64), tokenizer, 2048)
    assert [tokenizer.decode(one.tokens) for one in text.sequences] == [ASKED]
    assert text.record["rows"]["with_images"] == 1
    assert text.record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_that_datasets_saved(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    table = pyarrow.table({"text": ["words"]})
    with pyarrow.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    text = load_text(TextChoice(str(tmp_path), 8, 64), tokenizer, 2048)
    assert [tokenizer.decode(one.tokens) for one in text.sequences] == [BOS + "words"]


def test_columns_need_pyarrow(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="needs pyarrow") as caught:
        read("rows.parquet", b"PAR1")
    assert "l4pack[eval]" in caught.value.hint


def test_a_folder_is_read_in_order_and_what_is_left_is_listed(tokenizer, tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub").mkdir()
    for name in (".git/c.txt", ".hidden.txt", "b.md", "sub/a.TXT", "photo.png", "a.pdf"):
        (tmp_path / name).write_text(f"words of {name}")
    (tmp_path / "a.jsonl").write_text(lines({"text": "rows"}))
    text = load_text(TextChoice(str(tmp_path), 64, 64), tokenizer, 2048)
    found = [tokenizer.decode(one.tokens[1:]) for one in text.sequences]
    assert found == ["rows", "words of b.md", "words of sub/a.TXT"]
    assert text.record["files"] == {
        "read": 3, "left": 4, "left_names": [".git/c.txt", ".hidden.txt", "a.pdf", "photo.png"],
    }  # fmt: skip
    assert "4 files (.git/c.txt, .hidden.txt, a.pdf, photo.png)" in text_lines(text.record)[1]


@pytest.mark.parametrize("opening", ['{"text": "', '["', '{"data": ["'])
def test_a_row_without_end_is_not_read_to_its_end(read, monkeypatch, opening):
    monkeypatch.setattr(json_rows, "MAX_ROW", 1 << 17)
    with pytest.raises(UsageError, match=r"line 1: one value of more than 131,072 characters"):
        read("rows.json", opening + "words " * 100_000)


# Beginning of text


@pytest.mark.parametrize(
    "row",
    [{"text": BOS + "words"}, {"text": BOS + BOS + "words"}, {"text": "words"}, {"text": BOS + "words" + BOS}],
)
def test_one_beginning_of_text(said, row):
    assert said("rows.jsonl", lines(row)) == [BOS + "words"]
    assert said("words.txt", row["text"]) == [BOS + "words"]


def test_a_beginning_of_text_within_begins_another_document(said):
    assert said("words.txt", f"{BOS}one{BOS}two") == [BOS + "one", BOS + "two"]


def test_a_template_that_begins_no_text(said, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "\ufeff{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert said("rows.jsonl", lines(CHATS["sharegpt"])) == [BOS + "Why?Because."]


def test_named_templates_and_none(said, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", {"default": "d {{ messages[0].content }}", "tool_use": "t"})
    assert said("rows.jsonl", lines(CHATS["alpaca"])) == [BOS + "d Why?"]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match=r"rows.jsonl, line 1: a conversation, and the tokenizer has no chat template"):
        said("rows.jsonl", lines(CHATS["alpaca"]))


@pytest.mark.parametrize("template", ["{{ raise_exception('') }}", "{{ messages[9].content.x }}", "{% if %}"])
def test_a_template_that_fails(said, tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UsageError, match="line 1: the chat template refuses it"):
        said("rows.jsonl", lines(CHATS["alpaca"]))


def test_a_template_in_the_processors_own_file(tmp_path):
    for path in demo.model_path().iterdir():
        if not path.name.startswith("chat_template"):
            shutil.copyfile(path, tmp_path / path.name)
    assert not load_tokenizer(open_source(str(tmp_path))).chat_template
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(open_source(str(tmp_path))).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(SourceError, match="holds no chat template"):
        load_tokenizer(open_source(str(tmp_path)))


# What is refused


REFUSED = {
    "a number": ("a.jsonl", '{"text": 5}', "line 1: 'text' is a number"),
    "a null": ("a.jsonl", '{"text": "a"}\n\n{"text": null}', "line 3: 'text' is null"),
    "an object as text": ("a.json", '[{"instruction": "a", "output": {"b": 1}}]', "row 1: 'output' is an object"),
    "unknown keys": ("a.jsonl", '{"foo": 1, "bar": "x"}', "line 1: the keys are foo, bar; none is understood"),
    "a question alone": ("a.jsonl", '{"prompt": "x"}', "the keys are prompt"),
    "a bare number": ("a.jsonl", "[1, 2]", "row 1: a row is a number"),
    "a message": ("a.jsonl", '{"role": "user", "content": "x"}', "one message of a conversation"),
    "a strange role": ("a.jsonl", '{"messages": [{"role": "wizard", "content": "x"}]}', "the role wizard"),
    "a content that is a number": ("a.jsonl", '{"messages": [{"role": "user", "content": 1}]}', "content is a number"),
    "a strange part": ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "x"}]}]}', "a part of type x"),
    "two splits": ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "the keys train, test"),
    "columns in JSON": ("a.json", '{"text": ["a", "b"]}', "'text' is a list"),
    "Python in braces": ("a.txt", "{'text': 'a'}\n{'text': 'b'}", "line 1: not JSON"),
    "JSON cut short": ("a.json", '[{"text": "a"}, {"te', "ends too early"),
    "JSON without a comma": ("a.json", '[{"text": "a"} {"text": "a"}]', "no comma"),
    "a second line that is none": ("a.txt", '{"text": "a"}\nwords', "line 2: not JSON"),
    "JSON and more": ("a.json", '[{"text": "a"}] words', "something follows"),
    "words in a JSON file": ("a.json", "just words", "line 1: not JSON"),
    "JSON after a title": ("a.txt", 'Rows\n{"text": "a"}\n{"text": "b"}', "holds objects, but begins with something"),
    "brackets without end": ("a.jsonl", "[" * 100_000, "nested too deeply"),
    "objects without end": ("a.jsonl", '{"text":' * 100_000, "nested too deeply"),
    "a number without end": ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "not JSON"),
    "half a surrogate": ("a.jsonl", '{"text": "a \\ud800 b"}', "line 1: holds half a surrogate pair"),
    "NUL in a row": ("a.jsonl", '{"text": "a \\u0000 b"}', "line 1: holds a NUL"),
    "NUL late in a text": ("a.txt", b"a" * 70_000 + b"\0", "holds a NUL"),
    "UTF-16 unmarked": ("a.txt", "words".encode("utf-16-le"), "binary, or UTF-16 without"),
    "Latin-1": ("a.txt", b"caf\xe9 " * 9, "is not UTF-8 text (byte 0xe9)"),
    "Latin-1 late": ("a.jsonl", b'{"text": "' + b"a" * 100_000 + b'\xe9"}', "is not UTF-8 text (byte 0xe9)"),
    "half of UTF-16": ("a.txt", "words".encode("utf-16")[:-1], "is not UTF-16"),
    "HTML": ("a.txt", "<!DOCTYPE html><p>words", "is HTML or XML"),
    "XML": ("a.txt", '<?xml version="1.0"?><a/>', "is HTML or XML"),
    "YAML": ("a.yaml", "- text: a", "is YAML"),
    "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd....", "compressed with zstd"),
    "a PDF": ("a.txt", b"%PDF-1.4", "is a PDF"),
    "ZIP": ("a.txt", b"PK\x03\x04", "is a ZIP"),
    "an LFS pointer": ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer"),
    "damaged gzip": ("a.gz", b"\x1f\x8bwords", "does not unpack"),
    "gzip cut short": ("a.txt.gz", gzip.compress(bytes(range(65, 91)) * 9999, mtime=0)[:-20], "does not unpack"),
    "damaged Parquet": ("a.parquet", b"PAR1 words", "can't be read"),
    "Parquet that is none": ("a.parquet", b"words", "is no parquet file"),
    "Arrow that is none": ("a.arrow", b"ARROW1 words", "can't be read"),
    "strange columns": ("a.csv", "a,b\n1,2", "the columns are a, b"),
    "two columns of one name": ("a.csv", "text,text\n1,2", "two columns of one name"),
    "a row too short": ("a.csv", "text,id\nwords", "line 2: 1 fields, the header has 2"),
    "quotes without end": ("a.csv", 'text,id\n"words,1\n', "line 2: not CSV"),
    "nothing": ("a.txt", " \n", "holds no text"),
    "no rows": ("a.jsonl", "", "holds no text"),
    "no rows in a table": ("a.csv", "", "holds no text"),
    "images alone": ("a.jsonl", '{"images": ["x.png"], "text": "a"}', "no row that is read: 1 of 1"),
    "image tokens": ("a.txt", "see <|image|> there", "no row that is read: 1 of 1"),
    "LLaVA": ("a.json", '[{"conversations": [{"from": "human", "value": "<image> what?"}]}]', "no row that is read"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_where(read, name, content, message):
    with pytest.raises(UsageError) as caught:
        read(name, content)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("source", ["", "x" * 5000, "a\0b", "/dev/null", "/no/such/file"])
def test_names_that_are_no_text(tokenizer, source):
    with pytest.raises(UsageError):
        load_text(TextChoice(source), tokenizer, 2048)


# Questions


QUESTION = {"context": "one\u2028two", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    "content",
    [lines(QUESTION, QUESTION).encode(), b"\xef\xbb\xbf" + lines(QUESTION, QUESTION).encode(),
     json.dumps([QUESTION, QUESTION]).encode(), gzip.compress(lines(QUESTION, QUESTION).encode(), mtime=0)],
)  # fmt: skip
def test_questions(tmp_path, content):
    path = tmp_path / "some.JSONL"
    path.write_bytes(content)
    assert [question.context for question in load_task(path).questions] == ["one\u2028two"] * 2


@pytest.mark.parametrize("change", [{"answer": True}, {"context": "a \ud800"}, {"choices": ["a", "<|image|>"]}])
def test_questions_that_are_refused(tmp_path, change):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(QUESTION | change))
    with pytest.raises(UsageError, match="line 1"):
        load_task(path)


def test_a_question_has_one_beginning_of_text(tokenizer):
    plain, marked = (continuation(tokenizer, start + "one", " two", 99) for start in ("", BOS))
    assert plain == marked


# Commands


def test_a_dry_run_reads_the_text(l4pack, tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines({"text": "some words"}, {"text": ""}, {"images": ["a"], "text": "b"}))
    command = ["quantize", "demo", "--recipe", "int4", "--out", tmp_path / "out", "--dry-run", "--calibration"]
    ended = l4pack(*command, tmp_path / "rows.jsonl")
    assert ended.code == 0, ended.err
    assert "of 1 of 3 rows" in ended.out
    assert "left: 1 row empty; 1 row with images in no file, or sound" in ended.out
    found = json.loads(l4pack(*command, tmp_path / "rows.jsonl", "--json").out)["calibration"]
    assert found["tokens"] == found["text"]["tokens"]
    assert found["text"]["rows"]["read"] == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [("quantize", "demo", "--out", "OUT", "--dry-run"), ("quantize", "llama-4-scout", "--out", "OUT", "--dry-run"),
     ("measure", "demo", "--out", "OUT", "--dry-run"), ("evaluate", "demo"), ("coverage", "demo"),
     ("build", "demo", "--recipe", "int4-rtn", "--out", "OUT")],
)  # fmt: skip
def test_commands_refuse_a_text_before_they_begin(l4pack, tmp_path, command):
    out = tmp_path / "out"
    arguments = [out if part == "OUT" else part for part in command]
    if command[0] == "evaluate":
        arguments[1] = demo.model_path()
    option = "--calibration" if command[0] in ("quantize", "coverage") else "--text"
    missing = l4pack(*arguments, option, tmp_path / "none.txt")
    assert missing.code == 2, missing.err
    assert "there is no text" in missing.err
    if "llama-4-scout" not in command:
        (tmp_path / "bad.jsonl").write_text('{"foo": 1}')
        ended = l4pack(*arguments, option, tmp_path / "bad.jsonl")
        assert ended.code == 2, ended.err
        assert "line 1: the keys are foo" in ended.err
    assert not out.exists()
