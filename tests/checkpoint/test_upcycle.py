"""A model with experts starts from a dense checkpoint: it computes the same function on every layout."""

import logging
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.probe import PROBE_FILE
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.load import dump_config
from dist_llm.config.schema import Config
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import CheckpointError
from dist_llm.training import resume
from dist_llm.training.resume import start_from_weights
from dist_llm.training.step import train_step
from tests.laws.law import copy_full_tensor, make_batches, make_layout_config, save_checkpoint
from tests.laws.layouts import ADAMW, Layout
from tests.laws.worlds import run_on_ranks

CPU = torch.device("cpu")
ONE = Layout(ranks=1)
LAYOUTS = [
    ONE,
    Layout(ranks=2, parallel={"dp_shard": 2}),
    Layout(ranks=2, parallel={"tp": 2, "ep": 2}),
    Layout(ranks=2, parallel={"pp": 2}, micro_batch=6),
    pytest.param(Layout(ranks=4, parallel={"dp_shard": 4, "ep": 2}), marks=pytest.mark.slow),
    pytest.param(Layout(ranks=4, parallel={"pp": 2, "cp": 2, "ep": 2}, micro_batch=6), marks=pytest.mark.slow),
]
DENSE = {"feedforward_bias": True}
MOE = {"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 48, "selection_bias": True, "router_bias": True}


def make_upcycled_config(layout: Layout, *, init_optimizer: str = "fresh", **moe: Any) -> Config:
    """Return the config of a run with experts that starts from a dense checkpoint; `moe` changes keys of MOE."""
    model = {**DENSE, "d_ff": None, "feedforward": {**MOE, **moe}}
    init = {"init_from": "dense", "init_allow": ["model.feedforward"], "init_optimizer": init_optimizer}
    return make_layout_config(layout, optim=ADAMW, model=model, run={"seed": 8}, **init)


class DenseRun(NamedTuple):
    """A checkpoint of a dense model."""

    path: Path
    weights: dict[str, Tensor]
    next_loss: float  # of the step after the checkpoint


class UpcycledStart(NamedTuple):
    """A model with experts that started from a dense checkpoint."""

    weights: dict[str, Tensor]  # full tensors
    next_loss: float  # of the first step


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> DenseRun:
    """A run of a dense model, saved after two steps."""
    config = make_layout_config(ONE, optim=ADAMW, model=DENSE)
    engine = NativeEngine(config, CPU)
    for step in range(2):
        train_step(engine, make_batches(config, engine, step), lr=1e-2, step=step)
    files = {"config.yaml": dump_config(config).encode(), PROBE_FILE: measure_probe(engine, config).dump()}
    path = save_checkpoint(CheckpointStore(tmp_path_factory.mktemp("dense")), engine, Progress(step=2), files)
    weights = {name: copy_full_tensor(tensor) for name, tensor in engine.state.weights().items()}
    loss = train_step(engine, make_batches(config, engine, step=2), lr=1e-2, step=2).loss.item()
    return DenseRun(path, weights, loss)


def start_and_train(config: Config, path: Path) -> UpcycledStart:
    """Start from the dense checkpoint `path` on this rank, and take one step."""
    engine = NativeEngine(config, CPU)
    start_from_weights(path, engine, config)
    weights = {name: copy_full_tensor(tensor) for name, tensor in engine.state.weights().items()}
    loss = train_step(engine, make_batches(config, engine, step=2), lr=1e-2, step=2).loss.item()
    return UpcycledStart(weights, loss)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_expert_is_a_copy_of_the_dense_layer(layout: Layout, dense_run: DenseRun) -> None:
    path, dense_weights, dense_loss = dense_run
    config = make_upcycled_config(layout)
    results = run_on_ranks(layout.ranks, start_and_train, config, path)
    weights = {name: tensor for result in results for name, tensor in result.weights.items()}
    fresh_engine = NativeEngine(make_upcycled_config(ONE), CPU)
    initial_weights = {name: copy_full_tensor(tensor) for name, tensor in fresh_engine.state.weights().items()}
    assert weights.keys() == initial_weights.keys()
    for name, tensor in weights.items():
        if ".experts." in name:
            dense = dense_weights[name.replace(".experts.", ".")]
            assert torch.equal(tensor, dense.expand(4, *dense.shape)), name
        elif ".feedforward." in name:
            assert torch.equal(tensor, initial_weights[name]), f"{name} has not its initial value"
        else:
            assert torch.equal(tensor, dense_weights[name]), name
    assert all(result.next_loss == pytest.approx(dense_loss, rel=1e-6) for result in results)


def test_the_probe_confirms_the_function(dense_run: DenseRun, caplog: pytest.LogCaptureFixture) -> None:
    path = dense_run.path
    with caplog.at_level(logging.INFO, "dist_llm"):
        start_and_train(make_upcycled_config(ONE), path)
    assert "of experts that are copies of a dense layer: model.blocks.0.feedforward.experts.down.bias" in caplog.text
    assert "the probe is not compared" not in caplog.text


def test_another_scale_of_the_weights_changes_the_function(
    dense_run: DenseRun, caplog: pytest.LogCaptureFixture
) -> None:
    """The negative control of the equal losses. Such a run starts, but its probe is not compared."""
    for change in ({"weight_scale": 1.5}, {"normalize_weights": False}):
        caplog.clear()
        with caplog.at_level(logging.INFO, "dist_llm"):
            loss = start_and_train(make_upcycled_config(ONE, **change), dense_run.path).next_loss
        assert "the probe is not compared, because init_allow changes model.feedforward" in caplog.text
        assert loss != pytest.approx(dense_run.next_loss, rel=1e-4)


def test_experts_of_another_layer_are_detected(dense_run: DenseRun) -> None:
    """Planted bug: all experts are copies of the first layer."""
    path = dense_run.path
    find_dense_sources = resume._find_dense_sources

    def find_sources_in_first_layer(*args: Any) -> dict[str, str]:
        return {name: f"model.blocks.0.{source.split('.', 3)[3]}" for name, source in find_dense_sources(*args).items()}

    plant = patch.object(resume, "_find_dense_sources", find_sources_in_first_layer)
    with plant, pytest.raises(CheckpointError, match="probe"):
        start_and_train(make_upcycled_config(ONE), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_expert": 24}, r"d_expert: .* has 48 hidden units \(now 24\); set d_expert=48"),
        ({"n_shared_experts": 1}, "n_shared_experts: 1 shared experts would be added .*; remove the key"),
    ],
    ids=["d_expert", "shared experts"],
)
def test_other_experts_are_refused(change: dict[str, Any], message: str, dense_run: DenseRun) -> None:
    path = dense_run.path
    with pytest.raises(CheckpointError, match=message):
        start_and_train(make_upcycled_config(ONE, **change), path)


def test_experts_need_init_allow_and_a_fresh_optimizer(dense_run: DenseRun) -> None:
    path = dense_run.path
    with pytest.raises(CheckpointError, match=r"set init_allow=\[model.feedforward\]"):
        start_and_train(make_upcycled_config(ONE).model_copy(update={"init_allow": ()}), path)
    with pytest.raises(CheckpointError, match=r"no optimizer state of .*experts.*set init_optimizer: fresh"):
        start_and_train(make_upcycled_config(ONE, init_optimizer="keep"), path)
