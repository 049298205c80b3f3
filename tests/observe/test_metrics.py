"""Each row reaches every sink once, with one device synchronization. Metrics files survive kills and resumes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dist_llm.observe import metrics
from dist_llm.observe.metrics import MetricsFile, MetricsRecorder, StepMetrics
from dist_llm.observe.tensorboard import TensorBoard

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def reset_file_counter(monkeypatch):
    """Reset the counter in event file names: files of one second are read in name order, where 10 precedes 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def make_step_metrics(step, tokens=None):
    """Return metrics of a step that are functions of its number."""
    value = torch.tensor(float(step), dtype=torch.float64)
    return StepMetrics(
        step,
        loss=value,
        grad_norm=10 * value,
        loss_denominator=torch.tensor(7),
        lr=step / 100,
        tokens=tokens or 50 * step,
        data_wait_seconds=0.5,
    )


class FakeClock:
    """A clock that moves only if a test changes `seconds`."""

    def __init__(self):
        self.seconds = 100.0


@pytest.fixture
def clock(monkeypatch):
    """The clock that MetricsRecorder reads."""
    fake_clock = FakeClock()
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: fake_clock.seconds)
    return fake_clock


def test_a_flush_writes_one_row_per_step(clock):
    first_sink, second_sink = [], []
    recorder = MetricsRecorder(
        [first_sink.extend, second_sink.extend], flops_per_token=6.0, peak_flops=3000.0, device=CPU
    )
    for step in (1, 2, 3, 4):
        recorder.add(make_step_metrics(step))
    clock.seconds += 2.0
    rows = recorder.flush()
    assert rows == first_sink == second_sink
    assert [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens"]) for row in rows] == [
        (step, float(step), 10.0 * step, step / 100, 50 * step) for step in (1, 2, 3, 4)
    ]
    for row in rows:  # 200 tokens and 4 steps in 2 seconds; 100 tokens/s * 6 FLOPs of a peak of 3000
        assert (row["tokens_per_second"], row["step_seconds"], row["mfu"]) == (100.0, 0.5, 0.2)
        assert row["data_wait_seconds"] == 0.5
        assert row["peak_memory_bytes"] > 2**20
        json.dumps(row, allow_nan=False)


def test_loss_terms_are_separate_columns(clock):
    recorder = MetricsRecorder([], flops_per_token=1.0, peak_flops=1.0, device=CPU)
    for step in (1, 2):
        terms = {"cross_entropy": torch.tensor(step - 0.5), "z_loss": torch.tensor(0.5)}
        recorder.add(replace(make_step_metrics(step), loss_terms=terms))
    clock.seconds += 1.0
    rows = recorder.flush()
    assert [(row["loss"], row["cross_entropy"], row["z_loss"]) for row in rows] == [
        (1.0, 0.5, 0.5),
        (2.0, 1.5, 0.5),
    ]


def test_rates_exclude_evaluations_and_checkpoints(clock):
    recorder = MetricsRecorder([], flops_per_token=1.0, peak_flops=1.0, device=CPU)
    recorder.add(make_step_metrics(1))
    clock.seconds += 1.0
    assert recorder.flush()[0]["tokens_per_second"] == 50.0
    assert recorder.flush() == [], "no row must be written twice"
    recorder.add(make_step_metrics(2))
    clock.seconds += 2.0
    assert recorder.flush()[0]["tokens_per_second"] == 25.0
    clock.seconds += 1000.0  # an evaluation
    recorder.restart_clock(tokens=100)
    recorder.add(make_step_metrics(3))
    clock.seconds += 1.0
    assert recorder.flush()[0]["tokens_per_second"] == 50.0


def test_a_resumed_run_counts_only_its_own_tokens(clock):
    recorder = MetricsRecorder([], flops_per_token=1.0, peak_flops=1.0, device=CPU)
    recorder.restart_clock(tokens=1000)
    recorder.add(make_step_metrics(21, tokens=1050))
    clock.seconds += 1.0
    assert recorder.flush()[0]["tokens_per_second"] == 50.0


def test_mfu_is_nan_without_a_known_peak(clock):
    recorder = MetricsRecorder([], flops_per_token=1.0, peak_flops=0.0, device=CPU)
    recorder.add(make_step_metrics(1))
    clock.seconds += 1.0
    assert math.isnan(recorder.flush()[0]["mfu"])


