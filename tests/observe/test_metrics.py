"""Rows reach every sink once, after one look at the device; files survive kills and resumes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dist_llm.observe import metrics
from dist_llm.observe.metrics import MetricsFile, Recorder, StepMetrics
from dist_llm.observe.tensorboard import TensorBoard

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch):
    """Event files of one second and process are read in the order of their names, where 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def measured(step, tokens=None):
    value = torch.tensor(float(step), dtype=torch.float64)
    return StepMetrics(
        step, value, 10 * value, torch.tensor(7), lr=step / 100, tokens=tokens or 50 * step, data_wait_seconds=0.5
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def test_a_flush_gives_each_step_its_numbers_and_the_intervals_rates(clock):
    seen, more = [], []
    recorder = Recorder([seen.extend, more.extend], flops_per_token=6.0, peak_flops=3000.0, device=CPU)
    for step in (1, 2, 3, 4):
        recorder.add(measured(step))
    clock[0] += 2.0
    rows = recorder.flush()
    assert rows == seen == more
    assert [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens"]) for row in rows] == [
        (step, float(step), 10.0 * step, step / 100, 50 * step) for step in (1, 2, 3, 4)
    ]
    for row in rows:  # 200 tokens and 4 steps in 2 seconds; 100 tokens/s * 6 FLOPs of 3000
        assert (row["tokens_per_second"], row["step_seconds"], row["mfu"]) == (100.0, 0.5, 0.2)
        assert row["data_wait_seconds"] == 0.5
        assert row["peak_memory_bytes"] > 2**20
        json.dumps(row, allow_nan=False)


def test_the_terms_of_a_loss_are_columns_of_their_own(clock):
    recorder = Recorder([], 1.0, 1.0, CPU)
    for step in (1, 2):
        terms = {"cross_entropy": torch.tensor(step - 0.5), "z_loss": torch.tensor(0.5)}
        recorder.add(replace(measured(step), terms=terms))
    clock[0] += 1.0
    rows = recorder.flush()
    assert [(row["loss"], row["cross_entropy"], row["z_loss"]) for row in rows] == [(1.0, 0.5, 0.5), (2.0, 1.5, 0.5)]


def test_an_interval_ends_with_its_flush_and_restarts_leave_out_what_was_no_step(clock):
    recorder = Recorder([], 1.0, 1.0, CPU)
    recorder.add(measured(1))
    clock[0] += 1.0
    assert recorder.flush()[0]["tokens_per_second"] == 50.0
    assert recorder.flush() == [], "nothing twice"
    recorder.add(measured(2))
    clock[0] += 2.0
    assert recorder.flush()[0]["tokens_per_second"] == 25.0
    clock[0] += 1000.0  # an evaluation
    recorder.restart_clock(100)
    recorder.add(measured(3))
    clock[0] += 1.0
    assert recorder.flush()[0]["tokens_per_second"] == 50.0


def test_a_resumed_run_counts_only_its_own_tokens(clock):
    recorder = Recorder([], 1.0, 1.0, CPU)
    recorder.restart_clock(tokens=1000)
    recorder.add(measured(21, tokens=1050))
    clock[0] += 1.0
    assert recorder.flush()[0]["tokens_per_second"] == 50.0


def test_without_a_known_peak_mfu_is_nan(clock):
    recorder = Recorder([], 1.0, 0.0, CPU)
    recorder.add(measured(1))
    clock[0] += 1.0
    assert math.isnan(recorder.flush()[0]["mfu"])


def test_the_device_is_asked_once_per_flush(monkeypatch):
    asked = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, real=real, name=name: asked.append(name) or real(self, *a)
        )
    recorder = Recorder([lambda rows: None], 1.0, 1.0, CPU)
    for steps in (1, 10):
        for step in range(1, steps + 1):
            recorder.add(measured(step))
        assert asked == [], "adding a step waits for nothing"
        recorder.flush()
        assert len(asked) == 1
        asked.clear()
    float(torch.tensor(1.0))
    assert asked, "the spies are in place"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def write(tmp_path):
    """Open the metrics file as a run does that resumes at a step, write rows, end."""
    path = tmp_path / "metrics.jsonl"

    def write(resumed_step, steps):
        sink = MetricsFile(path, resumed_step)
        sink([{"step": step, "run": resumed_step} for step in steps])
        sink.close()
        assert sink.file.closed
        return lines(path)

    write.path = path
    return write


def test_rows_are_on_disk_once_written(tmp_path):
    sink = MetricsFile(tmp_path / "metrics.jsonl", 0)
    sink([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    sink.close()


def test_each_step_is_there_once_after_a_resume(write):
    write(0, range(1, 8))
    got = write(4, range(5, 10))
    assert [row["step"] for row in got] == list(range(1, 10))
    assert [row["run"] for row in got] == [0] * 4 + [4] * 5
    assert write(9, []) == got, "a resume that takes no step loses nothing"
    assert [row["step"] for row in write(0, [1])] == [1], "a start from nothing keeps nothing"


@pytest.mark.parametrize("torn", ['{"step": 4, "los', "{", '{"lo', "\n\n", '{"loss": 1.0}\n', "\0\0\0"])
def test_a_line_cut_short_is_dropped(torn, write):
    whole = write(0, [1, 2, 3])
    with write.path.open("a") as file:
        file.write(torn)
    assert write(3, []) == whole
    assert [row["step"] for row in write(3, [4])] == [1, 2, 3, 4]


def row(step, loss):
    return {"step": step, "loss": loss, "lr": 0.1}


def record(directory, resumed_step, rows):
    board = TensorBoard(directory, resumed_step)
    board(rows)
    board.close()
    assert board.writer.all_writers is None


def curve(directory, name):
    return [(event.step, event.value) for event in EventAccumulator(str(directory)).Reload().Scalars(name)]


def test_tensorboard_reads_the_curves_back(tmp_path):
    heldout = {"step": 2, "heldout_loss": 3.0, "heldout_perplexity": 20.0, "sample": "def f():\n    pass"}
    record(tmp_path, 0, [row(1, 0.5), row(2, 0.25), heldout])
    assert curve(tmp_path, "train/loss") == [(1, 0.5), (2, 0.25)]
    assert curve(tmp_path, "heldout/heldout_loss") == [(2, 3.0)]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert set(board.Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "heldout/heldout_loss",
        "heldout/heldout_perplexity",
    }
    (text,) = board.Tensors("heldout/sample/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    def f():\n        pass"


def test_a_resume_hides_the_events_beyond_it(tmp_path):
    record(tmp_path, 0, [row(step, 1.0) for step in range(1, 8)])
    record(tmp_path, 4, [row(step, 2.0) for step in range(5, 10)])
    want = [(step, 1.0) for step in range(1, 5)] + [(step, 2.0) for step in range(5, 10)]
    assert curve(tmp_path, "train/loss") == want


def test_a_run_that_was_killed_before_its_first_checkpoint_is_hidden(tmp_path):
    record(tmp_path, 0, [row(step, 1.0) for step in range(1, 8)])
    record(tmp_path, 0, [row(step, 2.0) for step in range(1, 4)])
    assert curve(tmp_path, "train/loss") == [(step, 2.0) for step in range(1, 4)]


def test_rows_are_readable_before_the_run_ends(tmp_path):
    board = TensorBoard(tmp_path, 0)
    board([row(1, 0.5)])
    assert curve(tmp_path, "train/loss") == [(1, 0.5)]
    board.close()
