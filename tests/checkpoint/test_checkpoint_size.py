"""The size of a checkpoint is computed exactly from the config."""

import pytest
import torch

from dist_llm.checkpoint.checkpoint_size import count_checkpoint_bytes
from dist_llm.engines.native import NativeEngine
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config
from tests.laws.layouts import ADAMW, BF16_MOMENTS, MODELS, MUON, SGD

FROZEN = {"groups": [{"pattern": "embed.*", "freeze": True}, {"pattern": "*.attention.*", "freeze": True}]}
OPTIMIZERS = [
    *(ADAMW, BF16_MOMENTS, MUON, SGD, SGD | {"momentum": 0.9}),
    *(MUON | FROZEN, SGD | {"momentum": 0.9} | FROZEN),
]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=str)
def test_the_size_counts_weights_and_moments(optim: dict[str, object]) -> None:
    config = make_config(ranks=1, model=MODELS["tied"], optim=optim)
    engine = NativeEngine(config, torch.device("cpu"))
    train_step(engine, make_batches(config, engine, step=0), lr=1e-3)
    tensors = (engine.state.weights() | engine.state.moments()).values()
    assert count_checkpoint_bytes(config) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
