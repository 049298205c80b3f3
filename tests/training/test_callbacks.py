"""Callbacks and evaluators are called in order, on all ranks, and to the end; they change no bit of the training."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from dist_llm.config.schema import Config
from dist_llm.data.streams import open_sources
from dist_llm.engines.build_engine import build_engine
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError, UserError
from dist_llm.launch.watchdog import Watchdog
from dist_llm.launch.world import World
from dist_llm.models.decoder import Decoder
from dist_llm.observe.metrics import MetricsRow, read_rows
from dist_llm.training.callback import Callback, CallbackList, TrainingState
from dist_llm.training.extensions import Extensions
from dist_llm.training.learning_rate_plan import plan_learning_rate
from dist_llm.training.metric_names import TRAINER_METRICS
from dist_llm.training.run import RunContext
from dist_llm.training.settings import read_config, read_vocabulary
from dist_llm.training.trainer import CheckpointStore
from tests.fuzz.corpus_files import write_corpus
from tests.laws.worlds import run_on_ranks

Call = tuple[str, Any]  # (name of the method, number of completed steps)
TIMINGS = {"data_wait_seconds", "tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes"}


class CallRecorder(Callback):
    """A callback and evaluator that records its calls. `error_in` is a method that raises an error at `error_step`."""

    def __init__(self, error_in: str = "", error_step: int = 0) -> None:
        self.calls: list[Call] = []
        self.error = (error_in, error_step)

    def record(self, name: str, state: TrainingState) -> None:
        self.calls.append((name, state.progress.step))
        if self.calls[-1] == self.error:
            raise ZeroDivisionError("planted")

    def on_start(self, state: TrainingState) -> None:
        self.record("on_start", state)

    def before_step(self, state: TrainingState) -> None:
        assert sum(len(batch.inputs_BS) for batch in state.batches) == state.loader.local_batch
        self.record("before_step", state)

    def after_step(self, state: TrainingState) -> None:
        self.record("after_step", state)

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
        self.record("on_metrics", state)
        self.calls.extend(("step_row" if "loss" in row else "evaluation_row", row["step"]) for row in rows)
        return ()

    def before_save(self, state: TrainingState) -> None:
        self.record("before_save", state)

    def close(self, state: TrainingState) -> None:
        self.record("close", state)

    def evaluate(self, state: TrainingState) -> MetricsRow:
        self.record("evaluate", state)
        return {}


@pytest.fixture
def make_run_config(tmp_path: Path) -> Callable[..., Config]:
    """Return a function that writes a corpus and returns the config of a tiny run, with overrides and ranks."""

    def make(*overrides: str, ranks: int = 1, name: str = "run") -> Config:
        corpus, run_dir = tmp_path / "corpus", tmp_path / name
        if not corpus.exists():
            corpus.mkdir()
            write_corpus(corpus)
        run_dir.mkdir()
        raw_config = {
            "run": {"dir": str(run_dir), "steps": 4},
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "dropout": 0.2},
            "data": {"path": str(corpus), "seq_len": 8, "global_batch": 4, "micro_batch": 1},
            "eval": {"every": 2},
            "checkpoint": {"every": 4},
            "log": {"peak_tflops": 1.0, "every": 4, "tensorboard": False},
        }
        return read_config(raw_config, overrides, world_size=ranks)

    return make


def run_on_rank(
    config: Config, extensions: Extensions, bug: Callable[[], AbstractContextManager[Any]] | None = None
) -> tuple[int, Extensions]:
    """Train on this rank with a planted `bug`; return the stop signal and the extensions, which pickle copied."""
    world = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
    extensions.check()
    torch.manual_seed(0)
    engine, sources = build_engine(config, torch.device("cpu")), open_sources(config)
    vocabulary = read_vocabulary(config, sources[0].corpus.directory)
    store = CheckpointStore(Path(config.run.dir) / "checkpoints", config.checkpoint)
    planned_config = plan_learning_rate(config, None)
    context = RunContext(planned_config, world, sources, vocabulary, store, engine, Watchdog(world, 0.0), extensions)
    if bug is None:
        return context.run(None), extensions
    with bug():
        return context.run(None), extensions


def record_calls(config: Config, bug: Callable[[], AbstractContextManager[Any]] | None = None) -> list[Call]:
    """Train on this rank with a CallRecorder as callback and as evaluator; return its calls."""
    recorder = CallRecorder()
    run_on_rank(config, Extensions((recorder,), (recorder,)), bug)
    return recorder.calls


def read_metrics(config: Config) -> list[MetricsRow]:
    """Return the rows of metrics.jsonl without the metrics that measure time or memory."""
    rows = [row for _, row in read_rows(Path(config.run.dir) / "metrics.jsonl")]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def list_interval_calls(first_step: int) -> list[Call]:
    """Return the calls from a step to the evaluation after the next step."""
    step = first_step + 1
    return [
        *(("before_step", first_step - 1), ("after_step", first_step), ("before_step", step - 1), ("after_step", step)),
        *(("on_metrics", step), ("step_row", step - 1), ("step_row", step)),
        *(("evaluate", step), ("on_metrics", step), ("evaluation_row", step)),
    ]


ALL_CALLS = [
    ("on_start", 0),
    *list_interval_calls(1),
    *list_interval_calls(3),
    ("before_save", 4),
    ("close", 4),
]


@contextmanager
def skip_callbacks_on_rank_1() -> Iterator[None]:
    """Planted bug: rank 1 does not call callbacks after a step."""
    original_after_step = CallbackList.after_step

    def after_step(self: CallbackList, state: TrainingState) -> None:
        if state.world.is_main:
            original_after_step(self, state)

    with patch.object(CallbackList, "after_step", after_step):
        yield


def test_every_rank_calls_all_methods_in_order(make_run_config: Callable[..., Config]) -> None:
    config = make_run_config("parallel.dp_shard=2", ranks=2)
    assert run_on_ranks(2, record_calls, config) == [ALL_CALLS] * 2


def test_a_callback_that_rank_1_does_not_call_is_detected(make_run_config: Callable[..., Config]) -> None:
    config = make_run_config("parallel.dp_shard=2", ranks=2)
    calls_0, calls_1 = run_on_ranks(2, record_calls, config, skip_callbacks_on_rank_1)
    assert calls_0 == ALL_CALLS
    assert calls_1 == [call for call in ALL_CALLS if call[0] != "after_step"]


@pytest.mark.parametrize("method", ["on_start", "before_step", "after_step", "on_metrics", "evaluate", "before_save"])
def test_an_exception_closes_all_started_callbacks(method: str, make_run_config: Callable[..., Config]) -> None:
    error_step = {"on_start": 0, "before_save": 4}.get(method, 2)
    callbacks = [CallRecorder(), CallRecorder(error_in=method, error_step=error_step), CallRecorder()]
    with pytest.raises(ZeroDivisionError, match="planted"):
        run_on_rank(make_run_config(), Extensions(callbacks, callbacks[1:2]))
    started = callbacks[:2] if method == "on_start" else callbacks
    for callback in started:
        assert callback.calls[0] == ("on_start", 0)
        assert [call for call in callback.calls if call[0] == "close"] == [("close", error_step)]
        assert callback.calls[-1] == ("close", error_step)
    if method == "on_start":
        assert callbacks[2].calls == []


def test_an_exception_in_close_does_not_prevent_the_other_calls_of_close(
    make_run_config: Callable[..., Config],
) -> None:
    callbacks = [CallRecorder(), CallRecorder(error_in="close", error_step=4), CallRecorder()]
    with pytest.raises(ZeroDivisionError, match="planted"):
        run_on_rank(make_run_config(), Extensions(callbacks))
    assert [callback.calls[-1] for callback in callbacks] == [("close", 4)] * 3


class SignalSender(CallRecorder):
    """Sends a stop signal to this process in the first step."""

    def before_step(self, state: TrainingState) -> None:
        super().before_step(state)
        if state.progress.step == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_stop_signal_saves_and_closes(make_run_config: Callable[..., Config]) -> None:
    sender = SignalSender()
    stop_signal, _ = run_on_rank(make_run_config(), Extensions((sender,)))
    assert stop_signal == signal.SIGUSR1
    # The ranks agree on the signal in the step after it. A stop does not evaluate.
    assert sender.calls[-5:] == [
        *(("on_metrics", 2), ("step_row", 1), ("step_row", 2)),
        *(("before_save", 2), ("close", 2)),
    ]


class FaultyMachine(CallRecorder):
    """Sets weights to NaN before step 3, once. No callback may change weights; this one simulates a faulty machine."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[TrainingState] = []

    def on_start(self, state: TrainingState) -> None:
        super().on_start(state)
        self.states.append(state)

    def before_step(self, state: TrainingState) -> None:
        super().before_step(state)
        if state.progress.step == 2 and len(self.states) == 1:
            next(state.engine.named_parameters())[1].data.fill_(torch.nan)


