"""Only one run at a time writes to a directory. A stale lock is replaced; a lock in use is not."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dist_llm.errors import ConfigError
from dist_llm.launch import run_lock
from dist_llm.launch.process_identity import is_running, read_process_identity
from dist_llm.launch.run_lock import (
    LOCK_FILE,
    LockHolder,
    RunLock,
    describe_this_process,
    dump_holder,
    find_whether_ended,
    parse_holder,
)

ELSEWHERE = LockHolder("t", "n7", pid=12, machine="another machine", start_time="99", since="yesterday")


def make_holder(**changes: object) -> LockHolder:
    """Describe this process as the holder of a lock, with changed fields."""
    return replace(describe_this_process("here", {}), **changes)  # type: ignore[arg-type]


def read_holder(directory: Path) -> LockHolder:
    """Return the holder that the lock file of a directory names."""
    return parse_holder((directory / LOCK_FILE).read_bytes())


def write_lock(directory: Path, holder: LockHolder) -> Path:
    """Write the lock file of a directory and return its path."""
    directory.mkdir(exist_ok=True)
    path = directory / LOCK_FILE
    path.write_bytes(dump_holder(holder))
    return path


def test_a_second_run_is_refused_with_the_holder(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run", make_holder(job="77")):
        with pytest.raises(ConfigError) as excinfo, RunLock(tmp_path / "run", make_holder()):
            pass
        assert read_holder(tmp_path / "run").job == "77", "the first run must keep the lock"
    message = str(excinfo.value)
    assert f"run.dir: {tmp_path}/run is in use by process {os.getpid()} on here (Slurm job 77), started 20" in message
    assert "Set another run.dir, or wait until that run ends, or let it save and stop: scancel" in message
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    with RunLock(tmp_path / "run", make_holder()):
        pass


def test_the_lock_of_a_killed_process_is_replaced_at_once(tmp_path: Path) -> None:
    """It also works while the process is a zombie that its parent has not waited for."""
    code = (
        "import time, sys; from pathlib import Path; from dist_llm.launch.run_lock import *\n"
        "RunLock(Path(sys.argv[1]), describe_this_process('here', {})).__enter__(); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(ConfigError, match=f"in use by process {other.pid} on here"),
            RunLock(tmp_path, make_holder()),
        ):
            pass
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with RunLock(tmp_path, make_holder()):
            assert read_holder(tmp_path).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_same_pid_is_not_the_holder(tmp_path: Path) -> None:
    write_lock(tmp_path, make_holder(start_time="1"))
    with RunLock(tmp_path, make_holder()) as lock:
        assert read_holder(tmp_path) == lock.this_process, "the stale lock must be replaced"


@pytest.mark.parametrize(
    ("holder", "own_changes", "expected"),
    [
        ({"rdzv_id": "a"}, {"rdzv_id": "a"}, True),
        ({"rdzv_id": "a"}, {"rdzv_id": "b"}, None),
        ({"job": "5", "slurm_restarts": 0}, {"job": "5", "slurm_restarts": 1}, True),
        ({"job": "5", "slurm_restarts": 1}, {"job": "5", "slurm_restarts": 1}, None),
        ({"job": "ended"}, {"job": "5"}, True),
        ({"job": "running"}, {"job": "5"}, None),
        ({"job": "ended"}, {}, None),
        ({"job": "ended", "cluster": "x"}, {"job": "5", "cluster": "y"}, None),
        ({"job": "5", "cluster": "x"}, {"job": "5", "cluster": "y", "slurm_restarts": 1}, None),
        ({}, {}, None),
    ],
    ids=str,
)
def test_a_holder_on_another_machine_has_ended_with_its_job(
    holder: dict[str, object], own_changes: dict[str, object], expected: bool | None
) -> None:
    actual = find_whether_ended(replace(ELSEWHERE, **holder), make_holder(**own_changes), lambda job: job == "ended")  # type: ignore[arg-type]
    assert actual is expected


def test_a_lock_of_another_machine_is_stale_without_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.4)
    path = write_lock(tmp_path, ELSEWHERE)
    touches = iter(range(100))
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(path, ns=(0, next(touches))))
    with pytest.raises(ConfigError, match=r"in use by process 12 on n7.*kill -TERM 12, on n7"):
        RunLock(tmp_path, make_holder()).__enter__()
    monkeypatch.undo()
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.1)
    with RunLock(tmp_path, make_holder()):
        assert read_holder(tmp_path).host == "here"


def test_an_incomplete_lock_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.1)
    (tmp_path / LOCK_FILE).write_text('{"token": "a')
    with RunLock(tmp_path, make_holder()):
        assert read_holder(tmp_path).host == "here"


def test_only_one_process_replaces_a_stale_lock(tmp_path: Path) -> None:
    for number in range(20):
        directory = tmp_path / str(number)
        write_lock(directory, make_holder(start_time="1"))
        locks = [RunLock(directory, make_holder()) for _ in range(8)]
        entered, barrier = [], threading.Barrier(len(locks))

        def enter(lock: RunLock, barrier: threading.Barrier = barrier, entered: list[RunLock] = entered) -> None:
            barrier.wait()
            with suppress(ConfigError):
                entered.append(lock.__enter__())

        threads = [threading.Thread(target=enter, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(entered) == 1
        entered[0].__exit__()
        assert list(directory.iterdir()) == []


def test_a_run_that_lost_its_lock_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    lock = RunLock(tmp_path, make_holder(), exit_process=codes.append)
    with lock:
        mtime_before = (tmp_path / LOCK_FILE).stat().st_mtime_ns
        os.utime(tmp_path / LOCK_FILE, ns=(0, 0))
        lock.heartbeat()
        assert (tmp_path / LOCK_FILE).stat().st_mtime_ns >= mtime_before
        assert codes == []
        (tmp_path / LOCK_FILE).unlink()
        lock.heartbeat()
        assert read_holder(tmp_path) == lock.this_process, "a removed lock must be created again"
        write_lock(tmp_path, ELSEWHERE)
        lock.heartbeat()
    assert codes == [run_lock.LOST_LOCK_EXIT_CODE]
    assert "was taken over by process 12 on n7" in capsys.readouterr().err
    assert read_holder(tmp_path) == ELSEWHERE


def test_this_process_is_described() -> None:
    holder = describe_this_process(
        "n3", {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "none"}
    )
    assert (holder.host, holder.pid, holder.job, holder.slurm_restarts, holder.rdzv_id) == (
        "n3",
        os.getpid(),
        "8",
        2,
        "",
    )
    assert describe_this_process("n3", {"TORCHELASTIC_RUN_ID": "mine"}).rdzv_id == "mine"
    assert is_running(os.getpid(), read_process_identity(os.getpid())[2])
    assert not is_running(os.getpid(), "1")


def test_the_keys_of_a_lock_file_stay_the_same() -> None:
    """Runs of different versions read the lock files of each other."""
    holder = make_holder(rdzv_id="mine", slurm_restarts=3)
    values = json.loads(dump_holder(holder))
    assert list(values) == [
        *("token", "host", "process", "machine", "start_time", "since", "launch", "job", "cluster", "restarts")
    ]
    assert [values[key] for key in ("token", "process", "launch", "restarts")] == [
        *(holder.lock_id, os.getpid(), "mine", 3)
    ]


@pytest.mark.parametrize(
    ("answer", "ended"),
    [
        ("echo RUNNING", False),
        ("echo COMPLETING", False),
        ("echo PENDING", True),
        ("echo CANCELLED", True),
        ("true", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
        (None, False),
    ],
)
def test_squeue_reports_the_end_of_a_job(
    answer: str | None, ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer is not None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if answer is not None else str(tmp_path))
    assert run_lock.slurm_job_ended("5") is ended


def test_a_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir: .*file.* cannot be written: .*set another run\.dir"):
        RunLock(tmp_path / "file" / "run", make_holder()).__enter__()
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: .*file cannot be written"):
        RunLock(tmp_path / "file", make_holder(), "checkpoint.dir").__enter__()
