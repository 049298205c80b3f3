"""Compute the size of a checkpoint from a config, before a model is built."""

import torch

from dist_llm.config.schema import Config
from dist_llm.models.build_model import build_model
from dist_llm.optim.build_optimizer import select_muon_params

STEP_BYTES = 4  # AdamW's step counter


def count_checkpoint_bytes(config: Config) -> int:
    """Return the bytes of weights and moments for a resolved config. Small files are not counted."""
    with torch.device("meta"):
        model = build_model(config.model)
    parameters = list(model.named_parameters())
    weights = sum(parameter.numel() * parameter.element_size() for _, parameter in parameters)
    optim = config.optim
    if optim.name == "sgd":
        return weights + (weights if optim.momentum else 0)
    muon_params = select_muon_params(parameters) if optim.name == "muon" else {}
    momentum = sum(parameter.numel() * parameter.element_size() for parameter in muon_params.values())
    adamw_params = [parameter for name, parameter in parameters if name not in muon_params]
    moment_bytes = 2 if optim.moments == "bf16" else 4
    return weights + momentum + sum(2 * moment_bytes * parameter.numel() + STEP_BYTES for parameter in adamw_params)
