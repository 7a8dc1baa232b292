"""Pushing over real HTTP to a loopback Hub: what arrives, what is never touched, and every fault."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_lies import everywhere
from hub_server import Blob, HubServer, git_sha1
from publishing import BASE, NAME, REPO, SECRET

from l4pack.errors import HubError, UsageError
from l4pack.publish.publish import Wishes, check_ready, package_artifact, plan_push, push_artifact
from l4pack.publish.upload import Destination, FileChange

pytest_plugins = ["publishing_fixtures"]
# huggingface_hub hands file objects to httpx in a way that httpx no longer likes.
pytestmark = [
    pytest.mark.usefixtures("own_home"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]


def send(folder: Path, **options: Any):
    return push_artifact(plan_push(folder, Destination(REPO, **options)))


def remote(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    files = hub.repos[REPO].files(revision)
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


def local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Pushing


def test_what_arrives_is_what_was_sent(hub, packaged):
    done = send(packaged)
    assert remote(hub) == local(packaged)
    assert hub.repos[REPO].private
    assert done.commit == hub.repos[REPO].refs["main"]
    assert done.files == len(local(packaged))
    assert hub.requests("/part/", "PUT")
    assert hub.requests("^/large/", "PUT") == []
    assert {seen.token for seen in hub.seen if seen.host == "storage"} == {None}


def test_a_snapshot_of_it_is_read_back_verified_and_loaded(hub, packaged, tmp_path):
    from transformers import Llama4ForConditionalGeneration

    send(packaged)
    back = Path(huggingface_hub.snapshot_download(REPO, local_dir=tmp_path / "back"))
    assert {name: content for name, content in local(back).items() if name != ".gitattributes"} == local(packaged)
    assert check_ready(back, NAME)
    _, loading = Llama4ForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_second_push_sends_nothing(hub, packaged):
    first = send(packaged)
    before = len(hub.seen)
    plan = plan_push(packaged, Destination(REPO))
    assert {step.action for step in plan.steps if step.name != ".gitattributes"} == {FileChange.KEEP}
    assert plan.send_bytes == 0
    assert push_artifact(plan).commit == first.commit
    assert not [seen for seen in hub.seen[before:] if seen.method in ("PUT", "POST")]


def test_own_files_are_replaced_and_deleted_unasked(hub, packaged):
    (packaged / "tokenizer.model").write_bytes(b"old")
    send(packaged)
    (packaged / "tokenizer.model").unlink()
    (packaged / "README.md").write_text((packaged / "README.md").read_text() + "\nMore.\n")
    plan = plan_push(packaged, Destination(REPO))
    assert plan.names(FileChange.REPLACE) == ["README.md"]
    assert plan.names(FileChange.DELETE) == ["tokenizer.model"]
    push_artifact(plan)
    assert remote(hub) == local(packaged)


def test_what_others_put_there_is_left_alone(hub, packaged):
    send(packaged)
    files = {name: blob.content for name, blob in hub.repos[REPO].files().items()}
    hub.add(REPO, {**files, "README.md": b"by hand", "pictures/a.png": b"png", "notes.txt": b"notes"})
    with pytest.raises(HubError, match=r"holds another README\.md, which l4pack did not put there"):
        plan_push(packaged, Destination(REPO))
    assert remote(hub)["README.md"] == b"by hand"
    push_artifact(plan_push(packaged, Destination(REPO, overwrite=True)))
    after = remote(hub)
    assert (after.pop("pictures/a.png"), after.pop("notes.txt")) == (b"png", b"notes")
    assert after == local(packaged)


def test_a_dry_look_changes_nothing(hub, packaged):
    plan = plan_push(packaged, Destination(REPO))
    assert {step.action for step in plan.steps} == {FileChange.ADD}
    assert (plan.exists, plan.private) == (False, True)
    assert REPO not in hub.repos
    assert {seen.method for seen in hub.seen} == {"GET"}


def test_visibility_is_never_a_surprise(hub, packaged):
    assert not plan_push(packaged, Destination(REPO, public=True)).private
    send(packaged, public=True)
    assert not hub.repos[REPO].private
    with pytest.raises(HubError, match="exists and is public"):
        plan_push(packaged, Destination(REPO))
    hub.repos[REPO].private = True
    with pytest.raises(HubError, match="exists and is private"):
        plan_push(packaged, Destination(REPO, public=True))


def test_a_collection_is_made_by_its_title_once(hub, packaged):
    for _ in range(2):
        send(packaged, collection="Scout quantized")
    assert hub.collections == {"me/scout-quantized-64f9a55bb3115b4f513ec026": [REPO]}


def test_branches_tags_and_collections(hub, packaged):
    hub.collections["me/quantized-123"] = []
    options = {"revision": "int4", "tag": "v1", "collection": "me/quantized-123"}
    done = send(packaged, **options)
    repo = hub.repos[REPO]
    assert repo.refs["int4"] == done.commit == repo.tags["v1"]
    assert remote(hub) == {}
    assert remote(hub, "int4") == local(packaged)
    assert hub.collections["me/quantized-123"] == [REPO]
    assert send(packaged, **options).commit == done.commit
    (packaged / "accuracy.json").write_text("more")
    with pytest.raises(HubError, match="tag v1 stands at another commit; the upload itself is complete"):
        send(packaged, **options)


def test_a_pull_request(hub, packaged):
    with pytest.raises(HubError, match="no such repository to open a pull request in"):
        send(packaged, pull_request=True)
    hub.repos[REPO] = repo = hub.add("other/model", {"config.json": (packaged / "config.json").read_bytes()})
    done = send(packaged, pull_request=True)
    assert done.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
    assert remote(hub, "refs/pr/1") == local(packaged)
    assert set(repo.files("main")) == {"config.json"}


def test_gating(hub, packaged):
    with pytest.raises(UsageError, match="the card has no extra_gated_prompt"):
        check_ready(packaged, NAME, gated=True)
    package_artifact(packaged, None, Wishes(base_model=BASE, gated=True))
    check_ready(packaged, NAME, gated=True)
    hub.admitted.add((SECRET, REPO))
    send(packaged, gated=True)
    assert hub.repos[REPO].gated


def test_a_link_that_leaves_the_folder_is_not_published(packaged, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (packaged / "added_tokens.json").symlink_to(tmp_path / "secret")
    with pytest.raises(HubError, match="is a link that leaves"):
        plan_push(packaged, Destination(REPO, overwrite=True))


def test_hidden_files_and_folders_stay_here(hub, packaged):
    (packaged / ".env").write_text("TOKEN=1")
    (packaged / "folder").mkdir()
    (packaged / "folder" / "x").write_text("x")
    send(packaged)
    assert ".env" not in remote(hub)
    assert not [name for name in remote(hub) if "/" in name]


def test_what_was_not_meant_to_go_stays_here(hub, licensed_source, tmp_path, l4pack):
    """Files that came into the folder later stay; those that were asked for when the artifact was made go."""
    source = Path(shutil.copytree(licensed_source, tmp_path / "Llama-4-Tiny"))
    for name in ("id_rsa", "notes.txt", "docs/how.md", "additional_chat_templates/tools.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    out = tmp_path / "out"
    asked = ("--include", "notes.txt", "--include", "docs/*")
    assert l4pack("quantize", source, "-r", "int4-rtn", "-o", out, *asked).code == 0
    package_artifact(out, None, Wishes(base_model=BASE))
    went = set(local(out)) | {"docs/how.md", "additional_chat_templates/tools.jinja"}
    for name in ("id_ed25519", "run.sh", "trainer_state.json", "wandb/log", "adapter_config.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("secret")
    plan = plan_push(out, Destination(REPO))
    assert plan.left_behind == ("adapter_config.json", "id_ed25519", "run.sh", "trainer_state.json", "wandb/")
    push_artifact(plan)
    assert set(remote(hub)) - {".gitattributes"} == went
    assert {"notes.txt", "docs/how.md"} <= went
    assert "id_rsa" not in went


# Faults


RECOVERED = {
    "rate limit": [("GET", "^/api/models/", {"status": 429, "headers": {"Retry-After": "1"}})],
    "rate limit when the batch is asked for": [("POST", "/objects/batch", {"status": 429, "times": 2})],
    "the Hub fails in between": [("POST", "/preupload/", {"status": 500}), ("POST", "/commit/", {"status": 503})],
    "storage fails": [("PUT", "^/part/", {"status": 500, "times": 2})],
    "the connection breaks in the middle of a part": [("PUT", "^/part/.*/2", {"drop_after": 1000})],
    "an address expires": [("PUT", "^/part/", {"status": 403})],
    "joining parts fails": [("POST", "complete_multipart", {"status": 504})],
    "repository creation fails": [("POST", "/repos/create", {"status": 502})],
}


@pytest.mark.parametrize("faults", RECOVERED.values(), ids=RECOVERED)
def test_faults_that_pass_are_survived(hub, packaged, faults):
    ordered = [hub.fault(method, path, **what) for method, path, what in faults]
    send(packaged)
    assert all(fault.hits == fault.times for fault in ordered)
    assert remote(hub) == local(packaged)


WHOLE = {
    "nothing": {"times": 0},
    "storage fails": {"status": 503},
    "the connection breaks in the middle": {"drop_after": 50_000},
    "the address expires": {"status": 403, "times": 2},
    "a byte changes on its way": {"corrupt": True},
}


@pytest.mark.parametrize("fault", WHOLE.values(), ids=WHOLE)
def test_files_sent_in_one_piece(hub, packaged, fault):
    hub.part_bytes = 10**9
    ordered = hub.fault("PUT", "^/large/", **fault)
    send(packaged)
    assert ordered.hits == ordered.times
    assert hub.requests("^/part/") == []
    assert remote(hub) == local(packaged)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, packaged, monkeypatch):
    from hub_api import HubHandler
    from hub_server import Reply

    whole = HubHandler.commit
    lost = iter([True])

    def commit(self, *arguments):
        answer = whole(self, *arguments)
        return Reply(502) if next(lost, False) else answer

    send_first = packaged / "accuracy.json"
    send_first.write_text("1")
    send(packaged)
    send_first.write_text("2")
    monkeypatch.setattr("hub_api.HubHandler.commit", commit)
    monkeypatch.setattr("hub_api.ROUTES", [(p, commit if a is whole else a) for p, a in __import__("hub_api").ROUTES])
    done = send(packaged)
    assert remote(hub) == local(packaged)
    assert done.commit == hub.repos[REPO].refs["main"]
    assert len(hub.repos[REPO].log) == 3


FAILED = {
    "no rights to the organisation": ([], {"tokens": {SECRET: {"them"}}}, "the token has no right"),
    "a token that is not known": ([], {"tokens": {"hf_other": {"me"}}}, "the token is not accepted"),
    "rate limit that does not end": ([("POST", "/commit/", {"status": 429, "times": 99})], {}, "too many requests"),
    "storage down": ([("PUT", "^/part/", {"status": 500, "times": 999})], {}, "the Hub answered 500"),
    "a wrong digest in storage": ([("PUT", "^/part/", {"corrupt": True})], {}, "the Hub answered 400"),
    "a wrong digest in the repository": ([("POST", "/commit/", {"corrupt": True})], {}, "arrived with another digest"),
    "somebody else commits": ([("POST", "/commit/", {"status": 412, "times": 99})], {}, "somebody else changed"),
    "the batch is refused": ([("POST", "/objects/batch", {"status": 403, "times": 99})], {}, "has no right"),
}


@pytest.mark.parametrize(("faults", "state", "message"), FAILED.values(), ids=FAILED)
def test_faults_that_stay_are_said_in_one_line(hub, packaged, faults, state, message):
    for name, value in state.items():
        setattr(hub, name, value)
    ordered = [hub.fault(method, path, **what) for method, path, what in faults]
    with pytest.raises(HubError, match=message) as caught:
        send(packaged)
    said = caught.value.message + caught.value.hint
    assert all(fault.hits for fault in ordered)
    assert "\n" not in said
    assert SECRET not in said
    assert "signature" not in said


def test_an_interrupted_push_goes_on_where_it_was(hub, packaged):
    """Nothing is visible before the commit, and nothing in storage is sent twice."""
    hub.fault("POST", "/commit/", status=500, times=99)
    with pytest.raises(HubError):
        send(packaged)
    assert remote(hub) == {}
    hub.faults.clear()
    before = len(hub.seen)
    send(packaged)
    assert [seen for seen in hub.seen[before:] if seen.method == "PUT"] == []
    assert remote(hub) == local(packaged)


# The commands


def test_the_commands(hub, unpackaged, l4pack, caplog):
    done = l4pack("package", unpackaged, "--base-model", BASE, "--json")
    assert (done.code, json.loads(done.out)["name"]) == (0, NAME)
    dry = l4pack("push", unpackaged, REPO, "--dry-run")
    assert dry.code == 0
    assert "private" in dry.out
    assert "model.safetensors" in dry.out
    assert "to send" in dry.out
    assert REPO not in hub.repos
    pushed = l4pack("push", unpackaged, REPO, "--json")
    assert pushed.code == 0
    record = json.loads(pushed.out)
    assert (record["private"], record["creates_repository"], record["pull_request"]) == (True, True, None)
    assert record["commit"] == hub.repos[REPO].refs["main"]
    assert {file["action"] for file in record["files"]} == {"add"}
    assert f"vllm serve {REPO} " in remote(hub)["README.md"].decode()
    again = l4pack("push", unpackaged, REPO)
    assert "0 files sent" in again.out
    assert l4pack("licence", REPO).code == 0
    everything = "".join(end.out + end.err for end in (done, dry, pushed, again)) + caplog.text
    assert SECRET not in everything


def test_a_dry_run_asks_who_one_is(hub, packaged, l4pack):
    """And whether one may write there, before hours of reading and sending."""
    hub.tokens[SECRET] |= {"team"}
    told = json.loads(l4pack("push", packaged, REPO, "--dry-run", "--json").out)
    assert "account: as me" in told["ready"]
    team = l4pack("push", packaged, f"team/{NAME}", "--dry-run")
    assert "account: as me, write of team" in team.out
    other = l4pack("push", packaged, f"them/{NAME}", "--dry-run")
    assert (other.code, other.err.splitlines()[0]) == (5, "error: me may not write to them")
    assert "me or team" in other.err
    hub.token_role = "fineGrained"
    assert "fine-grained" in l4pack("push", packaged, REPO, "--dry-run").out
    hub.token_role = "read"
    reading = l4pack("push", packaged, REPO, "--dry-run")
    assert (reading.code, "may only read" in reading.err) == (5, True)


def test_who_proposes_a_change_need_not_belong_to_the_owner(hub, packaged, l4pack):
    hub.add(f"them/{NAME}", {"config.json": (packaged / "config.json").read_bytes()})
    assert "account: as me" in l4pack("push", packaged, f"them/{NAME}", "--dry-run", "--pr").out
    hub.token_role = "read"
    assert l4pack("push", packaged, f"them/{NAME}", "--dry-run", "--pr").code == 5


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_without_a_token_nothing_is_begun(hub, packaged, l4pack, monkeypatch, dry):
    before = (packaged / "README.md").read_bytes()
    monkeypatch.delenv("HF_TOKEN")
    ended = l4pack("push", packaged, REPO, *dry)
    assert (ended.code, ended.err.splitlines()[0]) == (5, "error: there is no token to write with")
    assert (packaged / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["push", "{folder}", "my-repo"], 2, "not a repository's name"),
        (["push", "{folder}", "me/My-Llama"], 7, "must begin with 'Llama'"),
        (["push", "{folder}", "them/Llama-4-Tiny"], 5, "may not write to them"),
        (["package", "{folder}", "--name", "llama4"], 7, "1.b.i"),
    ],
)
def test_the_commands_exit_codes(hub, packaged, l4pack, arguments, code, said):
    ended = l4pack(*(part.format(folder=packaged) for part in arguments))
    assert ended.code == code
    assert said in ended.err
    assert SECRET not in ended.out + ended.err


@pytest.mark.parametrize("lie", ["a log-in page", "null", "204", "a bomb", "307 to itself"])
def test_pushing_to_what_is_no_hub_ends_in_one_line_and_5(hub, packaged, l4pack, lie):
    fault = hub.fault("POST", "/preupload/", times=99, raw=everywhere()[lie])
    ended = l4pack("push", packaged, REPO)
    assert (ended.code, fault.hits > 0) == (5, True)
    assert [line.partition(":")[0] for line in ended.err.splitlines()][-2:] == ["error", "hint"]
    assert SECRET not in ended.out + ended.err


@pytest.mark.parametrize("lie", ["a log-in page", "null", "less than announced"])
def test_packaging_takes_no_licence_from_what_is_no_hub(hub, unpackaged, l4pack, lie):
    manifest = json.loads((unpackaged / "l4pack-manifest.json").read_bytes())
    manifest["source"] |= {"repository": BASE, "revision": None}
    (unpackaged / "l4pack-manifest.json").write_text(json.dumps(manifest))
    for name in ("LICENSE", "USE_POLICY.md"):
        (unpackaged / name).unlink(missing_ok=True)
    fault = hub.fault("GET", "^/api/models/", times=99, raw=everywhere()[lie])
    ended = l4pack("package", unpackaged)
    assert (ended.code, fault.hits > 0) == (5, True), ended.err


def test_the_server_names_content_as_git_does():
    """Known names: of an empty file and of 'hello' with a line break."""
    assert git_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a" == Blob(b"hello\n", False).oid


def documented(guide: str) -> list[list[str]]:
    """The l4pack commands in the shell blocks of a how-to."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / guide).read_text(encoding="utf-8")
    blocks = text.split("```shell\n")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("l4pack ")]


