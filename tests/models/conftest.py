"""Fixtures of small model configs and of small models with random parameters.

def test_the_logits_have_a_row_per_token(build):
    model = build(n_layers=1, positions="learned")  # keyword arguments are keys of the `model` section
    logits_BSV = model(torch.zeros(2, 5, dtype=torch.long))
"""

import pytest

from dist_llm.config.model_section import ModelConfig
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.build_model import build_model
from dist_llm.models.init import init_param_
from dist_llm.param_spec import collect_param_specs


@pytest.fixture
def settings():
    """Return a function that makes a resolved `model` section: a small Llama with `changes` of its keys."""

    def make_settings(**changes):
        shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "d_ff": 48}
        return ModelConfig(**{**shape, "vocab_size": 20, "vocab_multiple": 1, "max_seq_len": 16, **changes})

    return make_settings


@pytest.fixture
def build(settings):
    """Return a function that builds a model in eval mode, with `changes` of the keys of the `model` section.

    The parameters are larger than in a run, so that each of them affects the output.
    """

    def build_with(loss=None, seed=0, **changes):
        config = settings(**{"init_std": 0.3, **changes})
        model = build_model(config, loss or CrossEntropy()).eval()
        specs = collect_param_specs(model)
        for name, parameter in model.named_parameters():
            init_param_(parameter.detach(), name, specs[name].init, seed, parameter.shape, (0,) * parameter.ndim)
        return model

    return build_with