def test_a_rewind_closes_and_starts_again_with_a_new_state(make_run_config: Callable[..., Config]) -> None:
    machine = FaultyMachine()
    config = make_run_config("guard.not_finite=rewind", "guard.skip_steps=0", "log.every=1", "checkpoint.every=2")
    run_on_rank(config, Extensions((machine,), (machine,)))
    index = machine.calls.index(("close", 3))
    assert machine.calls[index - 2 : index + 3] == [
        *(("before_step", 2), ("after_step", 3)),  # the guard raises before on_metrics
        *(("close", 3), ("on_start", 2), ("before_step", 2)),
    ]
    assert machine.calls[-1] == ("close", 4)
    assert [call[0] for call in machine.calls].count("close") == 2
    first_state, second_state = machine.states
    assert first_state is not second_state
    assert first_state.loader is not second_state.loader


class Intruder(Callback):
    """A callback and evaluator that leaves the model in eval mode, uses random numbers and computes a loss."""

    metric_names = ("random_number", "score_*")

    def intrude(self, state: TrainingState) -> float:
        batches = state.loader.load_batches_of_rank(state.engine.dp_rank_and_size[0], 0)
        loss = state.engine.all_reduce_over_loss_axes(state.engine.score(state.engine.to_local_batch(batches[0])).sum())
        for model_part in state.engine.model_parts:
            model_part.eval()
        return float(loss) + float(torch.rand(()))

    def on_start(self, state: TrainingState) -> None:
        self.intrude(state)

    def before_step(self, state: TrainingState) -> None:
        self.intrude(state)

    def after_step(self, state: TrainingState) -> None:
        self.intrude(state)

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
        return [{"random_number": self.intrude(state), "event": "a random number"}] if "loss" in rows[0] else []

    def before_save(self, state: TrainingState) -> None:
        self.intrude(state)

    def evaluate(self, state: TrainingState) -> MetricsRow:
        return {"score_a": self.intrude(state), "score_b": 1}


