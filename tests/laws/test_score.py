"""Evaluation, too, gives one process's loss on any layout, and disturbs no training around it."""

import pytest
import torch

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models.attention import KVCache
from dist_llm.train.step import train_step
from tests.laws.law import batches_of, config_of
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


def scores(config: Config) -> list[float]:
    """The summed loss of a batch before, between and after two training steps that it is not part of."""
    engine, found = NativeEngine(config, torch.device("cpu")), []
    for step in range(3):
        heldout = [engine.to_local_batch(batch) for batch in batches_of(config, engine, 100)]
        found.append(sum(engine.all_reduce_over_data(engine.score(batch).sum()).item() for batch in heldout))
        train_step(engine, batches_of(config, engine, step), config.optim.lr, step)
    return found


REGULARISED = {"z_loss": 1e-2, "label_smoothing": 0.1}


def terms(config: Config) -> list[float]:
    """Loss, cross-entropy and z-loss of a step, and the held-out loss before it."""
    engine = NativeEngine(config, torch.device("cpu"))
    heldout = [engine.to_local_batch(batch) for batch in batches_of(config, engine, 100)]
    before = sum(engine.all_reduce_over_data(engine.score(batch).sum()).item() for batch in heldout)
    report = train_step(engine, batches_of(config, engine, 0), config.optim.lr, with_terms=True)
    assert report.terms is not None
    return [before, report.loss.item(), *report.terms.tolist()]


def saved_names(config: Config) -> tuple[set[str], set[str]]:
    """What a checkpoint would hold after a step, and after an evaluation on top."""
    engine = NativeEngine(config, torch.device("cpu"))
    train_step(engine, batches_of(config, engine, 0), config.optim.lr)
    before = set(engine.state.moments())
    engine.score(engine.to_local_batch(batches_of(config, engine, 1)[0]))
    return before, set(engine.state.moments())


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if "dp_shard" in each.parallel], ids=str)
def test_an_evaluation_leaves_nothing_out_of_the_next_checkpoint(layout: Layout) -> None:
    """FSDP leaves the last block gathered after a forward pass: its moments once went missing here."""
    adamw = {"name": "adamw", "lr": 1e-3}
    model, data = MODELS[layout.model] | {"dropout": 0.0}, {"micro_batch": layout.micro}
    config = config_of(layout.ranks, model, optim=adamw, parallel=layout.parallel, data=data)
    for before, after in world(layout.ranks).run(saved_names, config):
        assert before
        assert after == before


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_scores_as_one_process_does(layout: Layout) -> None:
    model = MODELS[layout.model] | {"dropout": 0.0}
    config = config_of(layout.ranks, model, optim=SGD, parallel=layout.parallel, data={"micro_batch": layout.micro})
    want = scores(config_of(1, model, optim=SGD))
    for rank, found in enumerate(world(layout.ranks).run(scores, config)):
        assert found == pytest.approx(want, rel=1e-5), f"rank {rank}"


def remembered() -> int:
    engine = NativeEngine(config_of(2, {}, precision="bf16", parallel={"dp_shard": 2}), torch.device("cpu"))
    cache = KVCache()
    with torch.no_grad():
        engine.model_parts[0](torch.tensor([[1, 2, 3]]), cache=cache)
    return cache.length


def test_a_sharded_model_in_bf16_fills_the_cache_that_it_is_given() -> None:
    """Where FSDP casts what a model is given, it once filled a copy."""
    assert world(2).run(remembered) == [3, 3]


@pytest.mark.parametrize("layout", [Layout(1, {}, "tied"), *LAYOUTS], ids=str)
def test_the_held_out_loss_is_plain_and_the_terms_of_the_training_loss_are_known(layout: Layout) -> None:
    """The training loss has z-loss and label smoothing; what is scored has neither, on any layout."""
    model, data = MODELS[layout.model] | {"dropout": 0.0}, {"micro_batch": layout.micro}
    config = config_of(layout.ranks, model, optim=SGD, parallel=layout.parallel, data=data, loss=REGULARISED)
    plain = config_of(1, model, optim=SGD, loss={})
    engine = NativeEngine(plain, torch.device("cpu"))
    heldout = sum(engine.score(batch).sum().item() for batch in batches_of(plain, engine, 100))
    cross_entropy = train_step(engine, batches_of(plain, engine, 0), SGD["lr"]).loss.item()
    want = terms(config_of(1, model, optim=SGD, loss=REGULARISED))
    assert want[0] == pytest.approx(heldout, rel=1e-6)
    assert want[2] == pytest.approx(cross_entropy, rel=1e-6)
    assert want[1] > cross_entropy + 0.2, "the terms are large enough to be seen"
    for rank, found in enumerate(world(layout.ranks).run(terms, config) if layout.ranks > 1 else [terms(config)]):
        assert found == pytest.approx(want, rel=1e-5), f"rank {rank}"
