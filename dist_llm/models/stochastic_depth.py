"""Stochastic depth (Huang et al. 2016): a sample skips some of its layers while training.

Which, is a function of the sample and the layer alone, so every layout skips the same.
"""

import torch
from torch import Tensor

from dist_llm.counter_rng import splitmix64


def stochastic_depth_scale(sample_hash_B: Tensor, layer: int, rate: float) -> Tensor:
    """What to multiply each row's sublayers with, [B]: 0 with chance `rate`, else 1 / (1 - rate)."""
    bits_B = (splitmix64(sample_hash_B ^ (layer << 32)) >> 40) & 0xFFFFFF
    return ((bits_B.float() + 0.5) * 2.0**-24 >= rate).to(torch.float32) / (1 - rate)
