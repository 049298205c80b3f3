"""Scale initial values, learning rates, weight decay and epsilon by `model.parametrization`.

The rules are table 1 of Dey et al. 2025. They depend on the dimensions of a parameter, and on whether it belongs to a
block. A hidden matrix has two dimensions that grow with the width. Embeddings and the head have one: they are not
scaled, because `resolve_logit_scale` scales the logits.
"""

from collections.abc import Collection
from dataclasses import replace

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.parametrization import get_depth_exponent, get_depth_ratio, get_width_ratio
from dist_llm.param_spec import ParamSpec, ParamSpecs

WIDTH_DIMS = ("embed", "heads", "kv_heads", "ffn")  # dimensions whose sizes are proportional to d_model


def apply_parametrization(specs: ParamSpecs, block_names: Collection[str], config: ModelConfig) -> ParamSpecs:
    """Return the specs with the factors of the parametrization. `block_names` are the parameters of the blocks."""
    if config.parametrization is None:
        return specs
    return {name: _scale_spec(spec, name in block_names, config) for name, spec in specs.items()}


def _scale_spec(spec: ParamSpec, is_in_block: bool, config: ModelConfig) -> ParamSpec:
    width, depth, alpha = get_width_ratio(config), get_depth_ratio(config), get_depth_exponent(config)
    if sum(dim in WIDTH_DIMS for dim in spec.dims) >= 2:
        init = replace(spec.init, scale=spec.init.scale * width**-0.5)
        spec = replace(spec, init=init, lr_mult=1 / width, weight_decay_mult=width)
    if is_in_block:
        spec = replace(spec, lr_mult=spec.lr_mult * depth ** (alpha - 1), eps_mult=depth**-alpha / width)
    return spec
