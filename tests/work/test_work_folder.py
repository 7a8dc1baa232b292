"""A job's folder: its own by a mark, held by one process, never reached through a link."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import pytest

from l4pack.errors import L4packError, UsageError
from l4pack.work.folder import LOCK_NAME, check_writable, claim, is_marked, keep_apart, owned, remove_all

TAKE_AND_REMOVE = """
import sys
from pathlib import Path
from l4pack.errors import L4packError
from l4pack.work.folder import owned
done = 0
while done < 60:
    try:
        with owned(Path(sys.argv[1]), "test") as folder:
            (folder.path / "mine").write_text("x")
            assert sorted(path.name for path in folder.path.iterdir()) == [".l4pack-test", "lock", "mine"]
            folder.remove()
            done += 1
    except L4packError as error:
        assert "another run is working" in error.message, error.message
"""


def test_a_folder_is_made_marked_and_removed(tmp_path):
    work = tmp_path / "deep" / "work"
    with owned(work, "test") as folder:
        assert is_marked(work, "test")
        (work / "data").write_text("x")
        (work / "more").mkdir()
        (work / "more" / "data").write_text("x")
        folder.clear(keep={"more"})
        assert {path.name for path in work.iterdir()} == {".l4pack-test", LOCK_NAME, "more"}
        folder.remove()
    assert not work.exists()


@pytest.mark.parametrize("inside", ["file", "folder", "mark of another kind", "linked mark"])
def test_a_folder_that_is_not_marked_is_left_as_it_is(tmp_path, inside):
    work = tmp_path / "work"
    work.mkdir()
    if inside == "mark of another kind":
        claim(work, "other")
    elif inside == "linked mark":
        (tmp_path / "precious").write_text("x")
        (work / ".l4pack-test").symlink_to(tmp_path / "precious")
    else:
        (work / inside).mkdir() if inside == "folder" else (work / inside).write_text("x")
    before = sorted(path.name for path in work.iterdir())
    with pytest.raises(UsageError, match="is not l4pack's"), owned(work, "test", restart=True):
        pass
    assert sorted(path.name for path in work.iterdir()) == before


@pytest.mark.parametrize("kind", ["link to a folder", "dangling link", "file"])
def test_what_is_no_folder_is_refused(tmp_path, kind):
    work = tmp_path / "work"
    if kind == "file":
        work.write_text("x")
    else:
        (tmp_path / "target").mkdir() if kind == "link to a folder" else None
        work.symlink_to(tmp_path / "target")
    with pytest.raises(UsageError, match="is not l4pack's"), owned(work, "test"):
        pass


def test_an_empty_folder_and_one_with_marked_folders_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    claim(tmp_path / "empty", "test")
    claim(tmp_path / "work" / "fetched", "fetched")
    with owned(tmp_path / "work", "test", restart=True, keep={"fetched"}):
        assert is_marked(tmp_path / "work" / "fetched", "fetched")


@pytest.mark.parametrize("kind", ["symbolic", "to a folder", "hard"])
def test_links_in_a_folder_are_refused_and_cleared_without_harm(tmp_path, kind):
    work, source = tmp_path / "work", tmp_path / "source"
    source.mkdir()
    (source / "shard").write_text("precious")
    claim(work, "test")
    (work / "artifact").mkdir()
    if kind == "hard":
        (work / "artifact" / "shard").hardlink_to(source / "shard")
    elif kind == "symbolic":
        (work / "artifact" / "shard").symlink_to(source / "shard")
    else:
        (work / "artifact" / "shard").symlink_to(source, target_is_directory=True)
    with pytest.raises(UsageError, match="shard is a link"), owned(work, "test"):
        pass
    with owned(work, "test", restart=True) as folder:
        folder.remove()
    assert (source / "shard").read_text() == "precious"


def test_a_linked_lock_is_not_followed(tmp_path):
    claim(tmp_path / "work", "test")
    (tmp_path / "precious").write_text("x")
    (tmp_path / "work" / LOCK_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), owned(tmp_path / "work", "test"):
        pass
    assert (tmp_path / "precious").read_text() == "x"


def test_a_folder_is_held_once_and_let_go(tmp_path):
    work = tmp_path / "work"
    with owned(work, "test"), pytest.raises(L4packError, match="another run is working"), owned(work, "test"):
        pass
    with owned(work, "test"):
        pass


def test_a_lock_that_was_removed_and_made_anew_is_not_held(tmp_path, monkeypatch):
    """Whoever waited for the lock of a folder that its holder removed must not work beside the next one."""
    work = tmp_path / "work"
    claim(work, "test")
    opened, opens = os.open, []

    def open_and_lose(path, *arguments, **options):
        descriptor = opened(path, *arguments, **options)
        if str(path).endswith(LOCK_NAME) and not opens:
            opens.append(path)
            path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose)
    with owned(work, "test"), pytest.raises(L4packError, match="another run"), owned(work, "test"):
        pass


def test_processes_that_take_and_remove_one_folder_never_meet(tmp_path):
    command = [sys.executable, "-c", TAKE_AND_REMOVE, str(tmp_path / "work")]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for run in runs:
        _, err = run.communicate(timeout=60)
        assert run.returncode == 0, err
    assert not (tmp_path / "work").exists()


def test_threads_of_one_process_are_told_apart(tmp_path):
    found = []

    def other():
        try:
            with owned(tmp_path / "work", "test"):
                found.append("held twice")
        except L4packError as error:
            found.append(error.message)

    with owned(tmp_path / "work", "test"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [f"another run is working in {tmp_path / 'work'}"]


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_all([tmp_path / "link", tmp_path / "absent"])
    assert (tmp_path / "kept").is_dir()
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("source", "target", "apart"),
    [
        ("a", "b", True),
        ("a", "a", False),
        ("a", "a/new", False),
        ("a", "a/deep/new", False),
        ("a/deep", "a", False),
        ("a/deep/file", "a", False),
        ("link", "a/new", False),
        ("a", "link/new", False),
        ("a", "link", False),
        ("a/linked-file", "b", False),
        ("a", "a-sibling", True),
        ("absent", "a", True),
    ],
)
def test_what_is_read_lies_apart_from_what_is_written(tmp_path, source, target, apart):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "deep" / "file").write_text("x")
    (tmp_path / "b" / "file").write_text("x")
    (tmp_path / "a" / "linked-file").symlink_to(tmp_path / "b" / "file")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    if apart:
        keep_apart([tmp_path / source], [tmp_path / target])
    else:
        with pytest.raises(UsageError, match="which is written"):
            keep_apart([tmp_path / source], [tmp_path / target])


def test_a_folder_that_takes_no_file_is_noticed(tmp_path, monkeypatch):
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        check_writable(tmp_path)
    assert caught.value.filename == str(tmp_path)
