"""Reading parameters changes nothing, so that the law sees what a run would do; loading replaces all of the weights."""

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
from tests.laws.worlds import world


def read_after_a_forward(config: Config) -> tuple[int, int, int, bool]:
    """(gathered parameters of the modules, those after reading, reshards by reading, whether shards were read)"""
    engine = NativeEngine(config, torch.device("cpu"))
    (model,) = engine.model_parts
    engine.score(make_batches(config, engine, 0)[0])
    before = sum(not isinstance(parameter, DTensor) for parameter in model.parameters())
    with patch.object(FSDPModule, "reshard") as resharded:
        shards = [parameter for _, parameter in engine.named_parameters()]
        assert len(engine.state.weights()) == len(shards)
    after = sum(not isinstance(parameter, DTensor) for parameter in model.parameters())
    return before, after, resharded.call_count, all(isinstance(parameter, DTensor) for parameter in shards)


def test_reading_parameters_has_no_side_effect() -> None:
    for before, after, num_reshards, are_shards in world(2).run(read_after_a_forward, make_config(2, {})):
        assert before > 0, "a forward without backward leaves weights gathered"
        assert (after, num_reshards, are_shards) == (before, 0, True)


def load_zeros_after_a_forward(config: Config, bug: bool) -> float:
    """The mean loss of zero weights, which are read into an engine that has scored before."""
    engine = NativeEngine(config, torch.device("cpu"))
    batch = make_batches(config, engine, 0)[0]
    engine.score(batch)
    state = engine.state
    for tensor in state.weights().values():
        to_local(tensor).zero_()
    with patch.object(FSDPModule, "reshard") if bug else patch.object(FSDPModule, "unused", create=True):
        state.after_load()
    return float(engine.score(batch).sum() / batch.num_valid_tokens)


@pytest.mark.parametrize("bug", [False, True])
def test_weights_loaded_after_a_forward_are_used(bug: bool) -> None:
    """As a rewind does after an evaluation. `bug`: weights that the evaluation gathered stay in use."""
    config = make_config(2, {})
    for loss in world(2).run(load_zeros_after_a_forward, config, bug):
        is_uniform = abs(loss - math.log(config.model.vocab_size)) < 1e-5
        assert is_uniform != bug, loss
