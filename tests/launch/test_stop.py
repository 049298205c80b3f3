"""All ranks agree on a stop signal. A second signal ends the process. The stop marker is written and cleared."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_llm.launch.stop import STOP_MARKER_VARIABLE, StopSignals, clear_stop_marker, write_stop_marker
from tests.laws.worlds import get_world


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_agreed_after_the_next_sync(number: signal.Signals) -> None:
    handler_before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.start_sync()
        assert signals.agreed_signal() == 0
        os.kill(os.getpid(), number)
        assert signals.agreed_signal() == 0, "the signal is agreed before the next sync"
        signals.start_sync()
        assert signals.agreed_signal() == number
    assert signal.getsignal(number) == handler_before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ignored_signals_stay_ignored(number: signal.Signals) -> None:
    handler_before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            signals.start_sync()
            assert signals.agreed_signal() == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, handler_before)


def agree_on_signals(rank: int) -> list[int]:
    """Take three steps, in the second of which `rank` receives SIGUSR1; return the agreed signal of each step."""
    signals_by_step = []
    with StopSignals() as signals:
        for step in range(3):
            signals.start_sync()
            if step == 1 and dist.get_rank() == rank:
                os.kill(os.getpid(), signal.SIGUSR1)
            signals_by_step.append(signals.agreed_signal())
    return signals_by_step


def test_all_ranks_agree_on_the_step() -> None:
    assert get_world(2).run(agree_on_signals, 1) == [[0, 0, signal.SIGUSR1]] * 2


# One forked child for each case. "stuck": the main thread waits in C for a mutex that is never released, as it may wait
# in a collective, so that Python runs no signal handler.
SECOND_SIGNAL_SCRIPT = """
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


def test_a_second_signal_ends_the_process_at_once() -> None:
    cases = {
        (signal.SIGTERM, signal.SIGTERM, False): f"alive {-signal.SIGTERM}",
        (signal.SIGINT, signal.SIGINT, False): f"alive {-signal.SIGINT}",
        (signal.SIGHUP, signal.SIGTERM, False): f"alive {-signal.SIGTERM}",
        (signal.SIGUSR1, signal.SIGHUP, False): f"alive {-signal.SIGHUP}",
        (signal.SIGTERM, signal.SIGUSR1, False): "alive still 0",
        (signal.SIGINT, signal.SIGINT, True): str(128 + signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM, True): str(128 + signal.SIGTERM),
    }
    argument = repr([(int(first), int(second), stuck) for first, second, stuck in cases])
    completed = subprocess.run(
        [sys.executable, "-c", SECOND_SIGNAL_SCRIPT, argument], capture_output=True, text=True, timeout=60
    )
    assert completed.stdout.splitlines() == list(cases.values()), completed.stderr


@pytest.mark.parametrize("from_environment", [False, True])
def test_the_batch_script_finds_the_stop_marker(
    from_environment: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("elsewhere" if from_environment else "stopped.json")
    if from_environment:
        monkeypatch.setenv(STOP_MARKER_VARIABLE, str(path))
    write_stop_marker(signal.SIGUSR1, step=7, directory=tmp_path)
    assert json.loads(path.read_text()) == {"signal": "SIGUSR1", "step": 7}
    clear_stop_marker(tmp_path)
    clear_stop_marker(tmp_path)
    assert not path.exists()
