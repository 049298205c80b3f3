"""Fixtures of small model configurations and of small models whose parameters have values."""

import pytest

from dist_llm.config.model_section import ModelConfig
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.build_model import build_model
from dist_llm.models.init import init_param_
from dist_llm.param_spec import collect_param_specs


@pytest.fixture
def settings():
    """Make a resolved `model` section: a small Llama with `changes`."""

    def make_settings(**changes):
        shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "d_ff": 48}
        return ModelConfig(**{**shape, "vocab_size": 20, "vocab_multiple": 1, "max_seq_len": 16, **changes})

    return make_settings


@pytest.fixture
def build(settings):
    """Build a model in eval mode. Its parameters are larger than in a run, so that each affects the output."""

    def build_with(loss=None, seed=0, **changes):
        config = settings(**{"init_std": 0.3, **changes})
        model = build_model(config, loss or CrossEntropy()).eval()
        specs = collect_param_specs(model)
        for name, parameter in model.named_parameters():
            init_param_(parameter.detach(), name, specs[name].init, seed, parameter.shape, (0,) * parameter.ndim)
        return model

    return build_with
