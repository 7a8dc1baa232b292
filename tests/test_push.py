"""Packaging and pushing over real HTTP to a loopback Hub: what must be true first, what arrives, and every fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import yaml
from hub_server import Blob, HubServer, git_sha1, running_hub
from licence_texts import APACHE, LICENSE, USE_POLICY

from l4pack.artifact.upload import Action, Target
from l4pack.checkpoint.source import open_folder
from l4pack.errors import BudgetError, HubError, L4packError, LicenceError, QualityError, UsageError
from l4pack.plan import make_plan
from l4pack.publish import Wishes, check_ready, package_artifact, plan_push, push_artifact
from l4pack.recipe import load_recipe
from l4pack.run import run_plan

# huggingface_hub hands file objects to httpx in a way that httpx no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

SECRET = "hf_ThisMustNeverBeSeen"
NAME = "Llama-4-Tiny-W4A16-g128"
REPO = f"me/{NAME}"
BASE = "meta-llama/Llama-4-Tiny"
PROMISE = {"model": "llama-4-scout", "device": "h100", "context": 512}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test's own cache and token; large files travel by LFS, not Xet; nobody waits."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        server.tokens = {SECRET: {"me"}}
        server.part_bytes = 200_000
        # What HF_ENDPOINT sets when huggingface_hub is imported.
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        here = template.replace(huggingface_hub.constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", here)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(scope="session")
def source(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 4 with the texts of its licence."""
    folder = tmp_path_factory.mktemp("licensed") / "Llama-4-Tiny"
    shutil.copytree(checkpoint("scout"), folder)
    (folder / "LICENSE").write_text(LICENSE)
    (folder / "USE_POLICY.md").write_text(USE_POLICY)
    (folder / "README.md").write_text("---\nlanguage: [en, fr]\n---\n")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Llama4ImageProcessorFast"}))
    return folder


def made(source: Path, out: Path, recipe: dict[str, Any]) -> Path:
    file = out.with_name("own.yaml")
    file.write_text(yaml.safe_dump({"name": "own", "title": "Int4, rounded", "extends": "int4-rtn", **recipe}))
    run_plan(make_plan(open_folder(source), load_recipe(str(file))), out)
    return out


@pytest.fixture(scope="session")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(source, tmp_path_factory.mktemp("made") / "out", {})


@pytest.fixture
def artifact(quantized: Path, tmp_path: Path) -> Path:
    """An artifact, not packaged yet, that a test may change."""
    return Path(shutil.copytree(quantized, tmp_path / "out"))


@pytest.fixture
def packaged(artifact: Path) -> Path:
    package_artifact(artifact, None, Wishes(base_model=BASE))
    return artifact


def send(folder: Path, **options: Any):
    return push_artifact(plan_push(folder, Target(REPO, **options)))


