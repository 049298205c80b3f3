"""A run that starts from other weights copies the known rows and initializes the rows of new token ids."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.init_from import init_from_checkpoint
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import CheckpointError
from dist_llm.training.step import train_step
from tests.laws.law import copy_full_tensor, make_batches, make_config, save_checkpoint
from tests.laws.layouts import ADAMW, Layout
from tests.laws.worlds import get_world

CPU = torch.device("cpu")
OLD_VOCAB, NEW_VOCAB = 97, 111  # numbers of token ids; both are padded to multiples of 4: 100 and 112 rows
VOCAB_PARAMS = ("embed.tokens.weight", "head.out.weight")


def make_model_config(vocab_size: int, ranks: int = 1, **parallel: int) -> Config:
    """Return a config with this vocabulary size. `parallel` has keys of the section `parallel`.

    The seed is the vocabulary size, so that two models differ.
    """
    return make_config(
        ranks=ranks, model={"vocab_size": vocab_size}, optim=ADAMW, run={"seed": vocab_size}, parallel=parallel
    )


class OldCheckpoint(NamedTuple):
    """A checkpoint to start from."""

    path: Path
    tensors: dict[str, torch.Tensor]  # weights and moments by their names in the checkpoint


@pytest.fixture
def old_checkpoint(tmp_path: Path) -> OldCheckpoint:
    """A checkpoint of a model with OLD_VOCAB ids after two steps."""
    engine = NativeEngine(make_model_config(OLD_VOCAB), CPU)
    for step in range(2):
        batches = make_batches(engine.config, engine, step)
        for batch in batches:  # make_batches draws ids up to 129
            batch.inputs_BS.clamp_(max=OLD_VOCAB - 1)
            batch.targets_BS.clamp_(max=OLD_VOCAB - 1)
        train_step(engine, batches, lr=1e-3, step=step)
    path = save_checkpoint(CheckpointStore(tmp_path), engine, Progress(step=2), {})
    state = engine.state.weights() | engine.state.moments()
    return OldCheckpoint(path, {name: copy_full_tensor(tensor) for name, tensor in state.items()})


def init_state(config: Config, path: Path, keep_optimizer: bool, num_known: int) -> dict[str, torch.Tensor]:
    """Initialize an engine from the checkpoint `path` on this rank; return the full weights and moments."""
    engine = NativeEngine(config, CPU)
    init_from_checkpoint(
        path, engine.state, with_moments=keep_optimizer, num_known_ids=num_known, vocab_params=VOCAB_PARAMS
    )
    return {
        name: copy_full_tensor(tensor) for name, tensor in (engine.state.weights() | engine.state.moments()).items()
    }


@pytest.mark.parametrize(
    "layout",
    [Layout(ranks=1), Layout(ranks=2, parallel={"dp_shard": 2}), Layout(ranks=2, parallel={"tp": 2})],
    ids=str,
)
@pytest.mark.parametrize("keep_optimizer", [False, True], ids=["fresh", "keep"])
def test_only_known_rows_are_copied(layout: Layout, keep_optimizer: bool, old_checkpoint: OldCheckpoint) -> None:
    path, old = old_checkpoint
    config = make_model_config(NEW_VOCAB, layout.ranks, **layout.parallel)
    fresh = NativeEngine(make_model_config(NEW_VOCAB), CPU)
    initial = {name: copy_full_tensor(tensor) for name, tensor in fresh.state.weights().items()}
    if layout.ranks == 1:
        actual = init_state(config, path, keep_optimizer, OLD_VOCAB)
    else:
        actual = get_world(layout.ranks).run(init_state, config, path, keep_optimizer, OLD_VOCAB)[0]
    assert any(name.startswith("optim.") for name in actual) == keep_optimizer
    for name, tensor in actual.items():
        if not name.split(".", 1)[1].startswith(VOCAB_PARAMS) or not tensor.ndim:
            assert torch.equal(tensor, old[name]), name  # no vocabulary matrix, or a number of steps
            continue
        assert torch.equal(tensor[:OLD_VOCAB], old[name][:OLD_VOCAB]), name
        start = initial[name][OLD_VOCAB:] if name.startswith("model.") else torch.zeros_like(tensor[OLD_VOCAB:])
        assert torch.equal(tensor[OLD_VOCAB:], start), name


def test_a_smaller_vocabulary_gets_the_first_rows(old_checkpoint: OldCheckpoint) -> None:
    path, old = old_checkpoint
    actual = init_state(make_model_config(50), path, keep_optimizer=False, num_known=50)
    assert torch.equal(actual["model.embed.tokens.weight"][:50], old["model.embed.tokens.weight"][:50])


def test_another_model_is_refused(old_checkpoint: OldCheckpoint) -> None:
    path = old_checkpoint.path
    engine = NativeEngine(make_config(ranks=1, model={"vocab_size": NEW_VOCAB, "d_ff": 64}), CPU)
    with pytest.raises(CheckpointError, match=r"feedforward.gate.weight has shape .* use the `model` section"):
        init_from_checkpoint(path, engine.state, with_moments=False, num_known_ids=OLD_VOCAB, vocab_params=VOCAB_PARAMS)
