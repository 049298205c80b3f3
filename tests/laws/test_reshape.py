"""A checkpoint of one layout resumes in another layout: losses, weights and optimizer state match one process.

A run takes two steps in the first layout and two in the second, and is compared with four steps of one process.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.load_checkpoint import load_checkpoint
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.training.step import train_step
from tests.laws.law import assert_close, copy_full_tensor, make_batches, make_layout_config
from tests.laws.layouts import ADAMW, Layout
from tests.laws.worlds import run_on_ranks

ONE = Layout(ranks=1)
SHARDED_2 = Layout(ranks=2, parallel={"dp_shard": 2})
SHARDED_4 = Layout(ranks=4, parallel={"dp_shard": 4})
SHARDED_8 = Layout(ranks=8, parallel={"dp_shard": 8})
REPLICATED = Layout(ranks=2, parallel={"dp_replicate": 2})
TENSOR, CONTEXT = Layout(ranks=2, parallel={"tp": 2}), Layout(ranks=2, parallel={"cp": 2})
PIPELINE = Layout(ranks=2, parallel={"pp": 2}, micro_batch=6)
ZBV = Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, micro_batch=6)
TENSOR_PIPELINE = Layout(ranks=4, parallel={"tp": 2, "pp": 2}, micro_batch=6)
SHARDED_TENSOR = Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2})
SHARDED_PIPELINE = Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2}, micro_batch=3)
HYBRID_TENSOR = Layout(ranks=8, parallel={"dp_replicate": 2, "dp_shard": 2, "tp": 2})
UNEVEN = Layout(ranks=3, parallel={"dp_shard": 3})

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


def make_tied_config(layout: Layout) -> Config:
    """Return the config of a layout for a model with tied embeddings, of which a pipeline has two copies."""
    return make_layout_config(replace(layout, model="tied"), optim=ADAMW)


def run_two_steps(
    config: Config, directory: Path | None, first_step: int, bug: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Run steps `first_step` and `first_step` + 1; return (losses, full state afterwards).

    With a directory, save a checkpoint there at the end; if `first_step` is not 0, first load its newest checkpoint.
    `bug` plants a bug: the moments are lost.
    """
    return run_steps(config, directory, range(first_step, first_step + 2), "moments" if bug else None)


def run_steps(
    config: Config, directory: Path | None, steps: range, lost: Literal["moments", "buffers"] | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Run these steps as `run_two_steps` runs its steps. `lost` plants a bug: this state is lost at the load."""
    engine = NativeEngine(config, torch.device("cpu"))
    checkpoints = CheckpointStore(directory) if directory else None
    if checkpoints and steps.start:
        newest = checkpoints.find_latest_verified()
        assert newest is not None
        initial_buffers = [(buffer, buffer.clone()) for _, buffer in engine.named_buffers()]
        load_checkpoint(newest, engine.state)
        for _, moment in engine.state.moments().items() if lost == "moments" else []:
            moment.zero_()
        for buffer, initial in initial_buffers if lost == "buffers" else []:
            buffer.copy_(initial)
    losses = [train_step(engine, make_batches(config, engine, step), lr=1e-2, step=step).loss.item() for step in steps]
    if checkpoints:
        checkpoints.save(engine.state, Progress(steps.stop), {})
        checkpoints.finish()
    tensors = engine.state.weights() | engine.state.moments()
    return losses, {name: copy_full_tensor(tensor) for name, tensor in tensors.items()}


def run_two_steps_on_world(
    layout: Layout, directory: Path, first_step: int, bug: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Call `run_two_steps` on all ranks of the layout, whose losses must be equal; return (losses, merged state)."""
    config = make_tied_config(layout)
    results = run_on_ranks(layout.ranks, run_two_steps, config, directory, first_step=first_step, bug=bug)
    assert all(losses == results[0][0] for losses, _ in results)
    return results[0][0], {name: value for _, tensors in results for name, value in tensors.items()}


@lru_cache(maxsize=1)
def run_uninterrupted() -> tuple[list[float], dict[str, Tensor]]:
    """Run four steps in one process; return (losses, full state afterwards)."""
    return run_steps(make_tied_config(ONE), None, range(4))


def assert_reshape_matches_one_process(pair: tuple[Layout, Layout], directory: Path, bug: bool = False) -> None:
    """Run two steps in each layout of the pair; compare losses and the final state with one process."""
    first_losses, _ = run_two_steps_on_world(pair[0], directory, first_step=0)
    second_losses, actual_state = run_two_steps_on_world(pair[1], directory, first_step=2, bug=bug)
    expected_losses, expected_state = run_uninterrupted()
    assert first_losses + second_losses == pytest.approx(expected_losses, rel=1e-5)
    assert actual_state.keys() == expected_state.keys()
    for name, expected in expected_state.items():
        # The moments of an almost zero gradient are rounding errors of much larger summands; see assert_traces_match.
        kind = name.rpartition(".")[2]
        largest_of_kind = max(
            float(tensor.abs().max()) for key, tensor in expected_state.items() if key.rpartition(".")[2] == kind
        )
        assert_close(name, actual_state[name], expected, tolerance=2e-5, noise=1e-7 * largest_of_kind)


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
