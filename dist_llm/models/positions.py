"""How tokens know their place: rotary angles, sinusoids, or a learned table.

Everything but the learned table is computed from the positions at each step; there are no
buffers, so a model made on the meta device needs nothing but its parameters.
"""

import torch
from torch import Tensor, nn

# E head dimension  F half of it


def rotary_angles(positions_S: Tensor, head_dim: int, theta: float) -> Tensor:
    """Positions [..., S] -> angles [..., S, E/2], position * theta^(-2i/E) (Su et al. 2021, eq. 15)."""
    exponents_F = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=torch.float32) / head_dim
    return positions_S.float()[..., None] * theta**-exponents_F


def rotate(x_BSHE: Tensor, cos_BSF: Tensor, sin_BSF: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) by its angle, in fp32. Hugging Face's pairing, not Meta's (2i, 2i + 1)."""
    left, right = x_BSHE.float().chunk(2, dim=-1)
    cos, sin = cos_BSF.unsqueeze(-2), sin_BSF.unsqueeze(-2)  # the same for all heads
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.to(x_BSHE.dtype)


class Sinusoids(nn.Module):
    """The fixed table of Vaswani et al. 2017, computed where it is needed."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, positions_S: Tensor) -> Tensor:
        """[..., S] -> [..., S, D]."""
        return sinusoids(positions_S, self.d_model)


def sinusoids(positions_S: Tensor, d_model: int) -> Tensor:
    """Positions [..., S] -> [..., S, D]: sines in the even columns, cosines in the odd (Vaswani et al. 2017, 3.5)."""
    exponents = torch.arange(0, d_model, 2, device=positions_S.device, dtype=torch.float32) / d_model
    angles = positions_S.float()[..., None] * 10_000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :d_model]
