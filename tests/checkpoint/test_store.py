"""A checkpoint is whole or it is not there; it holds the same names whatever the layout, and loads into any."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.checkpoint import store
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.manifest import MARKER
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import CheckpointConfig, Config
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import CheckpointError
from dist_llm.optim.loss_scale import LossScale
from dist_llm.train.step import train_step
from tests.laws.law import copy_full_tensor, make_batches, make_config, save_checkpoint
from tests.laws.layouts import ADAMW, BF16_MOMENTS, MODELS, MUON, SGD, Layout
from tests.laws.worlds import world

CPU = torch.device("cpu")
FILES = {"config.yaml": b"run: {}\n"}


def stepped(config: Config, steps: int = 2) -> NativeEngine:
    engine = NativeEngine(config, CPU)
    for step in range(steps):
        train_step(engine, make_batches(config, engine, step), 1e-3, step)
    return engine


def values(engine: NativeEngine) -> dict[str, torch.Tensor]:
    state = engine.state.weights() | engine.state.moments()
    return {name: copy_full_tensor(tensor) for name, tensor in state.items()}


def save_in_world(config: Config, directory: Path) -> dict[str, torch.Tensor]:
    engine = stepped(config)
    save_checkpoint(CheckpointStore(directory), engine, Progress(step=2), FILES)
    return values(engine)


def load_in_world(config: Config, path: Path) -> dict[str, torch.Tensor]:
    engine = NativeEngine(config, CPU)
    store.load(path, engine.state)
    return values(engine)


def test_load_restores_what_save_wrote(tmp_path: Path) -> None:
    config = make_config(1, {}, optim=ADAMW)
    engine = stepped(config)
    progress = Progress(step=2, samples=48, tokens=1536, loss_scale=LossScale(8.0, 3))
    path = save_checkpoint(CheckpointStore(tmp_path), engine, progress, FILES)

    fresh = NativeEngine(config, CPU)
    assert store.load(path, fresh.state) == progress
    for name, value in values(engine).items():
        assert torch.equal(values(fresh)[name], value), name
    assert (path / "config.yaml").read_bytes() == FILES["config.yaml"]


def test_settings_of_the_optimizer_come_from_the_config(tmp_path: Path) -> None:
    engine = stepped(make_config(1, {}, optim=ADAMW))
    path = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(2), FILES)
    other = NativeEngine(make_config(1, {}, optim=ADAMW | {"weight_decay": 0.3, "beta2": 0.9}), CPU)
    store.load(path, other.state)
    assert other.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert other.optimizer.param_groups[0]["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("optim", [MUON, BF16_MOMENTS], ids=["muon", "bf16 moments"])
@pytest.mark.parametrize("layout", [Layout(1, {}), Layout(2, {"dp_shard": 2})], ids=str)
def test_resume_equals_an_uninterrupted_run(optim: dict[str, Any], layout: Layout, tmp_path: Path) -> None:
    """To the bit: what chance decides is a function of the step."""
    config = make_config(layout.ranks, {}, optim=optim, parallel=layout.parallel)
    if layout.ranks == 1:
        stopped = [stop_and_go_on(config, tmp_path)]
    else:
        stopped = world(layout.ranks).run(stop_and_go_on, config, tmp_path)
    for on, again in stopped:
        assert on.keys() == again.keys()
        for name, value in on.items():
            assert again[name].dtype == value.dtype
            assert torch.equal(again[name], value), name


def stop_and_go_on(config: Config, directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What four steps leave, and four with a checkpoint in the middle."""
    engine = stepped(config)
    path = save_checkpoint(CheckpointStore(directory), engine, Progress(step=2), FILES)
    again = NativeEngine(config, CPU)
    store.load(path, again.state)
    for trained in (engine, again):
        for step in (2, 3):
            train_step(trained, make_batches(config, trained, step), 1e-3, step)
    return values(engine), values(again)


