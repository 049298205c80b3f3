"""The ratios of a model to the base model of `model.parametrization`, and the factors of the forward pass.

m_N is the ratio of the widths (d_model), m_L the ratio of the depths (n_layers). Without a parametrization both are 1.
The formulas are table 1 of Dey et al. 2025 (CompleteP), whose column for width agrees with table 8 of Yang et al. 2022
(muP). `dist_llm/models/parametrization.py` has the factors of initial values and of the optimizer.
"""

from collections.abc import Iterator

from dist_llm.config.load import Violation
from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.config.parametrization_sections import CompletePConfig
from dist_llm.config.schema import UnresolvedConfig


def get_width_ratio(model: UnresolvedModelConfig) -> float:
    """Return m_N."""
    return model.d_model / model.parametrization.base_d_model if model.parametrization else 1.0


def get_depth_ratio(model: UnresolvedModelConfig) -> float:
    """Return m_L."""
    return model.n_layers / get_base_depth(model, model.n_layers)


def get_depth_exponent(model: UnresolvedModelConfig) -> float:
    """Return alpha. Without CompleteP m_L is 1, so the value has no effect."""
    return model.parametrization.depth_exponent if isinstance(model.parametrization, CompletePConfig) else 1.0


def get_base_depth(model: UnresolvedModelConfig, num_layers: int) -> int:
    """Return the number of layers for which the hyperparameters are set; `num_layers` without CompleteP."""
    return model.parametrization.base_n_layers if isinstance(model.parametrization, CompletePConfig) else num_layers


def resolve_attention_scale(model: ModelConfig) -> float:
    """Return the factor of the attention scores.

    With base_head_dim it is sqrt(base_head_dim) / head_dim: proportional to 1 / head_dim (Yang et al. 2022, definition
    4.1), and the standard factor in the base model.
    """
    if model.attention_scale:
        return model.attention_scale
    base_head_dim = model.parametrization.base_head_dim if model.parametrization else None
    return float(model.head_dim**-0.5 * ((base_head_dim or model.head_dim) / model.head_dim) ** 0.5)


def resolve_residual_scale(model: UnresolvedModelConfig) -> float:
    """Return the factor of the output of each sublayer: residual_scale m_L^-alpha."""
    return float(model.residual_scale * get_depth_ratio(model) ** -get_depth_exponent(model))


def resolve_logit_scale(model: UnresolvedModelConfig) -> float:
    """Return the factor of the logits: logit_scale / m_N."""
    return model.logit_scale / get_width_ratio(model)


def check_parametrization(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations of `model.parametrization`: its formulas are for AdamW, gpt2 initial values, and pre-norm."""
    model, parametrization = config.model, config.model.parametrization
    if parametrization is None:
        return
    requirements: list[tuple[str, object, object, str]] = [
        ("optim.name", config.optim.name, "adamw", "learning rates are scaled for AdamW"),
        ("model.init", model.init, "gpt2", "the other initial values depend on the width by themselves"),
    ]
    if isinstance(parametrization, CompletePConfig):
        requirements.append(("model.norm_order", model.norm_order, "pre", "completep scales pre-norm residuals"))
        if model.architecture == "encoder_decoder":
            yield Violation(
                ("model.parametrization.name", "model.architecture"),
                "completep has one depth, but an encoder_decoder has two; set parametrization.name=mup",
            )
    for key, value, required, reason in requirements:
        if value != required:
            yield Violation((key, "model.parametrization"), f"{value} with parametrization: {reason}; set {required}")
    if parametrization.base_head_dim and model.attention_scale:
        yield Violation(
            ("model.parametrization.base_head_dim", "model.attention_scale"),
            f"has no effect with attention_scale {model.attention_scale}, which is used for all sizes; remove one",
        )
