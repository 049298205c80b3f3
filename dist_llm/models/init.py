"""Initial values: a pure function of (seed, parameter name, element), whatever the layout.

A rank that holds a slice of a parameter computes just that slice, in time and memory of the
slice, and gets the very numbers that one process would have there.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm.config.schema import ModelConfig
from dist_llm.counter_rng import hash64, iter_element_ids, splitmix64

# Parameters that have a rule, by name.
EMBEDDING = re.compile(r"(source_)?(embed\.(tokens|positions)|relative\.table)\.weight|head\.out\.weight")
MATRIX = re.compile(
    r"(blocks\.\d+\.((attention|cross)\.(q|k|v|out)|feedforward\.(up|gate|down))|head\.dense\.linear)\.weight"
)
NORM = re.compile(r"(.*[._])?norm(_\w+)?\.weight")


@dataclass(frozen=True)
class InitRule:
    """A distribution: constant `shift` where `scale` is 0. Rows from `rows` on are vocabulary padding: zero."""

    kind: str  # normal (standard deviation `scale`) or uniform (on +-scale)
    scale: float
    shift: float = 0.0
    rows: int | None = None


def init_rule(name: str, shape: Sequence[int], config: ModelConfig) -> InitRule:
    """How the parameter called `name`, of full shape `shape`, starts.

    gpt2: normal(init_std); outputs to the residual stream divided by the root of their number (Radford
    et al. 2019, 2.3). xavier: uniform, +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).
    he: normal, sqrt(2 / fan_in) (He et al. 2015). depth: xavier, divided by the root of the layer's
    number (Zhang et al. 2019). tfixup: xavier, but what an update of the residual stream is a product of is
    scaled so that it stays bounded without warm-up (Huang et al. 2020, 3.2). Embeddings are normal(init_std),
    in tfixup normal(d_model^-1/2), scaled alike. Biases start at 0, norms at 1.

    Raises ValueError for a parameter without a rule: a new one needs its own.
    """
    if len(shape) == 1 and name.endswith(".bias"):
        return InitRule("normal", 0.0)
    if len(shape) == 1 and NORM.fullmatch(name):
        return InitRule("normal", 0.0, shift=1.0)
    if len(shape) != 2 or not (EMBEDDING.fullmatch(name) or MATRIX.fullmatch(name)):
        raise ValueError(
            f"parameter {name} of shape {tuple(shape)} has no initial value; add its rule to models/init.py:rule_for"
        )
    if name in ("embed.tokens.weight", "head.out.weight"):
        return InitRule("normal", _embedding_std(config), rows=config.vocab_size)
    if EMBEDDING.fullmatch(name):
        return InitRule("normal", _embedding_std(config))
    fan_out, fan_in = shape
    uniform = math.sqrt(6 / (fan_in + fan_out))
    if config.init == "he":
        return InitRule("normal", math.sqrt(2 / fan_in))
    if config.init == "xavier" or not name.startswith("blocks."):
        return InitRule("normal", config.init_std) if config.init == "gpt2" else InitRule("uniform", uniform)
    place = _StackPosition.of(int(name.split(".")[1]), config)
    if config.init == "depth":
        return InitRule("uniform", uniform / math.sqrt(place.number))
    if config.init == "tfixup":
        inner = name.endswith((".q.weight", ".k.weight"))  # attention's weights are normalised anyway
        return InitRule("uniform", uniform * (1.0 if inner else _tfixup(place.layers, place.crossed)))
    residual = name.endswith((".out.weight", "feedforward.down.weight"))
    steps = (3 if place.crossed else 2) * place.layers
    return InitRule("normal", config.init_std / (math.sqrt(steps) if residual else 1.0))


@dataclass(frozen=True)
class _StackPosition:
    """Block `number` (from 1) of a stack of `layers`; `crossed`: each also attends to an encoder."""

    number: int
    layers: int
    crossed: bool

    @staticmethod
    def of(layer: int, config: ModelConfig) -> "_StackPosition":
        encoder = config.n_encoder_layers
        if layer < encoder:
            return _StackPosition(layer + 1, encoder, crossed=False)
        return _StackPosition(layer - encoder + 1, config.n_layers, crossed=encoder > 0)


def _tfixup(layers: int, crossed: bool) -> float:
    return (9 * layers) ** -0.25 if crossed else 0.67 * layers**-0.25


def _embedding_std(config: ModelConfig) -> float:
    if config.init != "tfixup":
        return config.init_std
    return config.d_model**-0.5 * _tfixup(config.n_layers, crossed=config.n_encoder_layers > 0)


@torch.no_grad()
def init_param_(
    local: Tensor, name: str, rule: InitRule, seed: int, shape: Sequence[int], offset: Sequence[int]
) -> None:
    """Set `local`, the slice at `offset` of the parameter `name` of full shape `shape`, of any number of dimensions."""
    if not rule.scale:
        local.fill_(rule.shift)
        return
    key = hash64(f"{seed}:{name}")
    for rows, elements in iter_element_ids(local, shape, offset):
        values = _sample(elements, key, rule)
        if rule.rows is not None:
            values = values.masked_fill_(elements >= rule.rows * math.prod(shape[1:]), 0.0)
        local[rows] = values


def _sample(element: Tensor, key: int, rule: InitRule) -> Tensor:
    """One number per element, from 64 hashed bits: two uniforms of 24 bits, and Box-Muller."""
    bits = splitmix64(element ^ key)
    first = ((bits >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
    if rule.kind == "uniform":
        return first.mul_(2 * rule.scale).sub_(rule.scale)
    second = (bits & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return first.log_().mul_(-2).sqrt_().mul_(second.cos_()).mul_(rule.scale)