def remote(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    files = hub.repos[REPO].files(revision)
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


def local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Packaging


def test_packaging_makes_an_artifact_ready(artifact, source):
    result = package_artifact(artifact, open_folder(source), Wishes(base_model=BASE))
    assert result.name == NAME
    assert set(result.written) == {"NOTICE", "README.md"}
    assert result.audit.ok
    card = huggingface_hub.ModelCard((artifact / "README.md").read_text())
    assert card.data.language == ["en", "fr"]
    assert "| 1 x NVIDIA H100 80 GB SXM | 1,024 tokens |" in card.text
    assert check_ready(artifact, NAME)[0].startswith("licence: Llama 4")
    assert package_artifact(artifact, open_folder(source), Wishes(base_model=BASE)).written == ()


def test_missing_licence_files_come_from_the_source(artifact, source):
    for name in ("LICENSE", "USE_POLICY.md"):
        (artifact / name).unlink()
    with pytest.raises(LicenceError, match="LICENSE is missing, and the source"):
        package_artifact(artifact, None, Wishes(base_model=BASE))
    package_artifact(artifact, open_folder(source), Wishes(base_model=BASE))
    assert (artifact / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "l4pack-manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_missing_licence_files_are_fetched_from_the_source_repository(hub, artifact):
    hub.add(BASE, {"LICENSE": LICENSE.encode(), "USE_POLICY.md": USE_POLICY.encode()})
    revision = hub.repos[BASE].refs["main"]
    hub.add(BASE, {"LICENSE": b"another one"})
    rewrite_manifest(artifact, lambda m: m["source"].update(repository=BASE, revision=revision))
    for name in ("LICENSE", "USE_POLICY.md"):
        (artifact / name).unlink()
    assert package_artifact(artifact).audit.ok
    assert (artifact / "LICENSE").read_text() == LICENSE


def test_a_licence_is_never_made_up(hub, artifact):
    hub.add(BASE, {"LICENSE": APACHE.encode()})
    rewrite_manifest(artifact, lambda m: m["source"].update(repository=BASE, revision=None))
    (artifact / "LICENSE").unlink()
    with pytest.raises(LicenceError, match=f"LICENSE is missing, and {BASE} has none that serves"):
        package_artifact(artifact)
    assert not (artifact / "LICENSE").exists()


def test_a_model_of_its_own_licence_keeps_it(artifact):
    (artifact / "LICENSE").write_text(APACHE)
    (artifact / "USE_POLICY.md").unlink()
    result = package_artifact(artifact, None, Wishes(name="tiny-int4"))
    assert (result.audit.policy.policy, result.name, result.written) == ("apache-2.0", "tiny-int4", ("README.md",))
    with pytest.raises(LicenceError, match="must begin with 'Llama'"):
        package_artifact(artifact, None, Wishes(name="tiny-int4", base_model="meta-llama/Llama-4-Scout-17B-16E"))


@pytest.mark.parametrize(
    ("wishes", "error", "message"),
    [
        (Wishes(name="My-Llama", base_model=BASE), LicenceError, "must begin with 'Llama'"),
        (Wishes(name="llama4-tiny", base_model=BASE), LicenceError, "must begin with 'Llama'"),
        (Wishes(base_model="not a repo"), UsageError, "not a repository's name"),
        (Wishes(), LicenceError, r"README\.md: the card's metadata must name the model it was made from"),
    ],
)
def test_packaging_refuses(artifact, wishes, error, message):
    with pytest.raises(error, match=message):
        package_artifact(artifact, None, wishes)


def test_packaging_needs_a_manifest(artifact):
    (artifact / "l4pack-manifest.json").write_text("[]")
    with pytest.raises(UsageError, match="no readable l4pack-manifest"):
        package_artifact(artifact)


# What must be true first


def test_what_does_not_verify_is_refused(packaged):
    shard = next(packaged.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 64
    shard.write_bytes(raw)
    with pytest.raises(L4packError, match="does not verify") as caught:
        check_ready(packaged, NAME)
    assert caught.value.exit_code == 1


def test_what_misses_a_duty_is_refused(packaged):
    (packaged / "NOTICE").unlink()
    with pytest.raises(LicenceError, match=r"NOTICE: the file is missing.*1\.b\.iii"):
        check_ready(packaged, NAME)


def test_a_repository_of_another_name_is_refused(packaged):
    with pytest.raises(LicenceError, match="must begin with 'Llama'"):
        check_ready(packaged, "My-Llama")


def promise(folder: Path, **changes: Any) -> None:
    rewrite_manifest(folder, lambda m: m["recipe"].update(promise={**PROMISE, **changes}))


def test_a_promise_that_is_kept_passes(packaged):
    promise(packaged)
    said = check_ready(packaged, NAME)
    assert any(line.startswith("budget: 512 tokens on h100 fits") for line in said)
    assert any(line == "gates: the recipe has none" for line in said)


def test_a_promise_that_is_not_kept_is_refused(packaged):
    promise(packaged, sequences=1_000_000, context=1024)
    with pytest.raises(BudgetError, match=r"promises 1,024 tokens on h100, which lacks .* GiB") as caught:
        check_ready(packaged, NAME)
    assert caught.value.exit_code == 3


MEASURED = {"kl_mean": 0.02, "kl_standard_error": 0.001, "top1_agreement": 0.95, "perplexity_reference": 10.0,
            "perplexity_artifact": 10.4, "tokens": 4096}  # fmt: skip


@pytest.mark.parametrize(
    ("gates", "missed"),
    [
        ({"max_kl": 0.02, "min_agreement": 0.95, "max_perplexity_ratio": 1.04}, None),
        ({"max_kl": 0.0199}, "KL divergence 0.02, the limit is 0.0199"),
        ({"min_agreement": 0.951}, "agreement 0.95"),
        ({"max_perplexity_ratio": 1.039}, "perplexity ratio 1.04"),
    ],
)
def test_gates(packaged, gates, missed):
    promise(packaged, gates=gates)
    with pytest.raises(QualityError, match="accuracy was not measured"):
        check_ready(packaged, NAME)
    (packaged / "accuracy.json").write_text(json.dumps(MEASURED))
    if missed is None:
        assert any(line.startswith("gates: ") and line.endswith("met") for line in check_ready(packaged, NAME))
        return
    with pytest.raises(QualityError, match=missed) as caught:
        check_ready(packaged, NAME)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("value", [float("nan"), "0.1", None])
def test_a_gate_is_not_passed_by_what_is_no_number(packaged, value):
    promise(packaged, gates={"max_kl": 0.5})
    (packaged / "accuracy.json").write_text(json.dumps({**MEASURED, "kl_mean": value}))
    with pytest.raises((QualityError, UsageError)):
        check_ready(packaged, NAME)


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


def test_a_snapshot_of_it_is_read_back(hub, packaged, tmp_path):
    send(packaged)
    back = huggingface_hub.snapshot_download(REPO, local_dir=tmp_path / "back")
    assert {n: c for n, c in local(Path(back)).items() if n != ".gitattributes"} == local(packaged)
    assert check_ready(Path(back), NAME)


def test_a_second_push_sends_nothing(hub, packaged):
    first = send(packaged)
    before = len(hub.seen)
    plan = plan_push(packaged, Target(REPO))
    assert {step.action for step in plan.steps if step.name != ".gitattributes"} == {Action.KEEP}
    assert plan.send_bytes == 0
    assert push_artifact(plan).commit == first.commit
    assert not [seen for seen in hub.seen[before:] if seen.method in ("PUT", "POST")]


def test_own_files_are_replaced_and_deleted_unasked(hub, packaged):
    (packaged / "old.safetensors").write_bytes(b"old")
    send(packaged)
    (packaged / "old.safetensors").unlink()
    (packaged / "README.md").write_text((packaged / "README.md").read_text() + "\nMore.\n")
    plan = plan_push(packaged, Target(REPO))
    assert plan.names(Action.REPLACE) == ["README.md"]
    assert plan.names(Action.DELETE) == ["old.safetensors"]
    push_artifact(plan)
    assert remote(hub) == local(packaged)


def test_what_others_put_there_is_left_alone(hub, packaged):
    send(packaged)
    files = {name: blob.content for name, blob in hub.repos[REPO].files().items()}
    hub.add(REPO, {**files, "README.md": b"by hand", "pictures/a.png": b"png", "notes.txt": b"notes"})
    with pytest.raises(HubError, match=r"holds another README\.md, which l4pack did not put there"):
        plan_push(packaged, Target(REPO))
    assert remote(hub)["README.md"] == b"by hand"
    push_artifact(plan_push(packaged, Target(REPO, overwrite=True)))
    after = remote(hub)
    assert (after.pop("pictures/a.png"), after.pop("notes.txt")) == (b"png", b"notes")
    assert after == local(packaged)


def test_a_dry_look_changes_nothing(hub, packaged):
    plan = plan_push(packaged, Target(REPO))
    assert {step.action for step in plan.steps} == {Action.ADD}
    assert (plan.exists, plan.private) == (False, True)
    assert REPO not in hub.repos
    assert {seen.method for seen in hub.seen} == {"GET"}


def test_visibility_is_never_a_surprise(hub, packaged):
    assert not plan_push(packaged, Target(REPO, public=True)).private
    send(packaged, public=True)
    assert not hub.repos[REPO].private
    with pytest.raises(HubError, match="exists and is public"):
        plan_push(packaged, Target(REPO))
    hub.repos[REPO].private = True
    with pytest.raises(HubError, match="exists and is private"):
        plan_push(packaged, Target(REPO, public=True))


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
    (packaged / "more.txt").write_text("more")
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
    (packaged / "extra.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(HubError, match="is a link that leaves"):
        plan_push(packaged, Target(REPO, overwrite=True))


def test_hidden_files_and_folders_stay_here(hub, packaged):
    (packaged / ".env").write_text("TOKEN=1")
    (packaged / "folder").mkdir()
    (packaged / "folder" / "x").write_text("x")
    send(packaged)
    assert ".env" not in remote(hub)
    assert not [name for name in remote(hub) if "/" in name]


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


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, packaged, monkeypatch):
    from hub_api import HubHandler
    from hub_server import Reply

    whole = HubHandler.commit
    lost = iter([True])

    def commit(self, *arguments):
        answer = whole(self, *arguments)
        return Reply(502) if next(lost, False) else answer

    send_first = packaged / "first.txt"
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


def test_the_commands(hub, artifact, l4pack, caplog):
    done = l4pack("package", artifact, "--base-model", BASE, "--json")
    assert (done.code, json.loads(done.out)["name"]) == (0, NAME)
    dry = l4pack("push", artifact, REPO, "--dry-run")
    assert dry.code == 0
    assert "private" in dry.out
    assert "model.safetensors" in dry.out
    assert "to send" in dry.out
    assert REPO not in hub.repos
    pushed = l4pack("push", artifact, REPO, "--json")
    assert pushed.code == 0
    record = json.loads(pushed.out)
    assert (record["private"], record["creates_repository"], record["pull_request"]) == (True, True, None)
    assert record["commit"] == hub.repos[REPO].refs["main"]
    assert {file["action"] for file in record["files"]} == {"add"}
    again = l4pack("push", artifact, REPO)
    assert "0 files sent" in again.out
    assert l4pack("licence", REPO).code == 0
    everything = "".join(end.out + end.err for end in (done, dry, pushed, again)) + caplog.text
    assert SECRET not in everything


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["push", "{folder}", "my-repo"], 2, "not a repository's name"),
        (["push", "{folder}", "me/My-Llama"], 7, "must begin with 'Llama'"),
        (["push", "{folder}", "them/Llama-4-Tiny"], 5, "has no right"),
        (["package", "{folder}", "--name", "llama4"], 7, "1.b.i"),
    ],
)
def test_the_commands_exit_codes(hub, packaged, l4pack, arguments, code, said):
    ended = l4pack(*(part.format(folder=packaged) for part in arguments))
    assert ended.code == code
    assert said in ended.err
    assert SECRET not in ended.out + ended.err


def test_the_server_names_content_as_git_does():
    """Known names: of an empty file and of 'hello' with a line break."""
    assert git_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a" == Blob(b"hello\n", False).oid
