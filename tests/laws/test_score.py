"""Evaluation returns one process's loss on every layout and does not change the training around it."""

import pytest
import torch

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models.attention import KVCache
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config
from tests.laws.layouts import MODELS, SGD, Layout
from tests.laws.worlds import world

LAYOUTS = [
    Layout(2, {"dp_shard": 2}, "tied"),
    Layout(2, {"tp": 2}, "tied"),
    Layout(2, {"cp": 2}, "tied"),
    Layout(2, {"pp": 2}, "tied", 6),
    Layout(2, {"pp": 2, "pp_schedule": "zbv"}, "tied", 6),
    Layout(4, {"pp": 2, "dp_shard": 2}, "tied", 3),
    Layout(4, {"cp": 2, "tp": 2}, "tied"),
]


def heldout_losses(config: Config) -> list[float]:
    """Return the summed loss of a held-out batch before, between and after two training steps."""
    engine, losses = NativeEngine(config, torch.device("cpu")), []
    for step in range(3):
        heldout = [engine.to_local_batch(batch) for batch in make_batches(config, engine, 100)]
        losses.append(sum(engine.all_reduce_over_data(engine.score(batch).sum()).item() for batch in heldout))
        train_step(engine, make_batches(config, engine, step), config.optim.lr, step)
    return losses


REGULARISED = {"z_loss": 1e-2, "label_smoothing": 0.1}


def loss_terms(config: Config) -> list[float]:
    """Return the held-out loss before a step, and loss, cross-entropy and z-loss of the step."""
    engine = NativeEngine(config, torch.device("cpu"))
    heldout = [engine.to_local_batch(batch) for batch in make_batches(config, engine, 100)]
    before = sum(engine.all_reduce_over_data(engine.score(batch).sum()).item() for batch in heldout)
    report = train_step(engine, make_batches(config, engine, 0), config.optim.lr, with_loss_terms=True)
    assert report.loss_terms is not None
    return [before, report.loss.item(), *report.loss_terms.tolist()]


def optimizer_state_names(config: Config) -> tuple[set[str], set[str]]:
    """Return the names of the optimizer state after a step, and after a following evaluation."""
    engine = NativeEngine(config, torch.device("cpu"))
    train_step(engine, make_batches(config, engine, 0), config.optim.lr)
    before = set(engine.state.moments())
    engine.score(engine.to_local_batch(make_batches(config, engine, 1)[0]))
    return before, set(engine.state.moments())


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if "dp_shard" in each.parallel], ids=str)
def test_a_checkpoint_after_an_evaluation_is_complete(layout: Layout) -> None:
    """FSDP leaves the last block unsharded after forward; its moments were once missing from the checkpoint."""
    adamw = {"name": "adamw", "lr": 1e-3}
    model, data = MODELS[layout.model] | {"dropout": 0.0}, {"micro_batch": layout.micro}
    config = make_config(layout.ranks, model, optim=adamw, parallel=layout.parallel, data=data)
    for before, after in world(layout.ranks).run(optimizer_state_names, config):
        assert before
        assert after == before


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_evaluates_to_the_loss_of_one_process(layout: Layout) -> None:
    model = MODELS[layout.model] | {"dropout": 0.0}
    config = make_config(layout.ranks, model, optim=SGD, parallel=layout.parallel, data={"micro_batch": layout.micro})
    expected = heldout_losses(make_config(1, model, optim=SGD))
    for rank, actual in enumerate(world(layout.ranks).run(heldout_losses, config)):
        assert actual == pytest.approx(expected, rel=1e-5), f"rank {rank}"


def filled_cache_length() -> int:
    engine = NativeEngine(make_config(2, {}, precision="bf16", parallel={"dp_shard": 2}), torch.device("cpu"))
    cache = KVCache()
    with torch.no_grad():
        engine.model_parts[0](torch.tensor([[1, 2, 3]]), cache=cache)
    return cache.length


def test_a_sharded_model_in_bf16_fills_the_callers_kv_cache() -> None:
    """FSDP's input casting once passed a copy of the cache to the model."""
    assert world(2).run(filled_cache_length) == [3, 3]


@pytest.mark.parametrize("layout", [Layout(1, {}, "tied"), *LAYOUTS], ids=str)
def test_the_heldout_loss_is_plain_cross_entropy_and_training_reports_loss_terms(layout: Layout) -> None:
    """The training loss has z-loss and label smoothing; the held-out loss has neither, on any layout."""
    model, data = MODELS[layout.model] | {"dropout": 0.0}, {"micro_batch": layout.micro}
    config = make_config(layout.ranks, model, optim=SGD, parallel=layout.parallel, data=data, loss=REGULARISED)
    plain = make_config(1, model, optim=SGD, loss={})
    engine = NativeEngine(plain, torch.device("cpu"))
    heldout = sum(engine.score(batch).sum().item() for batch in make_batches(plain, engine, 100))
    cross_entropy = train_step(engine, make_batches(plain, engine, 0), SGD["lr"]).loss.item()
    expected = loss_terms(make_config(1, model, optim=SGD, loss=REGULARISED))
    assert expected[0] == pytest.approx(heldout, rel=1e-6)
    assert expected[2] == pytest.approx(cross_entropy, rel=1e-6)
    assert expected[1] > cross_entropy + 0.2, "the terms are large enough to be detected"
    for rank, actual in enumerate(
        world(layout.ranks).run(loss_terms, config) if layout.ranks > 1 else [loss_terms(config)]
    ):
        assert actual == pytest.approx(expected, rel=1e-5), f"rank {rank}"
