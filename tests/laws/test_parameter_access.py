"""Reading the parameters of an FSDP model has no side effect. Loading weights also replaces gathered weights."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.sharded import to_local
from tests.laws.law import make_batches, make_config
from tests.laws.worlds import get_world


@dataclass(frozen=True)
class ParameterAccess:
    """The number of gathered parameters before and after reading all parameters, and what the reading did."""

    num_gathered_before: int
    num_gathered_after: int
    num_reshards: int
    are_shards: bool  # whether all parameters that were read are shards


def read_after_a_forward(config: Config) -> ParameterAccess:
    """Read the parameters after a forward pass without backward."""
    engine = NativeEngine(config, torch.device("cpu"))
    (model,) = engine.model_parts
    engine.score(make_batches(config, engine, step=0)[0])
    num_gathered_before = count_gathered(model)
    with patch.object(FSDPModule, "reshard") as reshard_mock:  # count the calls; a real reshard would free the weights
        shards = [parameter for _, parameter in engine.named_parameters()]
        assert len(engine.state.weights()) == len(shards)
    return ParameterAccess(
        num_gathered_before=num_gathered_before,
        num_gathered_after=count_gathered(model),
        num_reshards=reshard_mock.call_count,
        are_shards=all(isinstance(parameter, DTensor) for parameter in shards),
    )


def count_gathered(model: nn.Module) -> int:
    """Return the number of parameters that FSDP has gathered."""
    return sum(not isinstance(parameter, DTensor) for parameter in model.parameters())


def test_reading_parameters_has_no_side_effect() -> None:
    for access in get_world(2).run(read_after_a_forward, make_config(ranks=2)):
        assert access.num_gathered_before > 0, "no weight is gathered, so the test cannot detect a reshard"
        assert access.num_gathered_after == access.num_gathered_before
        assert access.num_reshards == 0
        assert access.are_shards


def load_zeros_after_a_forward(config: Config, bug: bool) -> float:
    """Load zero weights into an engine that has computed a score before; return the mean loss of the next score.

    With `bug`, reshard does nothing, so the weights that the first score gathered stay in use.
    """
    engine = NativeEngine(config, torch.device("cpu"))
    batch = make_batches(config, engine, step=0)[0]
    engine.score(batch)
    state = engine.state
    for tensor in state.weights().values():
        to_local(tensor).zero_()
    # `after_load` calls reshard to free the gathered weights. The mock does nothing.
    with patch.object(FSDPModule, "reshard") if bug else nullcontext():
        state.after_load()
    return float(engine.score(batch).sum() / batch.num_valid_tokens)


@pytest.mark.parametrize("bug", [False, True], ids=["correct", "gathered weights stay in use"])
def test_weights_loaded_after_a_forward_are_used(bug: bool) -> None:
    """A rewind loads weights after an evaluation. With zero weights the loss is that of a uniform distribution.

    With the planted bug, the loss must be another one.
    """
    config = make_config(ranks=2)
    for loss in get_world(2).run(load_zeros_after_a_forward, config, bug):
        is_uniform = abs(loss - math.log(config.model.vocab_size)) < 1e-5
        assert is_uniform != bug, loss
