"""Upcycling: a model with experts starts from a dense model (Komatsuzaki et al. 2022, 2212.05055).

Each expert of a layer starts as a copy of the dense feed-forward layer, and the router has its configured initial
values.
"""

from collections.abc import Iterator

from dist_llm.config.feedforward_sections import DenseConfig, MoEConfig
from dist_llm.config.model_section import ModelConfig


def find_upcycling_problem(saved: ModelConfig, current: ModelConfig) -> str:
    """Return why the dense layers cannot become experts; an empty string if they can."""
    for layer, current_layer in _pair_layers(saved, current):
        moe = current_layer.feedforward
        if not (isinstance(layer.feedforward, DenseConfig) and isinstance(moe, MoEConfig)):
            continue
        if moe.d_expert != layer.d_ff:
            return (
                f"model.feedforward.d_expert: an expert is a copy of the dense layer, which has {layer.d_ff} hidden "
                f"units (now {moe.d_expert}); set d_expert={layer.d_ff}"
            )
        if moe.n_shared_experts:
            return (
                f"model.feedforward.n_shared_experts: {moe.n_shared_experts} shared experts would be added to the "
                "copies of the dense layer; remove the key"
            )
    return ""


def keeps_function(saved: ModelConfig, current: ModelConfig) -> bool:
    """Return whether the feed-forward layers compute the same in both models, until the first optimizer step.

    The experts of a layer are equal copies. So the layer computes the same if the weights of the chosen experts sum
    to 1.
    """
    for saved_layer, current_layer in _pair_layers(saved, current):
        moe = current_layer.feedforward
        if saved_layer.feedforward == moe:
            continue
        if not (isinstance(saved_layer.feedforward, DenseConfig) and isinstance(moe, MoEConfig)):
            return False
        if not moe.normalize_weights or moe.weight_scale != 1:
            return False
    return True


def has_equal_d_ff(saved: ModelConfig, current: ModelConfig) -> bool:
    """Return whether the layers that are dense in both models have the same number of hidden units."""
    return all(
        saved_layer.d_ff == current_layer.d_ff
        for saved_layer, current_layer in _pair_layers(saved, current)
        if isinstance(saved_layer.feedforward, DenseConfig) and isinstance(current_layer.feedforward, DenseConfig)
    )


def _pair_layers(saved: ModelConfig, current: ModelConfig) -> Iterator[tuple[ModelConfig, ModelConfig]]:
    for layer in range(min(saved.n_layers, current.n_layers)):
        yield saved.layer_config(layer), current.layer_config(layer)