def test_a_flush_synchronizes_with_the_device_once(monkeypatch):
    calls = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, original=original, name=name: calls.append(name) or original(self, *a)
        )
    recorder = MetricsRecorder([lambda rows: None], flops_per_token=1.0, peak_flops=1.0, device=CPU)
    for steps in (1, 10):
        for step in range(1, steps + 1):
            recorder.add(make_step_metrics(step))
        assert calls == [], "adding a step synchronized"
        recorder.flush()
        assert len(calls) == 1
        calls.clear()
    float(torch.tensor(1.0))
    assert calls, "the counters do not count, so the test cannot detect a synchronization"


def read_rows(path):
    """Return the rows of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def write(tmp_path):
    """Return a function: open the metrics file of a resumed run, write rows, close it, and return all rows."""
    path = tmp_path / "metrics.jsonl"

    def write(resumed_step, steps):
        sink = MetricsFile(path, resumed_step)
        sink([{"step": step, "run": resumed_step} for step in steps])
        sink.close()
        assert sink.file.closed
        return read_rows(path)

    write.path = path
    return write


def test_rows_are_on_disk_after_a_flush(tmp_path):
    sink = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    sink([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    sink.close()


def test_a_resumed_run_removes_later_rows(write):
    write(0, range(1, 8))
    actual = write(4, range(5, 10))
    assert [row["step"] for row in actual] == list(range(1, 10))
    assert [row["run"] for row in actual] == [0] * 4 + [4] * 5
    assert write(9, []) == actual, "a resume without steps must keep all rows"
    assert [row["step"] for row in write(0, [1])] == [1], "a start from step 0 must drop all rows"


@pytest.mark.parametrize("incomplete_line", ['{"step": 4, "los', "{", '{"lo', "\n\n", '{"loss": 1.0}\n', "\0\0\0"])
def test_an_incomplete_line_is_dropped(incomplete_line, write):
    rows = write(0, [1, 2, 3])
    with write.path.open("a") as file:
        file.write(incomplete_line)
    assert write(3, []) == rows
    assert [row["step"] for row in write(3, [4])] == [1, 2, 3, 4]


def make_row(step, loss):
    """Return a row of metrics.jsonl."""
    return {"step": step, "loss": loss, "lr": 0.1}


def write_tensorboard(directory, resumed_step, rows):
    """Write rows to TensorBoard files, as a run that has resumed at a step."""
    board = TensorBoard(directory, resumed_step)
    board(rows)
    board.close()
    assert board.writer.all_writers is None


def read_curve(directory, name):
    """Return (step, value) of each point of a curve in TensorBoard files."""
    return [(event.step, event.value) for event in EventAccumulator(str(directory)).Reload().Scalars(name)]


def test_tensorboard_can_read_the_curves(tmp_path):
    heldout = {"step": 2, "heldout_loss": 3.0, "heldout_perplexity": 20.0, "sample": "def f():\n    pass"}
    write_tensorboard(tmp_path, resumed_step=0, rows=[make_row(step=1, loss=0.5), make_row(step=2, loss=0.25), heldout])
    assert read_curve(tmp_path, "train/loss") == [(1, 0.5), (2, 0.25)]
    assert read_curve(tmp_path, "heldout/heldout_loss") == [(2, 3.0)]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert set(board.Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "heldout/heldout_loss",
        "heldout/heldout_perplexity",
    }
    (text,) = board.Tensors("heldout/sample/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    def f():\n        pass"


def test_a_resume_hides_later_events(tmp_path):
    write_tensorboard(tmp_path, resumed_step=0, rows=[make_row(step, loss=1.0) for step in range(1, 8)])
    write_tensorboard(tmp_path, resumed_step=4, rows=[make_row(step, loss=2.0) for step in range(5, 10)])
    expected = [(step, 1.0) for step in range(1, 5)] + [(step, 2.0) for step in range(5, 10)]
    assert read_curve(tmp_path, "train/loss") == expected


def test_a_run_that_was_killed_before_its_first_checkpoint_is_hidden(tmp_path):
    write_tensorboard(tmp_path, resumed_step=0, rows=[make_row(step, loss=1.0) for step in range(1, 8)])
    write_tensorboard(tmp_path, resumed_step=0, rows=[make_row(step, loss=2.0) for step in range(1, 4)])
    assert read_curve(tmp_path, "train/loss") == [(step, 2.0) for step in range(1, 4)]


def test_rows_are_readable_before_the_run_ends(tmp_path):
    board = TensorBoard(tmp_path, resumed_step=0)
    board([make_row(step=1, loss=0.5)])
    assert read_curve(tmp_path, "train/loss") == [(1, 0.5)]
    board.close()
