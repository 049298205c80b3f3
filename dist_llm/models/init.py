"""Initial values: a pure function of (seed, parameter name, element index), on every layout.

A rank that holds a shard computes only that shard, in time and memory proportional to it, and gets exactly the numbers
of a single process.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm.config.model_section import ModelConfig
from dist_llm.counter_rng import hash64, iter_element_ids, splitmix64

# Names of the parameters that have a rule.
EMBEDDING = re.compile(r"(source_)?(embed\.(tokens|positions)|relative\.table)\.weight|head\.out\.weight")
MATRIX = re.compile(
    r"(blocks\.\d+\.((attention|cross)\.(q|k|v|out)|feedforward\.(up|gate|down))|head\.dense\.linear)\.weight"
)
NORM = re.compile(r"(.*[._])?norm(_\w+)?\.weight")


@dataclass(frozen=True)
class InitRule:
    """A distribution; the constant `shift` if `scale` is 0. Rows from `rows` on are vocabulary padding and are zero."""

    kind: str  # normal (standard deviation `scale`) or uniform (on +-scale)
    scale: float
    shift: float = 0.0
    rows: int | None = None


def init_rule(name: str, shape: Sequence[int], config: ModelConfig) -> InitRule:
    """Return the initial distribution of the parameter `name` with full shape `shape`.

    gpt2: normal(init_std); residual outputs are divided by the square root of their number (Radford et al. 2019, 2.3).
    xavier: uniform, +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010). he: normal, sqrt(2 / fan_in) (He et al.
    2015). depth: xavier, divided by the square root of the layer's number (Zhang et al. 2019). tfixup: xavier, with the
    factors of a residual update scaled so that it stays bounded without warm-up (Huang et al. 2020, 3.2). Embeddings
    are normal(init_std), in tfixup normal(d_model^-1/2) with the same scaling. Biases start at 0, norms at 1.

    Raises ValueError for a parameter without a rule: add one for each new parameter.
    """
    if len(shape) == 1 and name.endswith(".bias"):
        return InitRule("normal", 0.0)
    if len(shape) == 1 and NORM.fullmatch(name):
        return InitRule("normal", 0.0, shift=1.0)
    if len(shape) != 2 or not (EMBEDDING.fullmatch(name) or MATRIX.fullmatch(name)):
        raise ValueError(
            f"parameter {name} of shape {tuple(shape)} has no initial value; add its rule to models/init.py:init_rule"
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
    block = _StackPosition.of(int(name.split(".")[1]), config)
    if config.init == "depth":
        return InitRule("uniform", uniform / math.sqrt(block.number))
    if config.init == "tfixup":
        inner = name.endswith((".q.weight", ".k.weight"))  # the softmax normalizes attention weights
        return InitRule("uniform", uniform * (1.0 if inner else _tfixup_scale(block.layers, block.cross)))
    residual = name.endswith((".out.weight", "feedforward.down.weight"))
    residual_outputs = (3 if block.cross else 2) * block.layers
    return InitRule("normal", config.init_std / (math.sqrt(residual_outputs) if residual else 1.0))


@dataclass(frozen=True)
class _StackPosition:
    """Block `number` (from 1) of a stack of `layers`. If `cross`, every block of the stack has cross-attention."""

    number: int
    layers: int
    cross: bool

    @staticmethod
    def of(layer: int, config: ModelConfig) -> "_StackPosition":
        encoder = config.n_encoder_layers
        if layer < encoder:
            return _StackPosition(layer + 1, encoder, cross=False)
        return _StackPosition(layer - encoder + 1, config.n_layers, cross=encoder > 0)


def _tfixup_scale(layers: int, cross: bool) -> float:
    return (9 * layers) ** -0.25 if cross else 0.67 * layers**-0.25


def _embedding_std(config: ModelConfig) -> float:
    if config.init != "tfixup":
        return config.init_std
    return config.d_model**-0.5 * _tfixup_scale(config.n_layers, cross=config.n_encoder_layers > 0)


@torch.no_grad()
def init_param_(
    local: Tensor, name: str, rule: InitRule, seed: int, shape: Sequence[int], offset: Sequence[int]
) -> None:
    """Initialize `local` in place: the shard at `offset` of the parameter `name` with full shape `shape`."""
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
    """Return one number per element from 64 hashed bits: two uniforms of 24 bits, and Box-Muller."""
    bits = splitmix64(element ^ key)
    first = ((bits >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
    if rule.kind == "uniform":
        return first.mul_(2 * rule.scale).sub_(rule.scale)
    second = (bits & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return first.log_().mul_(-2).sqrt_().mul_(second.cos_()).mul_(rule.scale)
