"""A signal is recorded and shared; a second one ends the process; the stop marker is written and cleared."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_llm.launch.stop import MARKER, StopSignals, clear_stop_marker, write_stop_marker
from tests.laws.worlds import world


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_recorded_and_known_after_the_next_sync(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.start_sync()
        assert signals.agreed_signal() == 0
        os.kill(os.getpid(), number)
        assert signals.agreed_signal() == 0, "not before the next sync"
        signals.start_sync()
        assert signals.agreed_signal() == number
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_nohup_or_a_background_job_ignores_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            signals.start_sync()
            assert signals.agreed_signal() == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def agreed_signals(rank: int) -> list[int]:
    seen = []
    with StopSignals() as signals:
        for step in range(3):
            signals.start_sync()
            if step == 1 and dist.get_rank() == rank:
                os.kill(os.getpid(), signal.SIGUSR1)
            seen.append(signals.agreed_signal())
    return seen


def test_all_ranks_agree_on_the_step() -> None:
    assert world(2).run(agreed_signals, 1) == [[0, 0, signal.SIGUSR1]] * 2


# A child for each case, forked once the parent has imported torch. "stuck": the main thread waits in C for a mutex that
# is never free, as it may in a collective, so that Python runs no handler.
SECOND = """
import ctypes, os, signal, sys, threading, time
from dist_llm.launch import stop

def child(first, second, stuck):
    with stop.StopSignals():
        if stuck:
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            threading.Thread(target=send, args=(first, second), daemon=True).start()
            libc.pthread_mutex_lock(mutex)
        os.kill(os.getpid(), first)
        os.write(1, b"alive ")
        os.kill(os.getpid(), second)
        os.write(1, b"still ")
    os._exit(0)

def send(first, second):
    for number in (first, second):
        time.sleep(0.1)
        os.kill(os.getpid(), number)

for first, second, stuck in eval(sys.argv[1]):
    if not (process := os.fork()):
        child(first, second, stuck)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def test_a_second_signal_ends_the_process_at_once_whatever_it_does() -> None:
    cases = {
        (signal.SIGTERM, signal.SIGTERM, False): f"alive {-signal.SIGTERM}",
        (signal.SIGINT, signal.SIGINT, False): f"alive {-signal.SIGINT}",
        (signal.SIGHUP, signal.SIGTERM, False): f"alive {-signal.SIGTERM}",
        (signal.SIGUSR1, signal.SIGHUP, False): f"alive {-signal.SIGHUP}",
        (signal.SIGTERM, signal.SIGUSR1, False): "alive still 0",
        (signal.SIGINT, signal.SIGINT, True): str(128 + signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM, True): str(128 + signal.SIGTERM),
    }
    given = repr([(int(first), int(second), stuck) for first, second, stuck in cases])
    done = subprocess.run([sys.executable, "-c", SECOND, given], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == list(cases.values()), done.stderr


@pytest.mark.parametrize("named", [False, True])
def test_the_stop_marker_is_where_the_batch_script_looks(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("elsewhere" if named else "stopped.json")
    if named:
        monkeypatch.setenv(MARKER, str(path))
    write_stop_marker(signal.SIGUSR1, 7, tmp_path)
    assert json.loads(path.read_text()) == {"signal": "SIGUSR1", "step": 7}
    clear_stop_marker(tmp_path)
    clear_stop_marker(tmp_path)
    assert not path.exists()
