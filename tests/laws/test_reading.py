"""Reading parameters has no side effect on FSDP modules, and loading weights replaces gathered copies too."""

import math
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.sharded import to_local
from tests.laws.law import make_batches, make_config
from tests.laws.worlds import get_world


def read_after_a_forward(config: Config) -> tuple[int, int, int, bool]:
    """Read the parameters after a forward pass without backward.

    Returns the number of gathered parameters before and after reading, the number of reshards that reading causes, and
    whether all parameters that were read are shards.
    """
    engine = NativeEngine(config, torch.device("cpu"))
    (model,) = engine.model_parts
    engine.score(make_batches(config, engine, step=0)[0])
    num_gathered_before = sum(not isinstance(parameter, DTensor) for parameter in model.parameters())
    with patch.object(FSDPModule, "reshard") as reshard_mock:
        shards = [parameter for _, parameter in engine.named_parameters()]
        assert len(engine.state.weights()) == len(shards)
    num_gathered_after = sum(not isinstance(parameter, DTensor) for parameter in model.parameters())
    are_shards = all(isinstance(parameter, DTensor) for parameter in shards)
    return num_gathered_before, num_gathered_after, reshard_mock.call_count, are_shards


def test_reading_parameters_has_no_side_effect() -> None:
    for before, after, num_reshards, are_shards in get_world(2).run(read_after_a_forward, make_config(ranks=2)):
        assert before > 0, "no weight is gathered after a forward without backward, so the test cannot detect a reshard"
        assert (after, num_reshards, are_shards) == (before, 0, True)


def load_zeros_after_a_forward(config: Config, bug: bool) -> float:
    """Load zero weights into an engine that has computed a score before; return the mean loss of the next score.

    `bug` plants a bug: the weights that the first score gathered stay in use.
    """
    engine = NativeEngine(config, torch.device("cpu"))
    batch = make_batches(config, engine, step=0)[0]
    engine.score(batch)
    state = engine.state
    for tensor in state.weights().values():
        to_local(tensor).zero_()
    with patch.object(FSDPModule, "reshard") if bug else patch.object(FSDPModule, "unused", create=True):
        state.after_load()
    return float(engine.score(batch).sum() / batch.num_valid_tokens)


@pytest.mark.parametrize("bug", [False, True], ids=["correct", "gathered weights stay in use"])
def test_weights_loaded_after_a_forward_are_used(bug: bool) -> None:
    """A rewind loads weights after an evaluation. With zero weights the loss is that of a uniform distribution."""
    config = make_config(ranks=2)
    for loss in get_world(2).run(load_zeros_after_a_forward, config, bug):
        is_uniform = abs(loss - math.log(config.model.vocab_size)) < 1e-5
        assert is_uniform != bug, loss
