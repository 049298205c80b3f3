"""Output is plain lines in a pipe and a progress bar on a terminal. Each rank has a log file."""

import io
import math

import pytest
from rich.console import Console

from dist_llm.launch.world import World
from dist_llm.observe import console
from dist_llm.observe.console import ConsoleSink, log, start_logging, stop_logging

ROW = {
    "step": 30,
    "loss": 2.34567,
    "lr": 3e-4,
    "grad_norm": 1.23456,
    "tokens_per_second": 123456.7,
    "mfu": 0.1234,
    "step_seconds": 60.0,
}
HELDOUT = {"step": 30, "heldout_loss": 2.5, "heldout_perplexity": 12.1825, "heldout_bits_per_byte": 1.2}


@pytest.fixture(autouse=True)
def stop_logging_after_test(monkeypatch):
    """Test without the environment variables that force colors, and stop logging at the end."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    yield
    stop_logging()


def test_without_a_terminal_lines_are_plain(tmp_path, capsys):
    start_logging(tmp_path, World())
    bar = ConsoleSink(num_steps=100, num_steps_done=0)
    bar([{**ROW, "step": 29}, ROW])
    bar([HELDOUT])
    bar.close()
    printed = capsys.readouterr()
    assert printed.out == "", "progress is printed to stdout, which is for results"
    assert printed.err == (
        "step  30/100  loss 2.3457  lr 3.00e-04  grad norm 1.235  123,457 tokens/s  MFU 12.3%  ETA 1:10:00\n"
        "step 30  held-out loss 2.5000  perplexity 12.18  bits per byte 1.2000\n"
    )


def test_a_line_with_nan_and_inf_is_printed(tmp_path, capsys):
    start_logging(tmp_path, World())
    ConsoleSink(num_steps=100, num_steps_done=0)([{**ROW, "mfu": math.nan, "step_seconds": math.inf}])
    assert capsys.readouterr().err.rstrip().endswith("MFU nan%  ETA ?")


def test_an_mfu_above_1_is_explained(tmp_path, capsys):
    start_logging(tmp_path, World())
    ConsoleSink(num_steps=100, num_steps_done=0)([{**ROW, "mfu": 1.23}, {**ROW, "mfu": 1.23}])
    assert "MFU 123.0% (the peak rate is underestimated: set log.peak_tflops)  ETA" in capsys.readouterr().err


def test_a_terminal_has_a_progress_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=150))
    bar = ConsoleSink(num_steps=100, num_steps_done=10)
    try:
        assert bar.bar.tasks[0].completed == 10
        bar([ROW])
        assert bar.bar.tasks[0].completed == 30
    finally:
        bar.close()
    assert "loss 2.3457" in screen.getvalue()
    assert "30/100" in screen.getvalue()


def test_every_rank_has_a_log_file_and_rank_0_logs_to_stderr(tmp_path, capsys):
    for rank in (1, 0):
        start_logging(tmp_path / "logs", World(rank=rank, world_size=2, local_rank=rank, host="node7"))
        log.info("hello from %d", rank)
        log.debug("not this")
    stop_logging()
    assert capsys.readouterr().err == "hello from 0\n"
    for rank in (0, 1):
        (line,) = (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text().splitlines()
        assert line.endswith(f" rank {rank} node7 INFO hello from {rank}")


def test_logging_restarts_and_appends_to_the_file(tmp_path, capsys):
    for _ in range(2):
        start_logging(tmp_path, World())
        log.info("once")
    stop_logging()
    assert capsys.readouterr().err == "once\nonce\n", "a handler must be added only once"
    assert len((tmp_path / "rank_00000.log").read_text().splitlines()) == 2
    assert log.handlers == []


def test_logging_to_a_full_disk_stops_with_one_line(tmp_path, capsys):
    (tmp_path / "rank_00000.log").symlink_to("/dev/full")
    start_logging(tmp_path, World())
    log.info("first")
    log.info("second")
    assert capsys.readouterr().err == (
        f"{tmp_path}/rank_00000.log: No space left on device; logging to this file has stopped\nfirst\nsecond\n"
    )
