"""Positional encodings: sinusoidal, and relative position biases. (Rotary: rope.py. Learned: decoder.py.)

Sinusoidal encodings are computed from the positions in each step. There are no buffers, so a model that was built on
the meta device needs nothing but its parameters.
"""

import math

import torch
from torch import Tensor, nn

from dist_llm.config.model_section import ModelConfig
from dist_llm.models.init import embedding_init
from dist_llm.param_spec import ParamSpec

# Shape suffixes: B batch, S tokens or queries, T keys, H heads, D d_model.


class SinusoidalEncoding(nn.Module):
    """The fixed encoding of Vaswani et al. 2017, without a table."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, positions_S: Tensor) -> Tensor:
        """[..., S] -> [..., S, D]."""
        return compute_sinusoidal_encoding(positions_S, self.d_model)


def compute_sinusoidal_encoding(positions_S: Tensor, d_model: int) -> Tensor:
    """Positions [..., S] -> [..., S, D]: sines in the even columns, cosines in the odd (Vaswani et al. 2017, 3.5)."""
    exponents = torch.arange(0, d_model, 2, device=positions_S.device, dtype=torch.float32) / d_model
    angles = positions_S.float()[..., None] * 10_000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :d_model]


class RelativeBias(nn.Module):
    """A learned bias on the attention scores, per head and distance of query and key (Raffel et al. 2020, 2.1)."""

    def __init__(self, config: ModelConfig, bidirectional: bool) -> None:
        super().__init__()
        self.config = config
        self.num_buckets, self.max_distance = config.relative_buckets, config.relative_distance
        self.bidirectional = bidirectional
        self.table = nn.Embedding(config.relative_buckets, config.n_heads)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the table of biases."""
        return {
            "table.weight": ParamSpec(("bucket", "head_index"), embedding_init(self.config), is_embedding=True),
        }

    def forward(self, queries_S: Tensor, keys_T: Tensor) -> Tensor:
        """Positions of queries [S] and keys [T] -> biases [H, S, T]."""
        return self.table(self.compute_buckets(keys_T[None, :] - queries_S[:, None])).permute(2, 0, 1)

    def compute_buckets(self, offset_ST: Tensor) -> Tensor:
        """Offset from query to key, positive if the key is after the query -> bucket (row of the table).

        Small distances have a bucket each; large distances share buckets of logarithmic width. If `bidirectional`, half
        of the buckets are for keys after the query. Otherwise such keys count as distance 0.
        """
        num_buckets = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        first_bucket_ST = (offset_ST > 0) * num_buckets if self.bidirectional else 0
        distance_ST = offset_ST.abs() if self.bidirectional else (-offset_ST).clamp(min=0)
        num_exact = num_buckets // 2  # distances below this have their own bucket
        log_ratio = math.log(self.max_distance / num_exact)
        steps_ST = torch.log(distance_ST.clamp(min=1) / num_exact) / log_ratio * (num_buckets - num_exact)
        shared_bucket_ST = (num_exact + steps_ST.long()).clamp(max=num_buckets - 1)
        return first_bucket_ST + torch.where(distance_ST < num_exact, distance_ST, shared_bucket_ST)
