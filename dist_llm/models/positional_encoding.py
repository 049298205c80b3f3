"""Positional encodings: rotary, sinusoidal, learned, or a learned bias per distance.

All but the learned tables are computed from the positions in each step. There are no buffers, so a model built on the
meta device needs nothing but its parameters.
"""

import math

import torch
from torch import Tensor, nn

from dist_llm.config.model_section import ModelConfig

# E head dimension  F half of it  S queries  T keys  H heads


def rotary_angles(positions_S: Tensor, head_dim: int, theta: float) -> Tensor:
    """Positions [..., S] -> angles [..., S, E/2], position * theta^(-2i/E) (Su et al. 2021, eq. 15)."""
    exponents_F = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=torch.float32) / head_dim
    return positions_S.float()[..., None] * theta**-exponents_F


def apply_rotary(x_BSHE: Tensor, cos_BSF: Tensor, sin_BSF: Tensor) -> Tensor:
    """Rotate each pair (i, i + E/2) by its angle, in fp32. The pairs are Hugging Face's, not Meta's (2i, 2i + 1)."""
    left, right = x_BSHE.to(torch.promote_types(x_BSHE.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos_BSF.unsqueeze(-2), sin_BSF.unsqueeze(-2)  # the same for all heads
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return rotated.to(x_BSHE.dtype)


class SinusoidalEncoding(nn.Module):
    """The fixed encoding of Vaswani et al. 2017, computed on use."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, positions_S: Tensor) -> Tensor:
        """[..., S] -> [..., S, D]."""
        return sinusoidal_encoding(positions_S, self.d_model)


def sinusoidal_encoding(positions_S: Tensor, d_model: int) -> Tensor:
    """Positions [..., S] -> [..., S, D]: sines in the even columns, cosines in the odd (Vaswani et al. 2017, 3.5)."""
    exponents = torch.arange(0, d_model, 2, device=positions_S.device, dtype=torch.float32) / d_model
    angles = positions_S.float()[..., None] * 10_000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :d_model]


class RelativeBias(nn.Module):
    """A learned bias per head on the attention scores, by the distance of query and key (Raffel et al. 2020, 2.1)."""

    def __init__(self, config: ModelConfig, bidirectional: bool) -> None:
        super().__init__()
        self.buckets, self.distance, self.bidirectional = (
            config.relative_buckets,
            config.relative_distance,
            bidirectional,
        )
        self.table = nn.Embedding(config.relative_buckets, config.n_heads)

    def forward(self, queries_S: Tensor, keys_T: Tensor) -> Tensor:
        """Positions of queries [S] and keys [T] -> biases [H, S, T]."""
        return self.table(self.bucket(keys_T[None, :] - queries_S[:, None])).permute(2, 0, 1)

    def bucket(self, ahead_ST: Tensor) -> Tensor:
        """Distance from query to key, positive if the key is ahead -> row of the table.

        Near distances have a row each; far ones share rows of logarithmic width. If `bidirectional`, half of the rows
        are for keys ahead; otherwise keys ahead count as distance 0.
        """
        buckets = self.buckets // 2 if self.bidirectional else self.buckets
        first_ST = (ahead_ST > 0) * buckets if self.bidirectional else 0
        distance_ST = ahead_ST.abs() if self.bidirectional else (-ahead_ST).clamp(min=0)
        near = buckets // 2
        steps_ST = torch.log(distance_ST.clamp(min=1) / near) / math.log(self.distance / near) * (buckets - near)
        far_ST = (near + steps_ST.long()).clamp(max=buckets - 1)
        return first_ST + torch.where(distance_ST < near, distance_ST, far_ST)
