"""Only one holder at a time, and the lock's file goes with it."""

import fcntl
import os
import threading

import pytest

from dist_llm.io import locks
from dist_llm.io.locks import create_exclusively, lock_file


def test_a_second_holder_is_refused_until_the_first_ends(tmp_path):
    path = tmp_path / "lock"
    with lock_file(path), pytest.raises(BlockingIOError), lock_file(path, wait=False):
        pass
    with lock_file(path, wait=False):
        assert path.exists()
    assert not path.exists()


def test_holders_take_turns(tmp_path):
    """Each holder removes the file, so that the next one must lock the file that has the name now."""
    inside, counts = [], []

    def hold():
        for _ in range(50):
            with lock_file(tmp_path / "lock"):
                inside.append(1)
                counts.append(len(inside))
                os.sched_yield()
                inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(counts), len(counts)) == (1, 200)


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    """The previous holder removes the file between our open and our lock; a third process creates a new one."""
    path, flock = tmp_path / "lock", fcntl.flock

    def flock_after_removal(file, operation):
        monkeypatch.setattr(locks.fcntl, "flock", flock)
        path.unlink()
        flock(file, operation)

    monkeypatch.setattr(locks.fcntl, "flock", flock_after_removal)
    with lock_file(path), pytest.raises(BlockingIOError), lock_file(path, wait=False):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError("no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with lock_file(tmp_path / "lock", required=False):
        pass
    with pytest.raises(OSError, match="no locks here"), lock_file(tmp_path / "lock"):
        pass


def test_a_lock_that_is_not_required_still_excludes(tmp_path):
    path = tmp_path / "lock"
    with lock_file(path), pytest.raises(BlockingIOError), lock_file(path, wait=False, required=False):
        pass


def test_a_file_is_created_once(tmp_path):
    assert create_exclusively(tmp_path / "lock", b"first")
    assert not create_exclusively(tmp_path / "lock", b"second")
    assert (tmp_path / "lock").read_bytes() == b"first"


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    class FullDisk:
        def __init__(self, handle, mode):
            os.close(handle)

        def __enter__(self):
            raise OSError(28, "No space left on device")

        def __exit__(self, *raised):
            pass

    monkeypatch.setattr(os, "fdopen", FullDisk)
    with pytest.raises(OSError, match=r"No space left on device.*lock"):
        create_exclusively(tmp_path / "lock", b"content")
    assert os.listdir(tmp_path) == []
