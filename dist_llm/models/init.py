"""Initialize parameters. A value depends only on (seed, parameter name, element index), so all layouts are equal.

A rank computes only its own shard of a parameter, in time and memory proportional to the shard.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm.config.model_section import ModelConfig
from dist_llm.counter_rng import hash64, iter_element_ids, splitmix64

# Patterns for the names of the parameters that have an initialization rule.
EMBEDDING = re.compile(r"(source_)?(embed\.(tokens|positions)|relative\.table)\.weight|head\.out\.weight")
MATRIX = re.compile(
    r"(blocks\.\d+\.((attention|cross)\.(q|k|v|out)|feedforward\.(up|gate|down))|head\.dense\.linear)\.weight"
)
NORM = re.compile(r"(.*[._])?norm(_\w+)?\.weight")


@dataclass(frozen=True)
class InitRule:
    """The initial distribution of a parameter. If `scale` is 0, all values are `constant`."""

    distribution: str  # "normal" with standard deviation `scale`, or "uniform" on [-scale, scale]
    scale: float
    constant: float = 0.0
    num_used_rows: int | None = None  # the rows from here on are vocabulary padding and become 0; None: no padding


def get_init_rule(name: str, shape: Sequence[int], config: ModelConfig) -> InitRule:
    """Return the initial distribution of the parameter `name` with full shape `shape`.

    The values of `model.init`, for weight matrices:
    gpt2: normal(init_std); the std of residual outputs is divided by the square root of their number (Radford et al.
    2019, 2.3).
    xavier: uniform on +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).
    he: normal(sqrt(2 / fan_in)) (He et al. 2015).
    depth: xavier, divided by the square root of the layer number, counted from 1 (Zhang et al. 2019).
    tfixup: xavier, scaled so that residual updates stay bounded without warm-up (Huang et al. 2020, 3.2).

    Embeddings are normal(init_std) or, with tfixup, normal(d_model^-1/2) with the same scaling. Biases are 0, norms 1.

    Raises ValueError for a parameter without a rule. A new parameter needs a rule here.
    """
    if len(shape) == 1 and name.endswith(".bias"):
        return InitRule("normal", 0.0)
    if len(shape) == 1 and NORM.fullmatch(name):
        return InitRule("normal", 0.0, constant=1.0)
    if len(shape) != 2 or not (EMBEDDING.fullmatch(name) or MATRIX.fullmatch(name)):
        raise ValueError(
            f"parameter {name} of shape {tuple(shape)} has no initial value; add a rule to models/init.py:get_init_rule"
        )
    if name in ("embed.tokens.weight", "head.out.weight"):
        return InitRule("normal", _embedding_std(config), num_used_rows=config.vocab_size)
    if EMBEDDING.fullmatch(name):
        return InitRule("normal", _embedding_std(config))
    fan_out, fan_in = shape
    xavier_bound = math.sqrt(6 / (fan_in + fan_out))
    if config.init == "he":
        return InitRule("normal", math.sqrt(2 / fan_in))
    if config.init == "xavier" or not name.startswith("blocks."):
        return InitRule("normal", config.init_std) if config.init == "gpt2" else InitRule("uniform", xavier_bound)
    block = _BlockPosition.of_layer(int(name.split(".")[1]), config)
    if config.init == "depth":
        return InitRule("uniform", xavier_bound / math.sqrt(block.number))
    if config.init == "tfixup":
        is_query_or_key = name.endswith((".q.weight", ".k.weight"))  # not scaled: softmax normalizes the scores
        scale = 1.0 if is_query_or_key else _tfixup_scale(block.num_layers, block.has_cross_attention)
        return InitRule("uniform", xavier_bound * scale)
    is_residual_output = name.endswith((".out.weight", "feedforward.down.weight"))
    num_residual_outputs = (3 if block.has_cross_attention else 2) * block.num_layers
    return InitRule("normal", config.init_std / (math.sqrt(num_residual_outputs) if is_residual_output else 1.0))


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


def _embedding_std(config: ModelConfig) -> float:
    if config.init != "tfixup":
        return config.init_std
    return config.d_model**-0.5 * _tfixup_scale(config.n_layers, has_cross_attention=config.n_encoder_layers > 0)


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
