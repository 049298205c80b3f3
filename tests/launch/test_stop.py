"""A signal is noted and passed on; a second one ends the process; the word that is left, and taken back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_llm.launch.stop import MARKER, StopSignals, forget_word, leave_word
from tests.laws.worlds import world


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_known_after_the_next_word(number: signal.Signals) -> None:
    with StopSignals() as signals:
        signals.share()
        assert signals.agreed() == 0
        os.kill(os.getpid(), number)
        assert signals.agreed() == 0, "not before it is shared"
        signals.share()
        assert signals.agreed() == number
    assert signal.getsignal(number) == signal.SIG_DFL


def told(who: int) -> list[int]:
    found = []
    with StopSignals() as signals:
        for step in range(3):
            signals.share()
            if step == 1 and dist.get_rank() == who:
                os.kill(os.getpid(), signal.SIGUSR1)
            found.append(signals.agreed())
    return found


def test_all_ranks_agree_on_the_step() -> None:
    assert world(2).run(told, 1) == [[0, 0, signal.SIGUSR1]] * 2


def test_a_second_sigterm_ends_the_process() -> None:
    program = """
import os, signal
from dist_llm.launch.stop import StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "alive\n")


@pytest.mark.parametrize("named", [False, True])
def test_the_word_is_where_the_batch_script_looks(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ("elsewhere" if named else "stopped.json")
    if named:
        monkeypatch.setenv(MARKER, str(path))
    leave_word(signal.SIGUSR1, 7, tmp_path)
    assert json.loads(path.read_text()) == {"signal": "SIGUSR1", "step": 7}
    forget_word(tmp_path)
    forget_word(tmp_path)
    assert not path.exists()
