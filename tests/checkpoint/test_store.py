"""A checkpoint is complete or does not exist. A checkpoint of any layout loads into any layout."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint
from dist_llm.checkpoint.load_checkpoint import load_checkpoint
from dist_llm.checkpoint.manifest import MARKER_FILE
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import CheckpointConfig, Config
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import CheckpointError
from dist_llm.optim.loss_scale import LossScale
from dist_llm.training.step import train_step
from tests.laws.law import copy_full_tensor, make_batches, make_config, make_layout_config, save_checkpoint
from tests.laws.layouts import ADAMW, BF16_MOMENTS, MODELS, MUON, SGD, Layout
from tests.laws.worlds import get_world

CPU = torch.device("cpu")
FILES = {"config.yaml": b"run: {}\n"}


def build_trained_engine(config: Config, num_steps: int = 2) -> NativeEngine:
    """Build an engine that has taken `num_steps` training steps."""
    engine = NativeEngine(config, CPU)
    for step in range(num_steps):
        train_step(engine, make_batches(config, engine, step), lr=1e-3, step=step)
    return engine


def copy_state(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Return copies of all full weights and moments by name."""
    state = engine.state.weights() | engine.state.moments()
    return {name: copy_full_tensor(tensor) for name, tensor in state.items()}


def save_in_world(config: Config, directory: Path) -> dict[str, torch.Tensor]:
    """Train, save a checkpoint and return the full state, on each rank."""
    engine = build_trained_engine(config)
    save_checkpoint(CheckpointStore(directory), engine, Progress(step=2), FILES)
    return copy_state(engine)


def load_in_world(config: Config, path: Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint into a new engine and return the full state, on each rank."""
    engine = NativeEngine(config, CPU)
    load_checkpoint(path, engine.state)
    return copy_state(engine)


def test_load_restores_the_saved_state(tmp_path: Path) -> None:
    config = make_config(ranks=1, optim=ADAMW)
    engine = build_trained_engine(config)
    progress = Progress(step=2, samples=48, tokens=1536, loss_scale=LossScale(value=8.0, good_steps=3))
    path = save_checkpoint(CheckpointStore(tmp_path), engine, progress, FILES)

    new_engine = NativeEngine(config, CPU)
    assert load_checkpoint(path, new_engine.state) == progress
    for name, value in copy_state(engine).items():
        assert torch.equal(copy_state(new_engine)[name], value), name
    assert (path / "config.yaml").read_bytes() == FILES["config.yaml"]


def test_optimizer_settings_come_from_the_config(tmp_path: Path) -> None:
    engine = build_trained_engine(make_config(ranks=1, optim=ADAMW))
    path = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(2), FILES)
    other_engine = NativeEngine(make_config(ranks=1, optim=ADAMW | {"weight_decay": 0.3, "beta2": 0.9}), CPU)
    load_checkpoint(path, other_engine.state)
    assert other_engine.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert other_engine.optimizer.param_groups[0]["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("optim", [MUON, BF16_MOMENTS], ids=["muon", "bf16 moments"])
@pytest.mark.parametrize("layout", [Layout(ranks=1), Layout(ranks=2, parallel={"dp_shard": 2})], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_run(optim: dict[str, Any], layout: Layout, tmp_path: Path) -> None:
    """The states are bitwise equal, because random numbers are a function of the step."""
    config = make_config(ranks=layout.ranks, optim=optim, parallel=layout.parallel)
    if layout.ranks == 1:
        results = [train_uninterrupted_and_resumed(config, tmp_path)]
    else:
        results = get_world(layout.ranks).run(train_uninterrupted_and_resumed, config, tmp_path)
    for uninterrupted, resumed in results:
        assert uninterrupted.keys() == resumed.keys()
        for name, value in uninterrupted.items():
            assert resumed[name].dtype == value.dtype
            assert torch.equal(resumed[name], value), name


def train_uninterrupted_and_resumed(
    config: Config, directory: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (the state after four steps, the state after loading the checkpoint of step 2 and two more steps)."""
    engine = build_trained_engine(config)
    path = save_checkpoint(CheckpointStore(directory), engine, Progress(step=2), FILES)
    resumed_engine = NativeEngine(config, CPU)
    load_checkpoint(path, resumed_engine.state)
    for trained_engine in (engine, resumed_engine):
        for step in (2, 3):
            train_step(trained_engine, make_batches(config, trained_engine, step), lr=1e-3, step=step)
    return copy_state(engine), copy_state(resumed_engine)


def test_moments_are_converted_to_the_configured_dtype(tmp_path: Path) -> None:
    """Moments are converted in both directions."""
    fp32_config, bf16_config = make_config(ranks=1, optim=ADAMW), make_config(ranks=1, optim=BF16_MOMENTS)
    engine, checkpoints = build_trained_engine(fp32_config), CheckpointStore(tmp_path)
    bf16_state = load_in_world(bf16_config, save_checkpoint(checkpoints, engine, Progress(step=2), FILES))
    for name, value in copy_state(engine).items():
        is_moment = name.startswith("optim.") and value.ndim > 0
        assert bf16_state[name].dtype == (torch.bfloat16 if is_moment else torch.float32)
        assert torch.equal(bf16_state[name], value.to(bf16_state[name].dtype)), name
    fp32_state = load_in_world(
        fp32_config, save_checkpoint(checkpoints, build_trained_engine(bf16_config), Progress(step=3), FILES)
    )
    assert {value.dtype for value in fp32_state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("before", "current", "message"),
    [
        (ADAMW, MUON, r"has .*exp_avg.* of blocks\..*, this one needs momentum_buffer; set optim.name as it was"),
        (MUON, ADAMW, r"has momentum_buffer of blocks\..*, this one needs exp_avg, exp_avg_sq, step"),
        (ADAMW, SGD, r"has .*, this one needs nothing; set optim.name as it was, or start a new run with init_from"),
    ],
    ids=["to muon", "from muon", "to sgd"],
)
def test_moments_of_another_optimizer_are_refused(
    before: dict[str, Any], current: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save_checkpoint(
        CheckpointStore(tmp_path), build_trained_engine(make_config(ranks=1, optim=before)), Progress(step=2), FILES
    )
    with pytest.raises(CheckpointError, match=f"optim.name: the checkpoint's optimizer {message}"):
        load_in_world(make_config(ranks=1, optim=current), path)


def test_pruning_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    engine = build_trained_engine(make_config(ranks=1, optim=ADAMW), num_steps=1)
    checkpoints = CheckpointStore(tmp_path)
    (tmp_path / "step_00000009").mkdir()
    for step in (1, 2, 3):
        save_checkpoint(checkpoints, engine, Progress(step), FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert [path.name for path in checkpoints.list_committed()] == ["step_00000002", "step_00000003"]


def test_a_directory_without_a_marker_is_not_a_checkpoint(tmp_path: Path) -> None:
    engine = build_trained_engine(make_config(ranks=1, optim=ADAMW), num_steps=1)
    checkpoints = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(keep=3))
    first = save_checkpoint(checkpoints, engine, Progress(1), FILES)
    second = save_checkpoint(checkpoints, engine, Progress(2), FILES)
    (second / MARKER_FILE).unlink()
    assert fetch_verified_checkpoint(tmp_path) == first
    save_checkpoint(checkpoints, engine, Progress(2), FILES)  # the step can be saved again
    assert fetch_verified_checkpoint(tmp_path) == second
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        fetch_verified_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"d_model": 64, "head_dim": 4}, "embed.tokens.weight has shape"),
        ({"n_layers": 5}, "blocks.4.*no such parameter"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    engine = build_trained_engine(make_config(ranks=1, optim=ADAMW), num_steps=1)
    path = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(1), FILES)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(
            path, NativeEngine(make_config(ranks=1, model=model, optim=ADAMW), CPU).state, with_moments=False
        )


