"""Compute the size of a checkpoint from the config, without building the model in memory."""

import torch

from dist_llm.config.schema import Config
from dist_llm.models.build_model import build_model
from dist_llm.optim.build_optimizer import select_muon_params
from dist_llm.param_spec import collect_param_specs, iter_weights

STEP_BYTES = 4  # step counter of AdamW, one per parameter


def count_checkpoint_bytes(config: Config) -> int:
    """Return the bytes of weights and moments for a resolved config. Small files do not count."""
    with torch.device("meta"):
        model = build_model(config.model)
    parameters = list(model.named_parameters())
    weight_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in iter_weights(model))
    optim = config.optim
    if optim.name == "sgd":
        parameter_bytes = sum(parameter.numel() * parameter.element_size() for _, parameter in parameters)
        return weight_bytes + (parameter_bytes if optim.momentum else 0)
    muon_params = select_muon_params(parameters, collect_param_specs(model)) if optim.name == "muon" else {}
    momentum_bytes = sum(parameter.numel() * parameter.element_size() for parameter in muon_params.values())
    adamw_params = [parameter for name, parameter in parameters if name not in muon_params]
    bytes_per_moment = 2 if optim.moments == "bf16" else 4
    adamw_bytes = sum(2 * bytes_per_moment * parameter.numel() + STEP_BYTES for parameter in adamw_params)
    return weight_bytes + momentum_bytes + adamw_bytes
