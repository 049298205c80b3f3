"""The normalization layers."""

from torch import nn

from dist_llm.config.model_section import ModelConfig


def build_norm(config: ModelConfig) -> nn.Module:
    """Build LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over d_model."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.d_model, eps=config.norm_eps)
