"""A run saved after two steps in one layout and resumed in another equals an uninterrupted run of one process.

The comparison covers losses, weights and the full optimizer state.
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
from dist_llm.training.step import train_step
from tests.laws.law import assert_close, copy_full_tensor, make_batches, make_config
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


def make_layout_config(layout: Layout) -> Config:
    """The embeddings are tied, so that a pipeline has two copies of one weight."""
    data = {"micro_batch": layout.micro}
    return make_config(layout.ranks, MODELS["tied"], optim=ADAMW, parallel=layout.parallel, data=data)


def run_two_steps(
    config: Config, directory: Path | None, first: int, bug: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Run steps `first` and `first` + 1; return (losses, full state afterwards).

    With a directory, steps after the first two start from its newest checkpoint, and the state is saved to it.
    """
    engine = NativeEngine(config, torch.device("cpu"))
    checkpoints = CheckpointStore(directory) if directory else None
    if checkpoints and first:
        newest = checkpoints.latest_verified()
        assert newest is not None
        store.load_checkpoint(newest, engine.state)
        if bug:
            for _, moment in engine.state.moments().items():
                moment.zero_()
    losses = [
        train_step(engine, make_batches(config, engine, step), 1e-2, step).loss.item() for step in (first, first + 1)
    ]
    if checkpoints:
        checkpoints.save(engine.state, Progress(first + 2), {})
        checkpoints.finish()
    tensors = engine.state.weights() | engine.state.moments()
    return losses, {name: copy_full_tensor(tensor) for name, tensor in tensors.items()}


def run_two_steps_on_world(
    layout: Layout, directory: Path, first: int, bug: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Run `run_two_steps` on a world of the layout's size; all ranks' losses must agree. Return the merged state."""
    config = make_layout_config(layout)
    if layout.ranks == 1:
        return run_two_steps(config, directory, first, bug)
    results = world(layout.ranks).run(run_two_steps, config, directory, first, bug)
    assert all(losses == results[0][0] for losses, _ in results)
    return results[0][0], {name: value for _, tensors in results for name, value in tensors.items()}


@lru_cache(maxsize=1)
def uninterrupted_run() -> tuple[list[float], dict[str, Tensor]]:
    engine = NativeEngine(make_layout_config(ONE), torch.device("cpu"))
    losses = [
        train_step(engine, make_batches(engine.config, engine, step), 1e-2, step).loss.item() for step in range(4)
    ]
    tensors = engine.state.weights() | engine.state.moments()
    return losses, {name: copy_full_tensor(tensor) for name, tensor in tensors.items()}


def assert_reshape_matches_one_process(pair: tuple[Layout, Layout], directory: Path, bug: bool = False) -> None:
    first, _ = run_two_steps_on_world(pair[0], directory, 0)
    second, tensors = run_two_steps_on_world(pair[1], directory, 2, bug)
    losses, expected = uninterrupted_run()
    assert first + second == pytest.approx(losses, rel=1e-5)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        # As in the law: the moments of an almost zero gradient are rounding errors of much larger summands.
        same_kind = [each for other, each in expected.items() if other.rpartition(".")[2] == name.rpartition(".")[2]]
        noise = 1e-7 * max(float(each.abs().max()) for each in same_kind)
        assert_close(name, tensors[name], value, 2e-5, noise)


@pytest.mark.parametrize(
    "pair",
    [*PAIRS, *(pytest.param(pair, marks=pytest.mark.slow) for pair in MORE_PAIRS)],
    ids=lambda pair: f"{pair[0]} then {pair[1]}",
)
def test_a_run_resumes_in_another_layout(pair: tuple[Layout, Layout], tmp_path: Path) -> None:
    assert_reshape_matches_one_process(pair, tmp_path)


def test_lost_moments_are_detected(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        assert_reshape_matches_one_process((SHARDED_2, TENSOR), tmp_path, bug=True)
