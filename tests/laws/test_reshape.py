"""Two steps in one layout, saved, loaded in another, two more: what one process computes that never stopped.

Losses, weights and all of the optimizer's state.
"""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_llm.checkpoint import store
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.train.step import train_step
from tests.laws.law import batches_of, close, config_of, full_tensor
from tests.laws.layouts import ADAMW, MODELS, Layout
from tests.laws.worlds import world

ONE = Layout(1, {})
SHARDED_2, SHARDED_4, SHARDED_8 = Layout(2, {"dp_shard": 2}), Layout(4, {"dp_shard": 4}), Layout(8, {"dp_shard": 8})
REPLICATED = Layout(2, {"dp_replicate": 2})
TENSOR, CONTEXT = Layout(2, {"tp": 2}), Layout(2, {"cp": 2})
PIPELINE = Layout(2, {"pp": 2}, micro=6)
ZBV = Layout(2, {"pp": 2, "pp_schedule": "zbv"}, micro=6)
TENSOR_PIPELINE = Layout(4, {"tp": 2, "pp": 2}, micro=6)
SHARDED_TENSOR = Layout(4, {"dp_shard": 2, "tp": 2})
SHARDED_PIPELINE = Layout(4, {"pp": 2, "dp_shard": 2}, micro=3)
HYBRID_TENSOR = Layout(8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2})
UNEVEN = Layout(3, {"dp_shard": 3})

PAIRS = [
    (SHARDED_4, TENSOR_PIPELINE),
    (UNEVEN, TENSOR),
    (SHARDED_TENSOR, UNEVEN),
    (ZBV, SHARDED_2),
    (CONTEXT, SHARDED_PIPELINE),
]
MORE_PAIRS = [
    (SHARDED_4, ONE),
    (SHARDED_4, SHARDED_8),
    (TENSOR_PIPELINE, SHARDED_4),
    (ONE, HYBRID_TENSOR),
    (SHARDED_TENSOR, PIPELINE),
    (PIPELINE, SHARDED_TENSOR),
    (REPLICATED, ZBV),
    (SHARDED_PIPELINE, CONTEXT),
]


def resolved(layout: Layout) -> Config:
    """Tied, so that a pipeline holds one weight twice."""
    data = {"micro_batch": layout.micro}
    return config_of(layout.ranks, MODELS["tied"], optim=ADAMW, parallel=layout.parallel, data=data)


def half(
    config: Config, directory: Path | None, first: int, bug: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, whole state after) of steps `first` and `first` + 1, from the checkpoint and to one; None: neither."""
    engine = NativeEngine(config, torch.device("cpu"))
    kept = CheckpointStore(directory) if directory else None
    if kept and first:
        newest = kept.latest_verified()
        assert newest is not None
        store.load(newest, engine.state)
        if bug:
            for _, moment in engine.state.moments().items():
                moment.zero_()
    losses = [
        train_step(engine, batches_of(config, engine, step), 1e-2, step).loss.item() for step in (first, first + 1)
    ]
    if kept:
        kept.save(engine.state, Progress(first + 2), {})
        kept.finish()
    found = engine.state.weights() | engine.state.moments()
    return losses, {name: full_tensor(tensor) for name, tensor in found.items()}


def on(layout: Layout, directory: Path, first: int, bug: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """`half` on a world of the layout's size: every rank's losses agree, and all state is there."""
    config = resolved(layout)
    if layout.ranks == 1:
        return half(config, directory, first, bug)
    ranks = world(layout.ranks).run(half, config, directory, first, bug)
    assert all(losses == ranks[0][0] for losses, _ in ranks)
    return ranks[0][0], {name: value for _, found in ranks for name, value in found.items()}


@lru_cache(maxsize=1)
def undisturbed() -> tuple[list[float], dict[str, Tensor]]:
    engine = NativeEngine(resolved(ONE), torch.device("cpu"))
    losses = [train_step(engine, batches_of(engine.config, engine, step), 1e-2, step).loss.item() for step in range(4)]
    found = engine.state.weights() | engine.state.moments()
    return losses, {name: full_tensor(tensor) for name, tensor in found.items()}


def hold(pair: tuple[Layout, Layout], directory: Path, bug: bool = False) -> None:
    first, _ = on(pair[0], directory, 0)
    second, found = on(pair[1], directory, 2, bug)
    losses, want = undisturbed()
    assert first + second == pytest.approx(losses, rel=1e-5)
    assert found.keys() == want.keys()
    for name, value in want.items():
        # As in the law: where a gradient is nearly nothing, its moments are rounding of much larger summands.
        alike = [each for other, each in want.items() if other.rpartition(".")[2] == name.rpartition(".")[2]]
        noise = 1e-7 * max(float(each.abs().max()) for each in alike)
        close(name, found[name], value, 2e-5, noise)


@pytest.mark.parametrize(
    "pair",
    [*PAIRS, *(pytest.param(pair, marks=pytest.mark.slow) for pair in MORE_PAIRS)],
    ids=lambda pair: f"{pair[0]} then {pair[1]}",
)
def test_a_run_goes_on_in_another_layout(pair: tuple[Layout, Layout], tmp_path: Path) -> None:
    hold(pair, tmp_path)


def test_moments_that_are_lost_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        hold((SHARDED_2, TENSOR), tmp_path, bug=True)
