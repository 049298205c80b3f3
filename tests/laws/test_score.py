"""Evaluation returns the loss of one process on every layout, and does not change the training steps around it."""

from typing import NamedTuple

import pytest
import torch

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models.kv_cache import KVCache
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config, make_layout_config
from tests.laws.layouts import MODELS, SGD, Layout
from tests.laws.worlds import get_world, run_on_ranks

HELDOUT_STEP = 100  # the number of a batch on which no test trains
LAYOUTS = [
    Layout(ranks=2, parallel={"dp_shard": 2}, model="tied"),
    Layout(ranks=2, parallel={"tp": 2}, model="tied"),
    Layout(ranks=2, parallel={"cp": 2}, model="tied"),
    Layout(ranks=2, parallel={"pp": 2}, model="tied", micro_batch=6),
    Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, model="tied", micro_batch=6),
    Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2}, model="tied", micro_batch=3),
    Layout(ranks=4, parallel={"cp": 2, "tp": 2}, model="tied"),
]


def measure_heldout_losses(config: Config) -> list[float]:
    """Return the summed loss of a held-out batch before, between and after two training steps."""
    engine, losses = NativeEngine(config, torch.device("cpu")), []
    for step in range(3):
        heldout = [engine.to_local_batch(batch) for batch in make_batches(config, engine, step=HELDOUT_STEP)]
        losses.append(sum(engine.all_reduce_over_loss_axes(engine.score(batch).sum()).item() for batch in heldout))
        train_step(engine, make_batches(config, engine, step), config.optim.lr, step)
    return losses


REGULARIZED_LOSS = {"z_loss": 1e-2, "label_smoothing": 0.1}


class MeasuredLosses(NamedTuple):
    """The held-out loss before a step, and the loss of the step with its terms."""

    heldout_loss: float
    loss: float
    cross_entropy: float
    z_loss: float


def measure_loss_terms(config: Config) -> MeasuredLosses:
    """Evaluate, take a step and return its losses on this rank."""
    engine = NativeEngine(config, torch.device("cpu"))
    heldout = [engine.to_local_batch(batch) for batch in make_batches(config, engine, step=HELDOUT_STEP)]
    heldout_loss = sum(engine.all_reduce_over_loss_axes(engine.score(batch).sum()).item() for batch in heldout)
    report = train_step(engine, make_batches(config, engine, step=0), config.optim.lr, with_loss_terms=True)
    assert report.loss_terms is not None
    cross_entropy, z_loss = report.loss_terms.tolist()
    return MeasuredLosses(heldout_loss, report.loss.item(), cross_entropy, z_loss)


def list_optimizer_state_names(config: Config) -> tuple[set[str], set[str]]:
    """Return the names of the optimizer state after a step, and after a following evaluation."""
    engine = NativeEngine(config, torch.device("cpu"))
    train_step(engine, make_batches(config, engine, step=0), config.optim.lr)
    before = set(engine.state.moments())
    engine.score(engine.to_local_batch(make_batches(config, engine, step=1)[0]))
    return before, set(engine.state.moments())


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "dp_shard" in layout.parallel], ids=str)
def test_a_checkpoint_after_an_evaluation_is_complete(layout: Layout) -> None:
    """FSDP leaves the last block unsharded after forward; the checkpoint must have its moments."""
    adamw = {"name": "adamw", "lr": 1e-3}
    config = make_layout_config(layout, optim=adamw)
    for before, after in get_world(layout.ranks).run(list_optimizer_state_names, config):
        assert before
        assert after == before


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_evaluates_to_the_loss_of_one_process(layout: Layout) -> None:
    config = make_layout_config(layout, optim=SGD)
    expected = measure_heldout_losses(make_config(ranks=1, model=MODELS[layout.model], optim=SGD))
    for rank, actual in enumerate(get_world(layout.ranks).run(measure_heldout_losses, config)):
        assert actual == pytest.approx(expected, rel=1e-5), f"rank {rank}"


def fill_kv_cache() -> int:
    """Run three tokens through a sharded bf16 model with a KV cache; return the length of the cache."""
    engine = NativeEngine(make_config(ranks=2, precision="bf16", parallel={"dp_shard": 2}), torch.device("cpu"))
    cache = KVCache()
    with torch.no_grad():
        engine.model_parts[0](torch.tensor([[1, 2, 3]]), cache=cache)
    return cache.length


def test_a_sharded_model_in_bf16_fills_the_kv_cache_of_the_caller() -> None:
    """The input casting of FSDP must not pass a copy of the cache to the model."""
    assert get_world(2).run(fill_kv_cache) == [3, 3]


@pytest.mark.parametrize("layout", [Layout(ranks=1, model="tied"), *LAYOUTS], ids=str)
def test_the_heldout_loss_has_no_regularization_terms(layout: Layout) -> None:
    """The training loss has z-loss and label smoothing and reports its terms; the held-out loss is cross-entropy."""
    config, model = make_layout_config(layout, optim=SGD, loss=REGULARIZED_LOSS), MODELS[layout.model]
    unregularized = make_config(ranks=1, model=model, optim=SGD, loss={})
    engine = NativeEngine(unregularized, torch.device("cpu"))
    heldout = sum(engine.score(batch).sum().item() for batch in make_batches(unregularized, engine, step=HELDOUT_STEP))
    cross_entropy = train_step(engine, make_batches(unregularized, engine, step=0), SGD["lr"]).loss.item()
    expected = measure_loss_terms(make_config(ranks=1, model=model, optim=SGD, loss=REGULARIZED_LOSS))
    assert expected.heldout_loss == pytest.approx(heldout, rel=1e-6)
    assert expected.cross_entropy == pytest.approx(cross_entropy, rel=1e-6)
    assert expected.loss > cross_entropy + 0.2, "the terms must be large enough to be detected"
    for rank, actual in enumerate(run_on_ranks(layout.ranks, measure_loss_terms, config)):
        assert actual == pytest.approx(expected, rel=1e-5), f"rank {rank}"