@contextmanager
def stay_in_eval_mode() -> Iterator[None]:
    """Planted bug: a step does not set the model to training mode."""
    original_train = Decoder.train

    def train(self: Decoder, mode: bool = True) -> Decoder:
        return self if mode else original_train(self, mode)

    with patch.object(Decoder, "train", train):
        yield


@contextmanager
def seed_dropout_never() -> Iterator[None]:
    """Planted bug: dropout continues the random numbers that were used before the step."""
    with patch.object(NativeEngine, "_seed_dropout", lambda *args: None):
        yield


def compare_runs(make_run_config: Callable[..., Config], ranks: int, bug: Any = None) -> tuple[Any, Any]:
    """Train without and with an Intruder; return the metrics of both, without those of the Intruder."""
    metrics, intruder = [], Intruder()
    for name, extensions in (("plain", Extensions()), ("intruder", Extensions((intruder,), (intruder,)))):
        overrides = ["eval.sample_prompt='a'", "eval.sample_tokens=4"]
        overrides += [f"parallel.dp_shard={ranks}"] if ranks > 1 else []
        config = make_run_config(*overrides, ranks=ranks, name=name)
        run_on_ranks(ranks, run_on_rank, config, extensions, bug)
        metrics.append(read_metrics(config))
    plain_rows, intruder_rows = metrics
    assert sum("random_number" in row for row in intruder_rows) == 2
    assert sum("score_a" in row for row in intruder_rows) == 2
    names = {"score_a", "score_b"}
    return plain_rows, [
        {name: value for name, value in row.items() if name not in names}
        for row in intruder_rows
        if "random_number" not in row
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_callbacks_and_evaluators_change_no_bit(ranks: int, make_run_config: Callable[..., Config]) -> None:
    plain_rows, intruder_rows = compare_runs(make_run_config, ranks)
    assert len(plain_rows) == 6
    assert plain_rows == intruder_rows


@pytest.mark.parametrize("bug", [stay_in_eval_mode, seed_dropout_never])
def test_a_step_that_depends_on_evaluations_is_detected(bug: Any, make_run_config: Callable[..., Config]) -> None:
    plain_rows, intruder_rows = compare_runs(make_run_config, 1, bug)
    assert [row.get("loss") for row in plain_rows] != [row.get("loss") for row in intruder_rows]


@pytest.mark.parametrize(
    ("function", "overrides", "num_calls"),
    [
        ("sample_audit.SampleAudit.check", ["data.audit_every=3"], 2),  # after step 3, and before the checkpoint
        ("replay.replay_step", ["guard.replay_every=2", "model.dropout=0"], 2),
        ("repetition_log.find_repetitions", [], 1),
        ("weight_checks.ReplicaCheck._check", ["guard.digest_every=3"], 2),
        ("guard.Guard.check_weights_finite", [], 1),
        ("stragglers.StragglerMonitor.gather_report", [], 4),  # two intervals of steps, and two evaluations
        ("resume.EarlierSteps.compare", [], 4),
    ],
)
def test_the_features_of_the_trainer_are_called(
    function: str,
    overrides: list[str],
    num_calls: int,
    make_run_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(f"dist_llm.training.{function}", lambda *args: calls.append(args) or [])
    run_on_rank(make_run_config(*overrides), Extensions())
    assert len(calls) == num_calls


class Named(Callback):
    """A callback and evaluator with names that the test chooses, which returns `row`."""

    def __init__(self, *names: str, row: MetricsRow | None = None) -> None:
        self.metric_names, self.row = names, row or {}

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
        return [self.row]

    def evaluate(self, state: TrainingState) -> MetricsRow:
        return self.row


@pytest.mark.parametrize(
    ("callbacks", "evaluators", "message"),
    [
        ([Named("a"), Named("a")], [], "Named: the metric a has the same name as a of Named"),
        ([Named("a")], [Named("a")], "Named: the metric a has the same name as a of Named"),
        ([Named("loss")], [], "Named: the metric loss has the same name as loss of the trainer"),
        ([], [Named("heldout_loss_books")], "heldout_loss_books has the same name as heldout_loss_[*] of the trainer"),
        ([], [Named("b", "accuracy_x"), Named("accuracy_*")], "accuracy_[*] has the same name as accuracy_x of Named"),
        ([], [Named("accuracy_*"), Named("accuracy_x")], "accuracy_x has the same name as accuracy_[*] of Named"),
        ([], [Named("*")], "stands for all names"),
        ([Named], [], "callbacks: Named is a class; pass an instance, such as Named()"),
        ([], [CallRecorder], "evaluators: CallRecorder is a class"),
        ([object()], [], "callbacks: object is no subclass of dist_llm.training.callback.Callback"),
        ([], [object()], r"evaluators: object has no method evaluate\(state\)"),
    ],
)
def test_unusable_extensions_are_refused(callbacks: Any, evaluators: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Extensions(callbacks, evaluators).check()


def test_metric_names_must_be_a_sequence() -> None:
    class Evaluator:
        metric_names = "accuracy"

        def evaluate(self, state: TrainingState) -> MetricsRow:
            return {}

    with pytest.raises(ConfigError, match="Evaluator: metric_names must be a tuple of metric names, found 'accuracy'"):
        Extensions(evaluators=(Evaluator(),)).check()


def test_different_names_are_accepted() -> None:
    Extensions((Named("a", "b"), Named()), (Named("heldout_accuracy"), Named("accuracy_*"), Named("c"))).check()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"b": 1.0}, "Named: returned the metric 'b', which is not in its metric_names; add it there"),
        ({"a": torch.ones(())}, "Named: the metric a is of type Tensor; return an int or a float"),
        ({"a": "text"}, "the metric a is of type str"),
    ],
)
@pytest.mark.parametrize("kind", ["callbacks", "evaluators"])
def test_a_wrong_row_ends_the_run(kind: str, row: Any, message: str, make_run_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=message):
        run_on_rank(make_run_config(), Extensions(**{kind: [Named("a", row=row)]}))  # type: ignore[arg-type]


