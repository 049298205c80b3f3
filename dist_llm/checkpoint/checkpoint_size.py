"""Compute the size of a checkpoint from the config, without building the model in memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_llm.config.schema import Config
from dist_llm.models.build_model import build_model
from dist_llm.optim.build_optimizer import select_muon_params
from dist_llm.optim.param_groups import is_frozen
from dist_llm.param_spec import collect_param_specs, iter_weights

STEP_BYTES = 4  # step counter of AdamW, one per parameter


def count_checkpoint_bytes(config: Config) -> int:
    """Return the bytes of weights and moments for a resolved config. Small files do not count."""
    with torch.device("meta"):
        model = build_model(config.model)
    parameters, optim = list(model.named_parameters()), config.optim
    weight_bytes = _count_bytes(tensor for _, tensor in iter_weights(model))
    trained_params = [(name, parameter) for name, parameter in parameters if not is_frozen(optim, name)]
    if optim.name == "sgd":
        return weight_bytes + (_count_bytes(parameter for _, parameter in trained_params) if optim.momentum else 0)
    muon_params = select_muon_params(optim, trained_params, collect_param_specs(model))
    adamw_params = [parameter for name, parameter in trained_params if name not in muon_params]
    bytes_per_moment = 2 if optim.moments == "bf16" else 4
    adamw_bytes = sum(2 * bytes_per_moment * parameter.numel() + STEP_BYTES for parameter in adamw_params)
    return weight_bytes + _count_bytes(muon_params.values()) + adamw_bytes


def _count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
