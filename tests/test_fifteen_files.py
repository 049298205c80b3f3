"""A step of any layout, its batch included, reads in at most fifteen files."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_llm
from dist_llm.config.schema import Config
from dist_llm.data.corpus import Corpus
from dist_llm.data.loader import Loader, build_order
from dist_llm.data.shard import Manifest, ShardWriter
from dist_llm.engines.native import NativeEngine
from dist_llm.objectives.causal import causal
from dist_llm.train.step import train_step
from tests.laws.law import MODEL, ROWS, SEQ_LEN, config_of
from tests.laws.worlds import world

MOST = 15
PACKAGE = Path(dist_llm.__file__).parent
DENSE = {"clip": 1.0, "name": "adamw", "lr": 1e-3}


def files_of_a_step(config: Config) -> list[str]:
    """The files of the package in which a function runs while this rank makes a batch and takes a step."""
    engine = NativeEngine(config, torch.device("cpu"))
    corpus = Corpus(Path(config.data.path))
    order = build_order(config.data, corpus, config.run.seed)
    loader = Loader(corpus, order, causal, config.data, *engine.data_rank, pin=False)
    train_step(engine, loader.batches(0), 1e-3, step=0)  # what happens only in the first step is not the step
    seen: set[str] = set()

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen.add(frame.f_code.co_filename)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        train_step(engine, loader.batches(config.data.global_batch), 1e-3, step=1)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return sorted(
        Path(name).relative_to(PACKAGE).as_posix() for name in seen if Path(name).is_relative_to(PACKAGE)
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps' worth of random tokens."""
    directory = tmp_path_factory.mktemp("tokens")
    writer = ShardWriter(directory, "train", "uint16", max_tokens=1 << 20)
    size = 2 * ROWS * SEQ_LEN + 1
    writer.add(np.random.default_rng(0).integers(0, MODEL["vocab_size"], size), text_bytes=size)
    shards: Any = {"train": writer.close(), "heldout": ()}
    Manifest("uint16", MODEL["vocab_size"], "none", ("random",), shards).save(directory)
    return directory


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {"dp_shard": 2}),
        (2, {"dp_replicate": 2}),
        (2, {"tp": 2}),
        (2, {"tp": 2, "sequence_parallel": False}),
        (2, {"cp": 2}),
        (2, {"pp": 2}),
        (4, {"cp": 2, "tp": 2}),
        (4, {"pp": 2, "tp": 2}),
        (4, {"pp": 2, "cp": 2}),
    ],
    ids=str,
)
def test_a_step_reads_in_at_most_fifteen_files(ranks: int, parallel: dict[str, Any], corpus: Path) -> None:
    data = {"path": str(corpus), "prefetch": 0, "micro_batch": 6}
    config = config_of(ranks, {"tie_embeddings": True, "dropout": 0.1}, optim=DENSE, data=data, parallel=parallel)
    found = world(ranks).run(files_of_a_step, config) if ranks > 1 else [files_of_a_step(config)]
    for rank, files in enumerate(found):
        assert {"train/step.py", "engines/native.py", "data/loader.py"} <= set(files)
        assert len(files) <= MOST, f"rank {rank} needs {len(files)} files: {', '.join(files)}"