def test_rows_of_callbacks_and_evaluators_are_logged(make_run_config: Callable[..., Config]) -> None:
    config = make_run_config()
    callback = Named("a", row={"a": 0.5, "event": "half"})
    run_on_rank(config, Extensions((callback,), (Named("heldout_accuracy", row={"heldout_accuracy": 0.25}),)))
    rows = read_metrics(config)
    assert [row for row in rows if "a" in row] == [{"step": step, "a": 0.5, "event": "half"} for step in (2, 2, 4, 4)]
    evaluation_rows = [row for row in rows if "heldout_loss" in row]
    assert [(row["step"], row["heldout_accuracy"]) for row in evaluation_rows] == [(2, 0.25), (4, 0.25)]


def test_the_names_of_the_trainer_are_reserved(make_run_config: Callable[..., Config], tmp_path: Path) -> None:
    """A run with all kinds of metrics has no metric that an extension could also use."""
    (tmp_path / "second").mkdir()
    write_corpus(tmp_path / "second")
    paths = {"x": tmp_path / "corpus", "y": tmp_path / "second"}
    sources = [f"{{name: {name}, path: '{path}', weight: 1}}" for name, path in paths.items()]
    config = make_run_config(
        *("data.path=''", f"data.sources=[{', '.join(sources)}]", "loss.z_loss=0.01", "loss.label_smoothing=0.1"),
        "model.feedforward={name: moe, n_experts: 4, top_k: 2, d_expert: 8, balance_loss: 0.1}",
        *("eval.sample_prompt='a'", "eval.sample_tokens=2"),
    )
    run_on_rank(config, Extensions())
    names = {name for _, row in read_rows(Path(config.run.dir) / "metrics.jsonl") for name in row} - {"step"}
    assert {"z_loss", "tokens_x", "heldout_loss_y", "expert_load", "sample"} <= names
    for name in names:
        with pytest.raises(ConfigError, match="of the trainer"):
            Extensions((Named(name),)).check()
    assert {"busy_seconds", "event", "step"} <= set(TRAINER_METRICS)
