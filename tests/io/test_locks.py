"""Only one process has a lock at a time, and the lock file is removed at the end."""

import fcntl
import os
import threading

import pytest

from dist_llm.io import locks
from dist_llm.io.locks import create_exclusively, lock_file


def test_second_process_cannot_lock(tmp_path):
    path = tmp_path / "lock"
    with lock_file(path), pytest.raises(BlockingIOError), lock_file(path, wait=False):
        pass
    with lock_file(path, wait=False):
        assert path.exists()
    assert not path.exists()


def test_waiting_processes_lock_one_after_the_other(tmp_path):
    """Each process removes the lock file at the end. So the next process must lock the file that now has the name."""
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


def test_lock_on_a_removed_file_is_retried(tmp_path, monkeypatch):
    """The previous process removes the file between our open and our lock. A third process creates a new file."""
    path, flock = tmp_path / "lock", fcntl.flock

    def flock_after_removal(file, operation):
        monkeypatch.setattr(locks.fcntl, "flock", flock)
        path.unlink()
        flock(file, operation)

    monkeypatch.setattr(locks.fcntl, "flock", flock_after_removal)
    with lock_file(path), pytest.raises(BlockingIOError), lock_file(path, wait=False):
        pass


def test_only_required_locks_fail_without_kernel_locks(tmp_path, monkeypatch):
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


def test_create_exclusively_creates_once(tmp_path):
    assert create_exclusively(tmp_path / "lock", b"first")
    assert not create_exclusively(tmp_path / "lock", b"second")
    assert (tmp_path / "lock").read_bytes() == b"first"


def test_create_exclusively_leaves_no_file_on_a_full_disk(tmp_path, monkeypatch):
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
