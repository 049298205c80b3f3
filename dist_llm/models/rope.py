"""Rotary position embeddings (RoPE, Su et al. 2021), and their frequencies for long contexts.

The frequencies depend only on the config, never on the length of a sequence in a batch. Otherwise context-parallel
ranks, microbatches and cached keys could have different frequencies.
"""

import math

import torch
from torch import Tensor

from dist_llm.config.derive import count_rotated_dims
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.rope_sections import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    RopeScaling,
    YarnScaling,
)

RotaryCosSin = tuple[Tensor, Tensor]  # cos and sin, each [S, F] or [B, S, F]

# Shape suffixes: B batch, S tokens, H heads, E head_dim, F: half of the rotated dimensions of a head.


def compute_rotary_cos_sin(positions_S: Tensor, config: ModelConfig) -> RotaryCosSin:
    """Positions [..., S] -> (cos, sin) of a layer, [..., S, F] each, in fp32."""
    frequencies_F = compute_frequencies(config, positions_S.device)
    angles = positions_S.float()[..., None] * frequencies_F
    factor = attention_factor(config.rope_scaling, config.max_seq_len)
    return (angles.cos(), angles.sin()) if factor == 1 else (angles.cos() * factor, angles.sin() * factor)


def apply_rotary(x_BSHE: Tensor, cos_BSF: Tensor, sin_BSF: Tensor) -> Tensor:
    """Rotate each pair (i, i + F) of the first 2 F dimensions by its angle, in fp32. The other dimensions stay.

    Hugging Face uses the same pairs. The original code of Llama uses pairs (2i, 2i + 1).
    """
    num_rotated = 2 * cos_BSF.shape[-1]
    rotated, rest = x_BSHE[..., :num_rotated], x_BSHE[..., num_rotated:]
    left, right = rotated.to(torch.promote_types(x_BSHE.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos_BSF.unsqueeze(-2), sin_BSF.unsqueeze(-2)  # the same for all heads
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_BSHE.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def compute_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Return the angle per position of each pair of dimensions, [F], in fp32."""
    num_dims, scaling = count_rotated_dims(config), config.rope_scaling
    theta = config.rope_theta
    if isinstance(scaling, DynamicScaling):
        length = max(scaling.length or config.max_seq_len, scaling.original_max_seq_len)
        growth = scaling.factor * length / scaling.original_max_seq_len - (scaling.factor - 1)
        theta *= growth ** (num_dims / (num_dims - 2))
    exponents_F = torch.arange(0, num_dims, 2, device=device, dtype=torch.float32) / num_dims
    frequencies_F = theta**-exponents_F
    if isinstance(scaling, LinearScaling):
        return frequencies_F / scaling.factor
    if isinstance(scaling, LongropeScaling):
        is_long = (scaling.length or config.max_seq_len) > scaling.original_max_seq_len
        factors = scaling.long_factors if is_long else scaling.short_factors
        return frequencies_F / torch.tensor(factors, device=device, dtype=torch.float32)
    if isinstance(scaling, Llama3Scaling | YarnScaling):
        unchanged_F = _unchanged_share(scaling, frequencies_F, theta)
        return (1 - unchanged_F) * frequencies_F / scaling.factor + unchanged_F * frequencies_F
    return frequencies_F


def _unchanged_share(scaling: Llama3Scaling | YarnScaling, frequencies_F: Tensor, theta: float) -> Tensor:
    """Return the share of each frequency that is not divided by the factor, [F]: 1 for high frequencies, 0 for low."""
    if isinstance(scaling, Llama3Scaling):
        turns_F = scaling.original_max_seq_len * frequencies_F / (2 * math.pi)
        limits = scaling.low_freq_factor, scaling.high_freq_factor
        return ((turns_F - limits[0]) / (limits[1] - limits[0])).clamp(0, 1)
    num_dims = 2 * len(frequencies_F)

    def find_dim(turns: float) -> float:
        """Return the dimension whose frequency makes so many turns in the original context."""
        return num_dims * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = find_dim(scaling.beta_fast), find_dim(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, num_dims - 1)
    pair_F = torch.arange(len(frequencies_F), device=frequencies_F.device, dtype=torch.float32)
    return 1 - ((pair_F - first) / (last - first or 0.001)).clamp(0, 1)


def attention_factor(scaling: RopeScaling | None, max_seq_len: int) -> float:
    """Return the factor of cos and sin. Scores are products of two rotated vectors, so they grow by its square."""
    if not isinstance(scaling, YarnScaling | LongropeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, YarnScaling):
        return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    extension = max_seq_len / scaling.original_max_seq_len
    return math.sqrt(1 + math.log(extension) / math.log(scaling.original_max_seq_len)) if extension > 1 else 1.0
