"""The collector does not run within a step, and cycles do not pile up."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest

from dist_llm.config.schema import Config
from dist_llm.data.shard import Manifest, ShardWriter
from dist_llm.launch.world import World
from dist_llm.text.vocabulary import build_tokenizer
from dist_llm.train import trainer
from dist_llm.train.gc_control import GCControl
from dist_llm.train.run import train
from dist_llm.train.settings import read_config

STEPS, CYCLES, EVERY = 50, 1000, 5


class Node:
    """Held by itself: only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


class Watched:
    """Steps of a run, each of which leaves cycles behind: collections within them, and how many are left after each."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step, self.within = step, False
        self.collections, self.left = 0, list[int]()
        self.nodes: WeakSet[Node] = WeakSet()

    def __call__(self, *args: Any) -> Any:
        self.within = True
        for _ in range(CYCLES):
            self.nodes.add(Node())
        report = self.step(*args)
        self.within = False
        self.left.append(len(self.nodes))
        return report

    def note(self, phase: str, _: Any) -> None:
        self.collections += self.within and phase == "start"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    tokenizer = build_tokenizer("byte", None, list)
    tokenizer.save(tmp_path)
    with ShardWriter(tmp_path, "train", "uint16", 100) as writer:
        writer.add(tokenizer.encode("to be or not to be, that is the question"), text_bytes=40)
        shards: Any = {"train": writer.close(), "heldout": ()}
    Manifest("uint16", tokenizer.vocab_size, tokenizer.sha256, ("here",), shards).save(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{dir: '{tmp_path / 'run'}', steps: {STEPS}}}\nmodel: {{d_model: 8, n_layers: 1, n_heads: 1}}\n"
        f"data: {{path: '{tmp_path}', seq_len: 4, global_batch: 1}}\n"
        f"log: {{peak_tflops: 1.0, every: {EVERY}}}\ncheckpoint: {{every: 25}}\n"
    )
    return read_config(path, [], 1)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    found = Watched(trainer.train_step)
    monkeypatch.setattr(trainer, "train_step", found)
    gc.callbacks.append(found.note)
    yield found
    gc.callbacks.remove(found.note)


def test_nothing_is_collected_within_a_step_and_cycles_do_not_pile_up(config: Config, watched: Watched) -> None:
    assert train(config, World()) == 0
    assert len(watched.left) == STEPS
    assert watched.collections == 0
    assert max(watched.left) <= EVERY * CYCLES
    assert gc.isenabled()


def test_the_collector_alone_runs_within_steps(
    config: Config, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would see if the trainer left it to itself."""
    monkeypatch.setattr(trainer, "GCControl", lambda: nullcontext(SimpleNamespace(collect=lambda full=False: None)))
    train(config, World())
    assert watched.collections >= STEPS  # one for each 700 objects


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before_whatever_the_end(
    config: Config, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "train_step", lambda *rest: 1 / 0)
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


def test_what_outlived_a_collection_is_found_by_a_full_one() -> None:
    with GCControl() as gc_control:
        nodes: WeakSet[Node] = WeakSet()
        held = Node()
        nodes.add(held)
        for _ in range(2):
            gc_control.collect()
        del held
        gc_control.collect()
        assert len(nodes) == 1
        gc_control.collect(full=True)
        assert not nodes