def test_moments_become_bf16_where_the_config_says_so(tmp_path: Path) -> None:
    """And fp32 again: what bf16 holds is kept."""
    full, half = make_config(1, {}, optim=ADAMW), make_config(1, {}, optim=BF16_MOMENTS)
    engine, store_ = stepped(full), CheckpointStore(tmp_path)
    read = load_in_world(half, save_checkpoint(store_, engine, Progress(step=2), FILES))
    for name, value in values(engine).items():
        moment = name.startswith("optim.") and value.ndim > 0
        assert read[name].dtype == (torch.bfloat16 if moment else torch.float32)
        assert torch.equal(read[name], value.to(read[name].dtype)), name
    again = load_in_world(full, save_checkpoint(store_, stepped(half), Progress(step=3), FILES))
    assert {value.dtype for value in again.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (ADAMW, MUON, r"keeps .*exp_avg.* of blocks\..*, this one momentum_buffer; set it as it was"),
        (MUON, ADAMW, r"keeps momentum_buffer of blocks\..*, this one exp_avg, exp_avg_sq, step"),
        (ADAMW, SGD, r"keeps .*, this one nothing; set it as it was, or begin a new run with init_from"),
    ],
    ids=["to muon", "from muon", "to sgd"],
)
def test_another_optimizers_moments_are_refused(
    before: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save_checkpoint(
        CheckpointStore(tmp_path), stepped(make_config(1, {}, optim=before)), Progress(step=2), FILES
    )
    with pytest.raises(CheckpointError, match=f"optim.name: the checkpoint's optimizer {message}"):
        load_in_world(make_config(1, {}, optim=now), path)


def test_pruning_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    engine, checkpoints = stepped(make_config(1, {}, optim=ADAMW), 1), CheckpointStore(tmp_path)
    (tmp_path / "step_00000009").mkdir()
    for step in (1, 2, 3):
        save_checkpoint(checkpoints, engine, Progress(step), FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert [path.name for path in checkpoints.list_committed()] == ["step_00000002", "step_00000003"]


def test_a_directory_without_the_marker_is_no_checkpoint(tmp_path: Path) -> None:
    engine, checkpoints = (
        stepped(make_config(1, {}, optim=ADAMW), 1),
        CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(keep=3)),
    )
    first = save_checkpoint(checkpoints, engine, Progress(1), FILES)
    second = save_checkpoint(checkpoints, engine, Progress(2), FILES)
    (second / MARKER).unlink()
    assert store.open_checkpoint(tmp_path) == first
    save_checkpoint(checkpoints, engine, Progress(2), FILES)  # saving that step again works
    assert store.open_checkpoint(tmp_path) == second
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        store.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"d_model": 64, "head_dim": 4}, "embed.tokens.weight has shape"),
        ({"n_layers": 5}, "blocks.4.*no such parameter"),
    ],
)
def test_another_models_checkpoint_is_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    engine = stepped(make_config(1, {}, optim=ADAMW), 1)
    path = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(1), FILES)
    with pytest.raises(CheckpointError, match=message):
        store.load(path, NativeEngine(make_config(1, model, optim=ADAMW), CPU).state, moments=False)


LAYOUTS = [
    Layout(2, {"dp_shard": 2, "recompute": "full"}, "tied"),
    Layout(2, {"tp": 2}, "tied"),
    Layout(2, {"pp": 2}, "tied", 6),
    Layout(2, {"pp": 2, "pp_schedule": "zbv"}, "tied", 6),
    Layout(4, {"dp_shard": 2, "tp": 2}, "tied"),
    Layout(4, {"pp": 2, "dp_shard": 2}, "tied", 3),
]


def _config(layout: Layout) -> Config:
    return make_config(
        layout.ranks, MODELS[layout.model], optim=ADAMW, parallel=layout.parallel, data={"micro_batch": layout.micro}
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout_is_saved_under_the_same_names_and_loads_into_one_process(layout: Layout, tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    for part in world(layout.ranks).run(save_in_world, _config(layout), tmp_path):
        state |= part
    one = NativeEngine(make_config(1, MODELS["tied"], optim=ADAMW), CPU)
    assert store.load(CheckpointStore(tmp_path).list_committed()[-1], one.state).step == 2
    actual = values(one)
    assert actual.keys() == state.keys()
    for name, value in actual.items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_process_loads_into_any_layout(layout: Layout, tmp_path: Path) -> None:
    engine = stepped(make_config(1, MODELS["tied"], optim=ADAMW))
    path = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(2), FILES)
    want = values(engine)
    for part in world(layout.ranks).run(load_in_world, _config(layout), path):
        for name, value in part.items():
            assert torch.equal(value, want[name]), name


def test_going_back_to_before_the_first_step_leaves_no_moments(tmp_path: Path) -> None:
    """What is read is what was saved: nothing, of a run that has taken no step."""
    config = make_config(1, {}, optim=ADAMW)
    engine = NativeEngine(config, torch.device("cpu"))
    initial = {name: copy_full_tensor(parameter) for name, parameter in engine.named_parameters()}
    folder = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(), {})
    losses = [train_step(engine, make_batches(config, engine, step), 1e-2, step).loss for step in range(3)]
    store.load(folder, engine.state)
    assert engine.state.moments() == {}
    assert all(torch.equal(copy_full_tensor(parameter), initial[name]) for name, parameter in engine.named_parameters())
    assert [train_step(engine, make_batches(config, engine, step), 1e-2, step).loss for step in range(3)] == losses
