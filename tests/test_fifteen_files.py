"""A step of any layout reads in at most fifteen files: from its microbatches to the new weights.

Making the microbatches is the loader's, ahead of the step and in a thread of its own, the same on every
layout: four files, counted apart. So is the one of products in float8.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_llm
from dist_llm.config.schema import Config
from dist_llm.data.history import fresh_plan
from dist_llm.data.loader import build_loader
from dist_llm.data.shard import Manifest, ShardWriter
from dist_llm.engines.native import NativeEngine
from dist_llm.objectives.vocabulary import Vocabulary
from dist_llm.train.step import train_step
from tests.laws.law import MODEL, ROWS, SEQ_LEN, config_of
from tests.laws.worlds import world

MOST = 15
BATCH = {
    "data/corpus.py",
    "data/loader.py",
    "data/order.py",
    "data/plan.py",
    "data/streams.py",
    "objectives/build.py",
}
PACKAGE = Path(dist_llm.__file__).parent
ADAMW = {"clip": 1.0, "name": "adamw", "lr": 1e-3}


def files_that_run(function: Callable[[], object]) -> set[str]:
    """The files of the package in which a Python function runs while `function` does."""
    seen: set[str] = set()

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return {Path(name).relative_to(PACKAGE).as_posix() for name in seen if Path(name).is_relative_to(PACKAGE)}


def files_of(config: Config) -> tuple[set[str], set[str]]:
    """What this rank runs to make a batch, and to take a step on it."""
    engine = NativeEngine(config, torch.device("cpu"))
    vocabulary = Vocabulary(MODEL["vocab_size"], 0)
    loader = build_loader(config, fresh_plan(config), vocabulary, *engine.data_rank, pin=False)
    train_step(engine, loader.batches(0), 1e-3, step=0)  # what only the first step does is no part of a step
    batch = files_that_run(lambda: loader.batches(config.data.global_batch))
    batches = loader.batches(config.data.global_batch)
    return batch, files_that_run(lambda: train_step(engine, batches, 1e-3, step=1))


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
        (4, {"dp_shard": 2, "tp": 2}),
        (4, {"cp": 2, "tp": 2}),
        (4, {"pp": 2, "tp": 2}),
        (4, {"pp": 2, "cp": 2}),
        (8, {"pp": 2, "cp": 2, "tp": 2}),
        (8, {"pp": 2, "dp_shard": 2, "cp": 2}),
    ],
    ids=str,
)
def test_a_step_reads_in_at_most_fifteen_files(ranks: int, parallel: dict[str, Any], corpus: Path) -> None:
    data = {"path": str(corpus), "prefetch": 0, "micro_batch": 6}
    model = {"tie_embeddings": True, "dropout": 0.1}
    config = config_of(ranks, model, optim=ADAMW, data=data, parallel=parallel)
    found = world(ranks).run(files_of, config) if ranks > 1 else [files_of(config)]
    for rank, (batch, step) in enumerate(found):
        assert batch | {"data/order.py", "data/plan.py"} == BATCH  # places are found for many steps at a time
        assert {"train/step.py", "engines/native.py", "models/block.py"} <= step
        assert len(step) <= MOST, f"rank {rank} needs {len(step)} files: {', '.join(sorted(step))}"


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (4, {"pp": 2, "tp": 2})], ids=str)
def test_float8_is_one_file_more(ranks: int, parallel: dict[str, Any], corpus: Path) -> None:
    data = {"path": str(corpus), "prefetch": 0, "micro_batch": 6}
    model = {"tie_embeddings": True, "n_kv_heads": 8, "d_ff": 64}
    found = []
    for fp8 in (False, True):
        config = config_of(ranks, model, optim=ADAMW, data=data, parallel=parallel, precision="bf16", fp8=fp8)
        found.append(world(ranks).run(files_of, config) if ranks > 1 else [files_of(config)])
    for (_, without), (_, step) in zip(*found, strict=True):
        assert step - without == {"parallel/fp8.py"}, "where there are fifteen without it, they are sixteen"
        assert len(without) <= MOST