def test_the_how_to_works_as_written(hub, unpackaged, l4pack):
    there = {"scout-int4": str(unpackaged), "my-org/Llama-4-Scout-17B-16E-Instruct-W4A16-g128-mixed": REPO}
    commands = [
        [BASE if word.startswith("meta-llama/") else word for word in line] for line in documented("publish.md")
    ]
    assert [command[0] for command in commands] == ["package", "licence", "licence", "push", "push", "licence"]
    for command in commands:
        ended = l4pack(*(there.get(word, word) for word in command))
        assert ended.code == 0, ended.err
    assert remote(hub) == local(unpackaged)


def test_the_demo_goes_out_and_comes_back(hub, l4pack, tmp_path):
    """Quantized, packaged, pushed, pulled back with plain huggingface_hub, verified against its source and loaded."""
    from transformers import Llama4ForConditionalGeneration

    out, repository = tmp_path / "demo-int4", "me/demo-W4A16-g128"
    for command in (
        ["quantize", "demo", "--recipe", "int4-rtn", "--out", out],
        ["package", out, "--source", "demo"],
        ["push", out, repository, "--tag", "v1"],
    ):
        ended = l4pack(*command)
        assert ended.code == 0, ended.err
    back = Path(huggingface_hub.snapshot_download(repository, revision="v1", local_dir=tmp_path / "back"))
    assert {name: content for name, content in local(back).items() if name != ".gitattributes"} == local(out)
    assert l4pack("verify", back, "--against", "demo").code == 0
    assert l4pack("licence", repository).code == 0
    _, loading = Llama4ForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
