"""Initial values: a pure function of (seed, parameter name, element), whatever the layout.

A rank that holds a slice of a parameter computes just that slice, in time and memory of the
slice, and gets the very numbers that one process would have there.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm.config.schema import ModelConfig

CHUNK = 1 << 20  # elements computed at a time, so that temporaries stay in cache


@dataclass(frozen=True)
class Rule:
    """A distribution: constant `shift` where `scale` is 0. Rows from `rows` on are vocabulary padding: zero."""

    kind: str  # normal (standard deviation `scale`) or uniform (on +-scale)
    scale: float
    shift: float = 0.0
    rows: int | None = None


def rule_for(name: str, shape: Sequence[int], config: ModelConfig) -> Rule:
    """How the parameter called `name`, of full shape `shape`, starts.

    gpt2: normal(init_std); outputs to the residual stream divided by sqrt(2 n_layers) (Radford
    et al. 2019, 2.3). xavier: uniform, +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).
    he: normal, sqrt(2 / fan_in) (He et al. 2015). Embeddings are normal(init_std) in all three.
    """
    if name.endswith(".bias"):
        return Rule("normal", 0.0)
    if len(shape) == 1:
        return Rule("normal", 0.0, shift=1.0)
    if name == "embed.tokens.weight" or name == "head.out.weight":
        return Rule("normal", config.init_std, rows=config.vocab_size)
    if name.startswith("embed."):
        return Rule("normal", config.init_std)
    fan_out, fan_in = shape
    if config.init == "xavier":
        return Rule("uniform", math.sqrt(6 / (fan_in + fan_out)))
    if config.init == "he":
        return Rule("normal", math.sqrt(2 / fan_in))
    residual = name.endswith(("attention.out.weight", "feedforward.down.weight"))
    return Rule("normal", config.init_std / (math.sqrt(2 * config.n_layers) if residual else 1.0))


@torch.no_grad()
def fill(local: Tensor, name: str, rule: Rule, seed: int, shape: Sequence[int], offset: Sequence[int]) -> None:
    """Set `local`, the slice at `offset` of the parameter `name` of full shape `shape`."""
    if not rule.scale:
        local.fill_(rule.shift)
        return
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    columns = torch.arange(local.shape[1], device=local.device) + offset[1]
    per_chunk = max(1, CHUNK // max(1, local.shape[1]))
    for start in range(0, local.shape[0], per_chunk):
        rows = torch.arange(start, min(start + per_chunk, local.shape[0]), device=local.device) + offset[0]
        values = _draw(rows[:, None] * shape[1] + columns, key, rule)
        if rule.rows is not None:
            values = values.masked_fill_((rows >= rule.rows)[:, None], 0.0)
        local[start : start + len(rows)] = values


def _draw(element: Tensor, key: int, rule: Rule) -> Tensor:
    """One number per element, from 64 hashed bits: two uniforms of 24 bits, and Box-Muller."""
    bits = _mix(element ^ key)
    first = ((bits >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
    if rule.kind == "uniform":
        return first.mul_(2 * rule.scale).sub_(rule.scale)
    second = (bits & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return first.log_().mul_(-2).sqrt_().mul_(second.cos_()).mul_(rule.scale)


def _mix(words: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 whose products wrap; shifts made logical by the masks."""
    words = words + _signed(0x9E3779B97F4A7C15)
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
