"""The garbage collector does not run within a step, and reference cycles do not accumulate."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import pytest

from dist_llm.config.schema import Config
from dist_llm.data.shard import CorpusManifest, ShardWriter
from dist_llm.launch.world import World
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.training import build_callbacks, trainer
from dist_llm.training.callback import Callback, TrainingState
from dist_llm.training.gc_control import GCControl
from dist_llm.training.run import train
from dist_llm.training.settings import read_config

STEPS, CYCLES, LOG_EVERY = 50, 1000, 5


class Node:
    """An object that references itself, so that only the garbage collector can free it."""

    def __init__(self) -> None:
        self.itself = self


class StepRecorder:
    """Wraps train_step so that each step creates reference cycles.

    It counts the collections within steps, and the objects that remain after each step.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step, self.in_step = step, False
        self.collections, self.remaining = 0, list[int]()
        self.nodes: WeakSet[Node] = WeakSet()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.in_step = True
        for _ in range(CYCLES):
            self.nodes.add(Node())
        report = self.step(*args, **kwargs)
        self.in_step = False
        self.remaining.append(len(self.nodes))
        return report

    def on_collection(self, phase: str, _: Any) -> None:
        self.collections += self.in_step and phase == "start"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The config of a tiny run with its corpus."""
    tokenizer = build_tokenizer("byte")
    tokenizer.save(tmp_path)
    with ShardWriter(tmp_path, "train", "uint16", max_tokens=100) as writer:
        writer.add(tokenizer.encode("to be or not to be, that is the question"), text_bytes=40)
        shards: Any = {"train": writer.close(), "heldout": ()}
    CorpusManifest("uint16", tokenizer.vocab_size, tokenizer.sha256, ("here",), shards).save(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{dir: '{tmp_path / 'run'}', steps: {STEPS}}}\nmodel: {{d_model: 8, n_layers: 1, n_heads: 1}}\n"
        f"data: {{path: '{tmp_path}', seq_len: 4, global_batch: 1}}\n"
        f"log: {{peak_tflops: 1.0, every: {LOG_EVERY}}}\ncheckpoint: {{every: 25}}\n"
    )
    return read_config(path, [], world_size=1)


@pytest.fixture
def step_recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepRecorder]:
    """A recorder of the garbage collections during training steps."""
    recorder = StepRecorder(trainer.train_step)
    monkeypatch.setattr(trainer, "train_step", recorder)
    gc.callbacks.append(recorder.on_collection)
    yield recorder
    gc.callbacks.remove(recorder.on_collection)


def test_no_collection_runs_within_a_step(config: Config, step_recorder: StepRecorder) -> None:
    assert train(config, World()) == 0
    assert len(step_recorder.remaining) == STEPS
    assert step_recorder.collections == 0
    assert max(step_recorder.remaining) <= LOG_EVERY * CYCLES
    assert gc.isenabled()


def test_the_collector_runs_within_steps_without_gc_control(
    config: Config, step_recorder: StepRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without GCControl the collector runs within steps, so the test above can fail."""
    monkeypatch.setattr(build_callbacks, "GCControl", Callback)
    train(config, World())
    assert step_recorder.collections >= STEPS  # one for each 700 objects


@pytest.mark.parametrize("enabled", [True, False])
def test_a_failure_restores_the_collector_state(config: Config, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "train_step", lambda *args, **kwargs: 1 / 0)
    frozen = gc.get_freeze_count()
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            train(config, World())
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert gc.get_freeze_count() == frozen


def test_a_full_collection_frees_old_objects() -> None:
    """An evaluation and a checkpoint free old objects; the metrics of steps free young objects only."""
    gc_control, state = GCControl(), cast(TrainingState, None)
    full_collections: list[Callable[[], object]] = [
        lambda: gc_control.on_metrics(state, [{"step": 1, "heldout_loss": 1.0}]),
        lambda: gc_control.before_save(state),
    ]
    gc_control.on_start(state)
    try:
        for collect_all in full_collections:
            nodes: WeakSet[Node] = WeakSet()
            node = Node()
            nodes.add(node)
            for _ in range(2):
                gc_control.on_metrics(state, [{"step": 1, "loss": 1.0}])
            del node
            gc_control.on_metrics(state, [{"step": 1, "loss": 1.0}])
            assert len(nodes) == 1
            collect_all()
            assert not nodes
    finally:
        gc_control.close(state)
