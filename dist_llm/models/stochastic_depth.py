"""Stochastic depth (Huang et al. 2016): in training, each sample skips random layers.

The choice depends only on the sample and the layer, so it is the same on all layouts.
"""

import torch
from torch import Tensor

from dist_llm.counter_rng import splitmix64


def stochastic_depth_scale(sample_hash_B: Tensor, layer: int, rate: float) -> Tensor:
    """Return a factor for the sublayer outputs of each sample, [B]: 0 with probability `rate`, else 1 / (1 - rate)."""
    bits_B = (splitmix64(sample_hash_B ^ (layer << 32)) >> 40) & 0xFFFFFF
    return ((bits_B.float() + 0.5) * 2.0**-24 >= rate).to(torch.float32) / (1 - rate)
