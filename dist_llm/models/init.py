"""Initialize parameters. A value depends only on (seed, parameter name, element index), so all layouts are equal.

A rank computes only its own shard of a parameter, in time and memory proportional to the shard.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.parametrization import get_base_depth
from dist_llm.counter_rng import hash64, iter_element_ids, splitmix64
from dist_llm.param_spec import InitRule


class HasFeatures(Protocol):
    """A linear layer, or a linear layer per expert."""

    in_features: int
    out_features: int


def embedding_init(config: ModelConfig, has_vocab_rows: bool = False) -> InitRule:
    """Return the rule of a table: normal(init_std) or, under tfixup, a scaled normal(d_model^-1/2).

    With `has_vocab_rows` there is one row per token id, and the padding rows are 0.
    """
    std = config.init_std
    if config.init == "tfixup":
        std = config.d_model**-0.5 * _tfixup_scale(config.n_layers, has_cross_attention=config.n_encoder_layers > 0)
    return InitRule("normal", std, num_used_rows=config.vocab_size if has_vocab_rows else None)


def matrix_init(config: ModelConfig, linear: HasFeatures) -> InitRule:
    """Return the rule of a weight matrix outside of the blocks: that of `block_matrix_init`, without its scaling."""
    if config.init == "he":
        return InitRule("normal", math.sqrt(2 / linear.in_features))
    if config.init == "gpt2":
        return InitRule("normal", config.init_std)
    return InitRule("uniform", _xavier_bound(linear))


def block_matrix_init(
    config: ModelConfig, layer: int, linear: HasFeatures, role: Literal["input", "query_or_key", "residual_output"]
) -> InitRule:
    """Return the rule of a weight matrix of block `layer`, by `model.init`:

    gpt2: normal(init_std); the std of residual outputs is divided by the square root of their number (Radford et al.
    2019, 2.3), under CompleteP of their number in the base model.
    xavier: uniform on +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).
    he: normal(sqrt(2 / fan_in)) (He et al. 2015).
    depth: xavier, divided by the square root of the layer number, counted from 1 (Zhang et al. 2019).
    tfixup: xavier, scaled so that residual updates stay bounded without warmup (Huang et al. 2020, 3.2). Queries and
    keys are not scaled, because softmax normalizes the scores.
    """
    block = _BlockPosition.of_layer(layer, config)
    if config.init == "depth":
        return InitRule("uniform", _xavier_bound(linear) / math.sqrt(block.number))
    if config.init == "tfixup" and role != "query_or_key":
        return InitRule("uniform", _xavier_bound(linear) * _tfixup_scale(block.num_layers, block.has_cross_attention))
    if config.init == "gpt2" and role == "residual_output":
        num_layers = get_base_depth(config, block.num_layers)
        num_residual_outputs = (3 if block.has_cross_attention else 2) * num_layers
        return InitRule("normal", config.init_std / math.sqrt(num_residual_outputs))
    return matrix_init(config, linear)


def _xavier_bound(linear: HasFeatures) -> float:
    return math.sqrt(6 / (linear.in_features + linear.out_features))


@dataclass(frozen=True)
class _BlockPosition:
    """The position of a block in its stack (encoder or decoder)."""

    number: int  # counted from 1
    num_layers: int  # of the stack
    has_cross_attention: bool  # whether the blocks of the stack have cross-attention

    @staticmethod
    def of_layer(layer: int, config: ModelConfig) -> "_BlockPosition":
        num_encoder_layers = config.n_encoder_layers
        if layer < num_encoder_layers:
            return _BlockPosition(layer + 1, num_encoder_layers, has_cross_attention=False)
        number = layer - num_encoder_layers + 1
        return _BlockPosition(number, config.n_layers, has_cross_attention=num_encoder_layers > 0)


def _tfixup_scale(num_layers: int, has_cross_attention: bool) -> float:
    return (9 * num_layers) ** -0.25 if has_cross_attention else 0.67 * num_layers**-0.25


@torch.no_grad()
def init_param_(
    local: Tensor, name: str, rule: InitRule, seed: int, shape: Sequence[int], offset: Sequence[int]
) -> None:
    """Initialize a shard of the parameter `name` in place.

    `local` is the shard that begins at `offset` in the full parameter of shape `shape`.
    """
    if not rule.scale:
        local.fill_(rule.constant)
        return
    key = hash64(f"{seed}:{name}")
    for rows, element_ids in iter_element_ids(local, shape, offset):
        values = _sample_values(element_ids, key, rule)
        if rule.num_used_rows is not None:
            values = values.masked_fill_(element_ids >= rule.num_used_rows * math.prod(shape[1:]), 0.0)
        local[rows] = values


def _sample_values(element_ids: Tensor, key: int, rule: InitRule) -> Tensor:
    """Return one random number per element: 64 hashed bits give two 24-bit uniforms, and Box-Muller a normal."""
    bits = splitmix64(element_ids ^ key)
    uniform = ((bits >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)  # in (0, 1)
    if rule.distribution == "uniform":
        return uniform.mul_(2 * rule.scale).sub_(rule.scale)
    angle = (bits & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return uniform.log_().mul_(-2).sqrt_().mul_(angle.cos_()).mul_(rule.scale)
