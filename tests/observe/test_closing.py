"""A run closes all its sinks at the end, also after a failure."""

import pytest

from dist_llm.data.shard import CorpusManifest, ShardWriter
from dist_llm.launch.world import World
from dist_llm.observe.console import ConsoleSink
from dist_llm.observe.metrics import MetricsFile
from dist_llm.observe.tensorboard import TensorBoard
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.training import trainer
from dist_llm.training.run import train
from dist_llm.training.settings import read_config

SINKS = (MetricsFile, TensorBoard, ConsoleSink)


@pytest.fixture
def config(tmp_path):
    """Two steps of a tiny model on a corpus of bytes."""
    tokenizer = build_tokenizer("byte")
    tokenizer.save(tmp_path)
    with ShardWriter(tmp_path, "train", "uint16", max_tokens=100) as writer:
        writer.add(tokenizer.encode("to be or not to be, that is the question"), text_bytes=40)
        shards = {"train": writer.close(), "heldout": ()}
    CorpusManifest("uint16", tokenizer.vocab_size, tokenizer.sha256, ("here",), shards).save(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{dir: '{tmp_path / 'run'}', steps: 2}}\nmodel: {{d_model: 8, n_layers: 1, n_heads: 1}}\n"
        f"data: {{path: '{tmp_path}', seq_len: 4, global_batch: 1}}\nlog: {{peak_tflops: 1.0}}\n"
    )
    return read_config(path, [], world_size=1)


@pytest.fixture
def closed_sinks(monkeypatch):
    """Return the types of the sinks closed so far. Checkpoints are disabled."""
    monkeypatch.setattr(trainer.Trainer, "save", lambda self: None)
    types = []
    for kind in SINKS:
        original = kind.close
        monkeypatch.setattr(kind, "close", lambda self, original=original: types.append(type(self)) or original(self))
    return types


def test_a_run_closes_its_sinks(config, closed_sinks):
    train(config, World())
    assert sorted(closed_sinks, key=SINKS.index) == [*SINKS]


def test_a_failed_run_closes_its_sinks(config, closed_sinks, monkeypatch):
    monkeypatch.setattr(trainer, "train_step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config, World())
    assert sorted(closed_sinks, key=SINKS.index) == [*SINKS]
