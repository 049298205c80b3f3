"""The shapes of the tensors of a model, without its weights."""

import torch

from dist_llm.config.model_section import ModelConfig
from dist_llm.models.build_model import build_model
from dist_llm.param_spec import iter_weights


def list_native_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {our name of a parameter or buffer: shape}. The vocabulary dimension is padded. Allocates no memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in iter_weights(build_model(model))}