LAYOUTS = [
    Layout(ranks=2, parallel={"dp_shard": 2, "recompute": "full"}, model="tied"),
    Layout(ranks=2, parallel={"tp": 2}, model="tied"),
    Layout(ranks=2, parallel={"pp": 2}, model="tied", micro_batch=6),
    Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, model="tied", micro_batch=6),
    Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, model="tied"),
    Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2}, model="tied", micro_batch=3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_checkpoint_of_any_layout_loads_into_one_process(layout: Layout, tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    for rank_state in get_world(layout.ranks).run(save_in_world, make_layout_config(layout, optim=ADAMW), tmp_path):
        state |= rank_state
    engine = NativeEngine(make_config(ranks=1, model=MODELS["tied"], optim=ADAMW), CPU)
    assert load_checkpoint(CheckpointStore(tmp_path).list_committed()[-1], engine.state).step == 2
    actual = copy_state(engine)
    assert actual.keys() == state.keys()
    for name, value in actual.items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_checkpoint_of_one_process_loads_into_any_layout(layout: Layout, tmp_path: Path) -> None:
    engine = build_trained_engine(make_config(ranks=1, model=MODELS["tied"], optim=ADAMW))
    path = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(2), FILES)
    expected = copy_state(engine)
    for rank_state in get_world(layout.ranks).run(load_in_world, make_layout_config(layout, optim=ADAMW), path):
        for name, value in rank_state.items():
            assert torch.equal(value, expected[name]), name


def test_loading_step_0_clears_the_moments(tmp_path: Path) -> None:
    """A checkpoint of step 0 has no moments, so loading it clears them."""
    config = make_config(ranks=1, optim=ADAMW)
    engine = NativeEngine(config, torch.device("cpu"))
    initial = {name: copy_full_tensor(parameter) for name, parameter in engine.named_parameters()}
    folder = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(), {})
    losses = [train_step(engine, make_batches(config, engine, step), lr=1e-2, step=step).loss for step in range(3)]
    load_checkpoint(folder, engine.state)
    assert engine.state.moments() == {}
    assert all(torch.equal(copy_full_tensor(parameter), initial[name]) for name, parameter in engine.named_parameters())
    assert [
        train_step(engine, make_batches(config, engine, step), lr=1e-2, step=step).loss for step in range(3)
    ] == losses
