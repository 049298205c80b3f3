"""How many bytes a checkpoint of a config takes, known before a model is built."""

import torch

from dist_llm.config.schema import Config
from dist_llm.models.build_model import build_model
from dist_llm.optim.build_optimizer import select_muon_params

STEP_BYTES = 4  # AdamW's count of updates


def count_checkpoint_bytes(config: Config) -> int:
    """Bytes of weights and moments. `config` is resolved. The small files beside them are not counted."""
    with torch.device("meta"):
        model = build_model(config.model)
    parameters = list(model.named_parameters())
    weights = sum(each.numel() * each.element_size() for _, each in parameters)
    optim = config.optim
    if optim.name == "sgd":
        return weights + (weights if optim.momentum else 0)
    by_muon = select_muon_params(parameters) if optim.name == "muon" else {}
    momentum = sum(each.numel() * each.element_size() for each in by_muon.values())
    stepped = [each for name, each in parameters if name not in by_muon]
    moment_bytes = 2 if optim.moments == "bf16" else 4
    return weights + momentum + sum(2 * moment_bytes * each.numel() + STEP_BYTES for each in stepped)
